"""What a training run shows while it runs: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from emrrg_cli.console import err

# The rate is that of the last so many seconds of training, and of at least so many steps.
_WINDOW_S = 30.0
_WINDOW_STEPS = 10
_LINE_EVERY_S = 20.0
_FIGURES_EVERY_S = 0.2
_SMOOTHING = 0.9
_FIGURES_A_LINE = 4


class TrainingDisplay:
    """Progress of a training run on stderr, as a context manager.

    Shows the optimizer step, the epoch, the smoothed loss, the learning rate, samples/s, memory (the peak on the GPU
    where there is one, else that of the process now), and the time passed and left. On a terminal this is a live bar;
    elsewhere, as in a log file, a line at most every 20 s and one before each validation.

    Args:
        total_steps: Optimizer steps of the whole run.
        start_step: Steps already done, in a run that is resumed.
        enabled: False shows nothing, for the processes other than the first. The rate is kept all the same.
        console: Where to show it; by default the program's stderr.
        after_batch: Called whenever a phase reports progress; what it raises ends the phase.
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
        self._rate = _Rate()
        self._loss = _Smoothed()
        self._epoch = self._lr = 0.0
        self._began = time.monotonic()
        self._told_at = self._began
        self._told_step = start_step
        self._bar: _Bar | None = None
        self._task: TaskID | None = None
        if enabled and self._console.is_interactive:
            self._bar = _Bar(self._console)

    def __enter__(self) -> Self:
        self._began = self._told_at = time.monotonic()
        self._rate = _Rate()
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
            self._tell()

    @property
    def samples_per_second(self) -> float | None:
        """Training samples a second of late, validation left out; None before the first step."""
        return self._rate.samples_per_second

    def update(self, *, step: int, epoch: float, loss: float, lr: float, samples: int) -> None:
        """Record one optimizer step.

        Args:
            step: Steps done, this one included.
            epoch: Passes over the data so far; a fraction within an epoch.
            loss: Training loss, or NaN where it is not known at this step.
            lr: Learning rate of this step.
            samples: Samples of this step, over all processes.
        """
        self._step, self._epoch, self._lr = step, epoch, lr
        self._loss.add(loss)
        self._rate.add(samples)
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)
            # Often enough for the eye, and no cost for steps of a millisecond.
            if now - self._told_at >= _FIGURES_EVERY_S or step in (self._start + 1, self._total):
                self._told_at = now
                self._show_figures(self._bar)
        elif self._enabled and now - self._told_at >= _LINE_EVERY_S:
            self._tell()

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._enabled:
            self._console.print(Text(text), soft_wrap=True)

    def figures(self, title: str, values: Mapping[str, float], note: str = "") -> None:
        """Print named figures in one line, or as a table where that is too long for the console."""
        parts = [f"{name} {number:.4f}" for name, number in values.items()]
        line = f"{title} {'  '.join(parts)}{note}"
        if len(line) <= self._console.width:
            self.message(line)
        elif self._enabled:
            self.message(f"{title}{note}")
            table = Table.grid(padding=(0, 2))
            for start in range(0, len(parts), _FIGURES_A_LINE):
                table.add_row("", *parts[start : start + _FIGURES_A_LINE])
            self._console.print(table)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Keep the time of a block, such as the writing of a checkpoint, out of the training rate."""
        return self._rate.paused()

    @contextlib.contextmanager
    def phase(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show work that is no training, such as a validation; its time is kept out of the training rate.

        Yields:
            A function that reports the given number of items as done.
        """
        with self.paused():
            if self._bar is not None:
                yield from self._phase_bar(self._bar, description, total)
            elif self._enabled:
                self._tell()
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
            if now - self._told_at >= _LINE_EVERY_S:
                self._told_at = now
                self.message(f"{description} {done:,}/{total:,}")

        yield _counter(total, show, self._after_batch)

    def _tell(self) -> None:
        """The plain line, unless it would say what the last one said."""
        if self._step == self._told_step:
            return
        self._told_at, self._told_step = time.monotonic(), self._step
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
        """Time left, at the present rate of training and the share of other work so far; empty if unknown."""
        pace, done = self._rate.seconds_per_step, self._step - self._start
        if pace is None or not done or self._step >= self._total:
            return ""
        return _clock((self._total - self._step) * (pace + self._rate.paused_s / done))


class _Rate:
    """Samples and steps a second over a moving window, on a clock that stands still in pauses."""

    def __init__(self) -> None:
        self.paused_s = 0.0
        self._pauses = 0
        self._samples = 0
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._cold = True

    def add(self, samples: int) -> None:
        self._samples += samples
        now = time.monotonic() - self.paused_s
        self._points.append((now, self._samples))
        if self._cold and len(self._points) == 3:
            # The first step starts workers and loads kernels; it counts only while there is no other.
            self._points.popleft()
            self._cold = False
        while len(self._points) > _WINDOW_STEPS + 1 and now - self._points[0][0] > _WINDOW_S:
            self._points.popleft()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:  # a pause within a pause is part of it
                self.paused_s += time.monotonic() - began

    @property
    def samples_per_second(self) -> float | None:
        seconds, samples, _ = self._span()
        return samples / seconds if samples and seconds > 0 else None

    @property
    def seconds_per_step(self) -> float | None:
        seconds, _, steps = self._span()
        return seconds / steps if steps else None

    def _span(self) -> tuple[float, int, int]:
        (began, before), (ended, after) = self._points[0], self._points[-1]
        return ended - began, after - before, len(self._points) - 1


class _Smoothed:
    """Exponential moving average of the finite values, not drawn towards zero at its start."""

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self._total = _SMOOTHING * self._total + value
            self._weight = _SMOOTHING * self._weight + 1

    @property
    def value(self) -> float | None:
        return self._total / self._weight if self._weight else None


class _Bar(Progress):
    """The bars, and a line of figures under them."""

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
            # What other code prints on a stdout that is a file must stay in that file.
            redirect_stdout=sys.stdout.isatty(),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield self.figures


def _counter(total: int, show: Callable[[int], None], after: Callable[[], None]) -> Callable[[int], None]:
    """Add up reported counts; processes that pad their last batch may report more than there is."""
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
    """Peak memory on the GPU once torch uses one, else memory of this process; empty where the system does not say."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"RAM {resident_bytes() / 2**30:.1f} GiB"


def resident_bytes() -> int:
    """Memory of this process."""
    return int(psutil.Process().memory_info().rss)
