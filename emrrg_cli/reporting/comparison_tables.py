"""Writes a comparison as a table for terminal, Markdown and CSV, with differing settings as columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from emrrg_cli.console import printable
from emrrg_cli.vocabulary import SCORE_LABELS

SIGNIFICANT = 0.05
_MARK = "*: differs from the first, p < .05 by paired bootstrap over studies."
NOTE = f"Brackets: 95 % interval. {_MARK}"
_NAMES = SCORE_LABELS | {
    "rules_F1_micro_14": "rules F1 of 14, micro",
    "rules_F1_macro_14": "rules F1 of 14, macro",
    "rules_F1_micro_13": "rules F1 of 13, micro",
}


def comparison_rows(result: Mapping[str, Any], *, intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """Returns heads and cells: name, differing settings, and each score with its interval and a mark if it differs."""
    settings = result["settings"]
    scores = list(result["rows"][0]["scores"])
    heads = ["reports", *(key.removeprefix("model.") for key in settings), *(_NAMES.get(name, name) for name in scores)]
    rows = []
    for row in result["rows"]:
        tested = row.get("against_first") or {"p": {}}
        cells = []
        for name in scores:
            low, high = row["intervals"][name]
            mark = "*" if tested["p"].get(name, 1.0) < SIGNIFICANT else ""
            interval = f" [{low:.3f}, {high:.3f}]" if intervals else ""
            cells.append(f"{row['scores'][name]:.3f}{mark}{interval}")
        rows.append([row["name"], *(_setting(row["settings"].get(key)) for key in settings), *cells])
    for group in result["groups"]:
        cells = [f"{group['mean'][name]:.3f} ± {group['deviation'][name]:.3f}" for name in scores]
        rows.append([group["name"], *(_setting(group["settings"].get(key)) for key in settings), *cells])
    return heads, [[printable(cell) for cell in row] for row in rows]


def comparison_table(result: Mapping[str, Any], width: int) -> Table:
    """Returns a table for a terminal of `width` columns: a row for each score, without intervals if they do not fit."""
    heads, rows = comparison_rows(result)
    note = NOTE
    if sum(max(map(len, column)) + 3 for column in (heads, *rows)) + 1 > width:
        heads, rows = comparison_rows(result, intervals=False)
        note = f"{_MARK} --output writes the intervals."
    first, *lines = zip(heads, *rows, strict=True)
    table = Table(caption=Text(note), caption_justify="left")
    for number, head in enumerate(first):
        table.add_column(Text(head), justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """Returns a Markdown table."""
    heads, rows = comparison_rows(result)
    lines = [heads, ["---"] * len(heads), *rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n".join([body, "", NOTE, *result["remarks"]]) + "\n"


def comparison_csv(result: Mapping[str, Any]) -> str:
    """Returns CSV with one line per set of reports and score: interval, difference and p value."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    settings: Sequence[str] = result["settings"]
    writer.writerow(["reports", *settings, "studies", "score", "value", "low", "high", "difference", "p"])
    for row in result["rows"]:
        tested = row.get("against_first") or {"differences": {}, "p": {}}
        for name, value in row["scores"].items():
            shown = [_setting(row["settings"].get(key)) for key in settings]
            more = [tested["differences"].get(name, ""), tested["p"].get(name, "")]
            writer.writerow([row["name"], *shown, row["studies"], name, value, *row["intervals"][name], *more])
    return stream.getvalue()


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
