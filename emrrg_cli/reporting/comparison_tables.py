"""Writes a comparison as a table for terminal, Markdown and CSV, with differing settings as columns."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from emrrg_cli.console import printable
from emrrg_cli.files.spreadsheets import spreadsheet_writer
from emrrg_cli.vocabulary import SCORE_LABELS

SIGNIFICANT = 0.05
_BRACKETS = "Brackets: 95 % interval."
_HEAD, _CELL = 22, 15  # characters of the first and the other columns in the terminal; longer settings are folded
_NAMES = SCORE_LABELS | {
    "rules_F1_micro_14": "rules F1 of 14, micro",
    "rules_F1_macro_14": "rules F1 of 14, macro",
    "rules_F1_micro_13": "rules F1 of 13, micro",
}


def comparison_rows(result: Mapping[str, Any], *, intervals: bool = True) -> list[list[str]]:
    """Returns cells of each run: name, differing settings, and each score with interval, and a mark if it differs."""
    rows = []
    for row in result["rows"]:
        cells = []
        for name, value in row["scores"].items():
            ends = row["intervals"].get(name) if intervals else None
            cells.append(f"{value:.3f}{_mark(row, name)}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""))
        rows.append(_line(result, row, cells))
    return rows


def seed_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Returns cells of each group of seeds: name, differing settings, mean and standard deviation of each score."""
    rows = []
    for group in result["groups"]:
        deviations = {name: "" if one is None else f" ± {one:.3f}" for name, one in group["deviation"].items()}
        cells = [f"{mean:.3f}{_mark(group, name)}{deviations[name]}" for name, mean in group["mean"].items()]
        rows.append(_line(result, group, cells))
    return rows


def _note(result: Mapping[str, Any], *, seeds: bool = False) -> str:
    over = "patients" if any(row.get("patients") for row in result["rows"]) else "studies"
    if seeds:
        test = f"bootstrap over {over} and Student's t over seeds"
        return f"±: standard deviation over seeds; *: differs from the first, p < .05 by {test}."
    return f"*: differs from the first, p < .05 by paired bootstrap over {over}."


def _heads(result: Mapping[str, Any]) -> list[str]:
    settings = (key.removeprefix("model.") for key in result["settings"])
    return ["reports", *settings, *(_NAMES.get(name, name) for name in result["rows"][0]["scores"])]


def _line(result: Mapping[str, Any], entry: Mapping[str, Any], cells: Sequence[str]) -> list[str]:
    settings = (_setting(entry["settings"].get(key)) for key in result["settings"])
    return [printable(cell) for cell in (entry["name"], *settings, *cells)]


def _mark(entry: Mapping[str, Any], score: str) -> str:
    tested = entry.get("against_first") or {"p": {}}
    return "*" if tested["p"].get(score, 1.0) < SIGNIFICANT else ""


def comparison_table(result: Mapping[str, Any], width: int) -> Group:
    """Returns tables for a terminal of `width` columns: a row for each score, without intervals if they do not fit.

    If there are runs with several seeds, they show their means, and not each run. Columns that do not fit into one
    table go into further ones below it.
    """
    heads = _heads(result)
    if result["groups"]:
        rows, note = seed_rows(result), f"{_note(result, seeds=True)} --output writes each run and the intervals."
    else:
        rows, note = comparison_rows(result), f"{_BRACKETS} {_note(result)}"
        if _needed(heads) + sum(map(_needed, rows)) + 1 > width:
            rows, note = comparison_rows(result, intervals=False), f"{_note(result)} --output writes the intervals."
    parts: list[list[list[str]]] = [[]]
    left = room = width - 1 - _needed(heads, _HEAD)
    for row in rows:
        left -= _needed(row, _CELL)
        if left < 0 and parts[-1]:
            parts.append([])
            left = room - _needed(row, _CELL)
        parts[-1].append(row)
    return Group(*(_table(heads, part) for part in parts), Text(note, style="italic"))


def _needed(cells: Sequence[str], most: int | None = None) -> int:
    """Returns the columns of a terminal that the cells of one column need, each folded to at most `most`."""
    widest = max(map(len, cells))
    return 3 + (widest if most is None else min(widest, most))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    first, *lines = zip(heads, *rows, strict=True)
    table = Table()
    for number, head in enumerate(first):
        table.add_column(Text(head), justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """Returns a Markdown table of all runs, and one of the means over seeds."""
    tables = [(comparison_rows(result), f"{_BRACKETS} {_note(result)}")]
    if result["groups"]:
        tables.insert(0, (seed_rows(result), _note(result, seeds=True)))
    heads = _heads(result)
    parts = []
    for rows, note in tables:
        lines = [heads, ["---"] * len(heads), *rows]
        parts += [
            "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines),
            note,
        ]
    return "\n\n".join([*parts, *(_markdown(printable(remark)) for remark in result["remarks"])]) + "\n"


def _markdown(text: str) -> str:
    # Names of files may contain HTML, which Markdown keeps.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def comparison_csv(result: Mapping[str, Any]) -> str:
    """Returns CSV with one line per run, or group of seeds, and score: interval, difference and p value."""
    stream = io.StringIO()
    settings: Sequence[str] = result["settings"]
    values = ["value", "low", "high", "deviation", "difference", "difference_low", "difference_high", "p"]
    write = spreadsheet_writer(stream, ["reports", *settings, "studies", "score", *values])
    for entry in (*result["rows"], *result["groups"]):
        tested = entry.get("against_first") or {"differences": {}, "intervals": {}, "p": {}}
        for name, value in (entry.get("scores") or entry["mean"]).items():
            interval = entry.get("intervals", {}).get(name, ["", ""])
            gain = [tested["differences"].get(name, ""), *tested["intervals"].get(name, ["", ""])]
            numbers = [value, *interval, entry.get("deviation", {}).get(name, ""), *gain, tested["p"].get(name, "")]
            shown = [_setting(entry["settings"].get(key)) for key in settings]
            write([entry["name"], *shown, entry.get("studies", ""), name, *numbers])
    return stream.getvalue()


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
