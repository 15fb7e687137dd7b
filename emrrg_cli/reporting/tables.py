"""Tables for the terminal: scores of an evaluation, reports of a generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from rich.table import Table
from rich.text import Text

from emrrg_cli.console import printable
from emrrg_cli.datasets.report_text import readable_report
from emrrg_cli.vocabulary import METEOR, SCORE_LABELS

DISCLAIMER = "Research output: not for diagnosis."


def score_table(scores: Mapping[str, float | None], title: str | None = None) -> Table:
    """Returns a table with one row per metric, in the given order; missing metrics show what they need."""
    heading = None if title is None else Text(title)
    table = Table(title=heading, title_justify="left", title_style="bold", min_width=len(title or ""))
    table.add_column("metric")
    table.add_column("score", justify="right")
    for name, value in scores.items():
        table.add_row(Text(SCORE_LABELS.get(name, name)), _score(name, value))
    return table


def reports_table(rows: Iterable[Mapping[str, Any]], limit: int = 10) -> Table:
    """Returns a table of generated reports with their studies; `DISCLAIMER` is its caption.

    Args:
        rows: Mappings with `path` (or `study_id`), `report` and, if known, `seconds`.
        limit: Number of reports shown; the caption counts the others.
    """
    rest = iter(rows)
    shown = list(islice(rest, limit))
    hidden = sum(1 for _ in rest)
    timed = any(row.get("seconds") is not None for row in shown)
    more = f"{hidden:,} more not shown. " if hidden else ""
    # Lines separate the rows, because reports have several lines.
    caption = Text(more + DISCLAIMER)
    table = Table(
        show_lines=True, caption=caption, caption_justify="left", caption_style="italic", min_width=len(caption)
    )
    table.add_column("image" if any("path" in row for row in shown) else "study", overflow="fold", ratio=1)
    table.add_column("report", ratio=3)
    if timed:
        table.add_column("seconds", justify="right", no_wrap=True)
    for row in shown:
        seconds = row.get("seconds")
        cells = [
            Text(printable(str(row.get("path", row.get("study_id", ""))))),
            Text(readable_report(row["report"]) or "(empty)"),
        ]
        table.add_row(*cells, *([Text("" if seconds is None else f"{seconds:.2f}")] if timed else []))
    return table


def _score(name: str, value: float | None) -> Text:
    if value is not None:
        return Text(f"{value:.4f}")
    return Text("needs Java" if name == METEOR else "not computed", style="dim")
