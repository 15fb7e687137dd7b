"""The two consoles of the program: results go to `out` (stdout), everything else to `err` (stderr)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(description: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with count, rate and time left; yields a function that adds finished items."""
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
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=not enabled) as progress:
        task = progress.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate="" if speed is None else f"{speed:.2f}/s")

        yield advance


def counted(count: int, unit: str) -> str:
    """A count with its unit: `1 study`, `2,955 studies`."""
    plural = {"study": "studies", "hypothesis": "hypotheses"}.get(unit, f"{unit}s")
    return f"{count:,} {unit if count == 1 else plural}"


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates as escapes, so that terminals and UTF-8 files can hold it."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
