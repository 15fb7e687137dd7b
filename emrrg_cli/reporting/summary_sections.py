"""Small tables of a summary for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emrrg_cli.console import counted, printable
from emrrg_cli.datasets.summary import Summary
from emrrg_cli.reporting.page import Bar
from emrrg_cli.reporting.tables import DISCLAIMER

_BAR = 24  # characters of the longest bar in the terminal
_SENTENCES = 12  # shown in the terminal
_EXAMPLES = 3


@dataclass(frozen=True)
class Section:
    """A table: name, column heads (the first is for the row names) and rows."""

    name: str
    heads: Sequence[str]
    rows: Mapping[str, Sequence[str | Bar]]


def sections(summary: Summary) -> list[Section]:
    """Returns the tables of a summary, without empty ones."""
    splits = list(summary.splits)
    found = [_splits(summary), _by_split("Views", "images", summary.views, splits)]
    found += [_by_split(printable(name), "studies", labels, splits) for name, labels in summary.labels.items()]
    found += [_lengths(summary), _repeated(summary)]
    texts = {_short(text): [f"{studies:,}"] for text, studies in summary.repeated.most}
    found.append(Section("Most frequent reports", ["report", "studies"], texts))
    sentences = {_short(text): [f"{reports:,}"] for text, reports in summary.sentences}
    found.append(Section("Most common sentences", ["sentence", "reports"], sentences))
    skipped = summary.manifest.get("studies_skipped", 0)
    found.append(_reasons(f"Skipped: {counted(skipped, 'study')}", summary.manifest.get("skipped")))
    found.append(_reasons("Written, but check", summary.manifest.get("notes")))
    return [section for section in found if section.rows]


def title(summary: Summary) -> str:
    """Returns the name of the dataset directory and its size."""
    name = printable(Path(summary.root).absolute().name)
    return f"{name}: {counted(summary.studies, 'study')}, {counted(summary.images, 'image')}"


def remarks(summary: Summary) -> list[str]:
    """Returns remarks beside the tables, as sentences."""
    sentences = [f"Source: {printable(', '.join(summary.sources))}."]
    sentences += [printable(remark) for remark in summary.manifest.get("remarks") or []]
    if summary.patients_in_several_splits:
        sentences.append(f"Patients in more than one split: {summary.patients_in_several_splits:,}.")
    if summary.is_synthetic:
        sentences.append("Synthetic images, drawn by a program. They show no patient.")
    return sentences


def terminal(summary: Summary) -> RenderableType:
    """Returns the summary for the terminal, with the reports of a few studies."""
    parts: list[RenderableType] = [Text(title(summary), style="bold")]
    for section in sections(summary):
        rows = dict(list(section.rows.items())[:_SENTENCES]) if section.heads[0] == "sentence" else section.rows
        parts += [Text(), _table(Section(section.name, section.heads, rows))]
    shown = summary.examples[:: max(1, len(summary.examples) // _EXAMPLES)][:_EXAMPLES]
    if shown:
        examples = Table(title="A few studies", title_justify="left", show_lines=True)
        examples.add_column("study", overflow="fold", ratio=1)
        examples.add_column("report", ratio=3)
        for one in shown:
            about = Text(f"{printable(one.study_id)}\n{one.split}, {', '.join(one.views)}")
            examples.add_row(about, Text(_short(one.report, 300) or "(none)"))
        parts += [Text(), examples]
    return Group(*parts, *map(Text, remarks(summary)), Text(DISCLAIMER, style="italic"))


def _splits(summary: Summary) -> Section:
    heads = ["studies", "images", "patients", "without report", "without patient"]
    by_split = {
        split: (one.studies, one.images, one.patients, one.without_report, one.without_patient)
        for split, one in summary.splits.items()
    }
    shown = [
        number for number in range(len(heads)) if number < 2 or any(counts[number] for counts in by_split.values())
    ]
    rows = {split: [f"{counts[number]:,}" for number in shown] for split, counts in by_split.items()}
    return Section("Splits", ["split", *(heads[number] for number in shown)], rows)


def _by_split(name: str, unit: str, counts: Mapping[str, Mapping[str, int]], splits: Sequence[str]) -> Section:
    rows = {
        printable(value): [f"{n:,}" for n in (*(by_split.get(split, 0) for split in splits), sum(by_split.values()))]
        for value, by_split in counts.items()
    }
    return Section(name[:1].upper() + name[1:], [unit, *splits, "all"], rows)


def _lengths(summary: Summary) -> Section:
    bars = summary.histogram()
    longest = max((reports for _, _, reports in bars), default=1)
    rows: dict[str, Sequence[str | Bar]] = {
        f"{low} and more" if high is None else f"{low}-{high}" if high > low else str(low): [
            f"{reports:,}",
            Bar(reports / longest),
        ]
        for low, high, reports in bars
    }
    return Section(f"Report length, median {summary.median_words:g} words", ["words", "reports", ""], rows)


def _repeated(summary: Summary) -> Section:
    found = summary.repeated
    rows = {
        "different reports": found.distinct,
        "reports of several studies": found.repeated,
        "studies that share a report": found.studies,
        "reports in more than one split": found.across_splits,
    }
    if not found.distinct:
        rows = {}
    return Section("Repeated reports", ["", "number"], {name: [f"{count:,}"] for name, count in rows.items()})


def _reasons(name: str, entries: Mapping[str, Any] | None) -> Section:
    rows = {}
    for reason, entry in (entries or {}).items():
        first = entry["examples"][0] if entry.get("examples") else {}
        example = printable(", ".join(dict.fromkeys(map(str, first.values()))))  # an id is often the path
        rows[printable(reason)] = [counted(entry["count"], entry["unit"]), example]
    return Section(name, ["reason", "count", "first"], rows)


def _short(text: str, length: int = 200) -> str:
    """Returns a text on one line, shortened if it is long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _table(section: Section) -> Table:
    table = Table(title=Text(section.name), title_justify="left")
    for number, head in enumerate(section.heads):
        plain = number == 0 or head in ("", "first")
        table.add_column(head, justify="left" if plain else "right", overflow="fold")
    for name, cells in section.rows.items():
        shown = (Text("█" * round(_BAR * cell.part)) if isinstance(cell, Bar) else Text(cell) for cell in cells)
        table.add_row(Text(name), *shown)
    return table
