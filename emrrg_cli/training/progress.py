"""The progress display of a training run: a live bar on a terminal, and plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from emrrg_cli.console import err
from emrrg_cli.training.rate import SmoothedValue, TrainingRate

_LINE_EVERY_S = 20.0
_FIGURES_EVERY_S = 0.2
_FIGURES_A_LINE = 4


class TrainingDisplay:
    """Progress of a training run on stderr, as a context manager.

    Shows the optimizer step, the epoch, the smoothed loss, the learning rate, samples/s, memory (peak GPU memory, or
    the current memory of the process on a CPU), and the time passed and left. A terminal gets a live bar. A log file
    gets at most one line in 20 s, and one before each validation.

    Args:
        total_steps: Optimizer steps of the whole run.
        start_step: Steps already done by a resumed run.
        enabled: False prints nothing and only measures the rate; for all processes except the first.
        console: Where to print; stderr by default.
        after_batch: Called whenever a phase reports progress. An exception that it raises ends the phase.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        *,
        console: Console | None = None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._total = total_steps
        self._start = self._step = start_step
        self._console = console or err
        self._enabled = enabled
        self._after_batch = after_batch
        self._rate = TrainingRate()
        self._loss = SmoothedValue()
        self._epoch = self._lr = 0.0
        self._began = time.monotonic()
        self._reported_at = self._began
        self._reported_step = start_step
        self._bar: _Bar | None = None
        self._task: TaskID | None = None
        if enabled and self._console.is_interactive:
            self._bar = _Bar(self._console)

    def __enter__(self) -> Self:
        self._began = self._reported_at = time.monotonic()
        self._rate = TrainingRate()
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=self._total, completed=self._start, left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show_figures(self._bar)
            self._bar.stop()
        elif self._enabled:
            self._print_line()

    @property
    def samples_per_second(self) -> float | None:
        """Recent training samples per second, without validation; None before the first step."""
        return self._rate.samples_per_second

    def update(self, *, step: int, epoch: float, loss: float, lr: float, samples: int) -> None:
        """Records one optimizer step.

        Args:
            step: Steps done, this one included.
            epoch: Passes over the data so far; a fraction within an epoch.
            loss: Training loss, or NaN if it is not known at this step.
            lr: Learning rate of this step.
            samples: Samples of this step, over all processes.
        """
        self._step, self._epoch, self._lr = step, epoch, lr
        self._loss.add(loss)
        self._rate.add(samples)
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)
            # Not at each step: formatting the figures would slow down steps that take a millisecond.
            if now - self._reported_at >= _FIGURES_EVERY_S or step in (self._start + 1, self._total):
                self._reported_at = now
                self._show_figures(self._bar)
        elif self._enabled and now - self._reported_at >= _LINE_EVERY_S:
            self._print_line()

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._enabled:
            self._console.print(Text(text), soft_wrap=True)

    def figures(self, title: str, values: Mapping[str, float], note: str = "") -> None:
        """Prints named figures in one line, or as a table if the line is too long for the console."""
        parts = [f"{name} {number:.4f}" for name, number in values.items()]
        line = f"{title} {'  '.join(parts)}{note}"
        if len(line) <= self._console.width:
            self.message(line)
        elif self._enabled:
            self.message(f"{title}{note}")
            table = Table.grid(padding=(0, 2))
            longest = max(map(len, parts)) + 2
            columns = max(1, min(_FIGURES_A_LINE, (self._console.width - 2) // longest))
            for start in range(0, len(parts), columns):
                table.add_row("", *parts[start : start + columns])
            self._console.print(table)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Excludes the time of a block, such as writing a checkpoint, from the training rate."""
        return self._rate.paused()

    @contextlib.contextmanager
    def phase(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows work other than training, such as a validation. Its time is excluded from the training rate.

        Yields:
            A function that reports the given number of items as done.
        """
        with self.paused():
            if self._bar is not None:
                yield from self._phase_bar(self._bar, description, total)
            elif self._enabled:
                self._print_line()
                yield from self._phase_lines(description, total)
            else:
                yield lambda count: self._after_batch()

    def _phase_bar(self, bar: _Bar, description: str, total: int) -> Iterator[Callable[[int], None]]:
        task = bar.add_task(description, total=total, left="")
        try:
            yield _counter(total, lambda done: bar.update(task, completed=done), self._after_batch)
        finally:
            bar.remove_task(task)

    def _phase_lines(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        def show(done: int) -> None:
            now = time.monotonic()
            if now - self._reported_at >= _LINE_EVERY_S:
                self._reported_at = now
                self.message(f"{description} {done:,}/{total:,}")

        yield _counter(total, show, self._after_batch)

    def _print_line(self) -> None:
        """Prints a plain line, unless there is no new step since the last one."""
        if self._step == self._reported_step:
            return
        self._reported_at, self._reported_step = time.monotonic(), self._step
        passed = _clock(time.monotonic() - self._began)
        times = [f"elapsed {passed}", *([f"left {left}"] if (left := self._left()) else [])]
        self.message("  ".join([f"step {self._step:,}/{self._total:,}", *self._figures(), *times]))

    def _show_figures(self, bar: _Bar) -> None:
        bar.figures = Text("  ".join(self._figures()), style="dim", overflow="ellipsis", no_wrap=True)
        if self._task is not None:
            left = self._left()
            bar.update(self._task, left=f"left {left}" if left else "")

    def _figures(self) -> list[str]:
        if self._step == self._start:
            return []
        rate = self._rate.samples_per_second
        parts = [
            f"epoch {self._epoch:.2f}",
            f"loss {self._loss.value:.4f}" if self._loss.value is not None else "",
            f"lr {self._lr:.2e}",
            "" if rate is None else f"{rate:.3g} samples/s" if rate < 1000 else f"{rate:,.0f} samples/s",
            _memory(),
        ]
        return [part for part in parts if part]

    def _left(self) -> str:
        """Returns the time left, from the current training rate and the mean pause per step; empty if unknown.

        Rich's own estimate (TimeRemainingColumn) ignores pauses.
        """
        pace, done = self._rate.seconds_per_step, self._step - self._start
        if pace is None or not done or self._step >= self._total:
            return ""
        return _clock((self._total - self._step) * (pace + self._rate.paused_s / done))


class _Bar(Progress):
    """The progress bars, with a line of figures below."""

    def __init__(self, console: Console) -> None:
        self.figures = Text("")
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=console,
            expand=True,
            refresh_per_second=4,
            # Redirecting moves prints to stderr, so it is off if stdout is a file.
            redirect_stdout=sys.stdout.isatty(),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield self.figures


def _counter(total: int, show: Callable[[int], None], after: Callable[[], None]) -> Callable[[int], None]:
    """Returns a function that adds up counts, up to `total`: processes that pad their last batch report too many."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        show(done)
        after()

    return advance


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _memory() -> str:
    """Returns the peak GPU memory if torch uses a GPU, else the memory of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"RAM {resident_bytes() / 2**30:.1f} GiB"


def resident_bytes() -> int:
    """Returns the resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)
