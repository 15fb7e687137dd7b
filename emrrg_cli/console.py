"""The two consoles of the program: results go to `out` (stdout), everything else to `err` (stderr)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console


class _PlainConsole(Console):
    """Shows control characters in texts as escapes: names of files may hold codes that a terminal would obey."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable_lines(one) if isinstance(one, str) else one for one in objects), **options)


out = _PlainConsole(highlight=False)
err = _PlainConsole(stderr=True, highlight=False)


@contextmanager
def lossy_stderr() -> Iterator[None]:
    """Drops output that stderr does not accept: a full disk or a closed pipe there must not end the work."""
    before = sys.stderr
    sys.stderr = cast(TextIO, _Lossy(before))
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before


class _Lossy:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # Also for processes that start later, and for what is left in the buffer.
            with suppress(OSError, ValueError):  # no descriptor where stderr is replaced
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def progress_bar(description: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr with count, rate and time left; yields a function that adds finished items."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate)
    times = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, *times, console=err, disable=not enabled) as progress:
        task = progress.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            progress.advance(task, count)
            bar = progress.tasks[0]  # rich's own speed counts only the time between two items of a batch
            progress.update(task, rate=f"{bar.completed / bar.elapsed:.2f}/s" if bar.elapsed else "")

        yield advance


def counted(count: int, unit: str) -> str:
    """Returns a count with its unit: `1 study`, `2,955 studies`."""
    plural = {"study": "studies", "hypothesis": "hypotheses"}.get(unit, f"{unit}s")
    return f"{count:,} {unit if count == 1 else plural}"


def printable_lines(text: str) -> str:
    """Applies `printable` to each line."""
    return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """Returns a text with control characters and lone surrogates as escapes, for terminals and UTF-8 files."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
