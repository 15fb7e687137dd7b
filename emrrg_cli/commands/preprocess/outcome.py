"""Prints the result of a preprocess command or of its dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from emrrg_cli.console import counted
from emrrg_cli.console import out as console


def print_plan(plan: dict[str, Any], out: Path, title: str | None) -> None:
    """Prints the result of a dry run.

    Args:
        plan: Result of `dry_run`.
        out: Dataset directory that a real run would write.
        title: Line above the table; None uses the source and its number of studies.
    """
    sample = plan["sample"]
    studies = sum(count["studies"] for count in plan["splits"].values())
    _line(title or _title(plan))  # that of a table is cut into lines of the table's width
    console.print(_summary(plan, "to be written", studies))
    views = ", ".join(f"{count:,} {view}" for view, count in plan["views"].items())
    _line(f"Views: {views or 'none'}.")
    _print_skipped(plan, f"{counted(plan['studies_skipped'], 'study')} would be skipped", "To check")
    for reason, entry in plan["known_problems"].items():
        first = ", ".join(dict.fromkeys((entry["id"], entry["path"])))
        _line(
            f"{counted(entry['count'], 'image')} cannot be used: {reason}, first: {first}",
        )
    _line(
        f"{counted(sample['studies'], 'study')} from all parts of the source decoded as a sample:",
    )
    for kind in ("problems", "notes"):
        for reason, entry in sample[kind].items():
            first = ", ".join(dict.fromkeys(entry["examples"][0].values()))
            _line(f"  {reason}: {counted(entry['count'], entry['unit'])}, first: {first}")
    _line(
        f"  The whole data set needs about {sample['bytes'] / 1e9:.2f} GB and "
        f"{sample['seconds'] / 60:.1f} minutes on one core.",
    )
    _line(f"Nothing was written. Run without --dry-run to write {out}.")


def print_manifest(manifest: dict[str, Any], title: str | None) -> None:
    """Prints which studies were written and which were skipped; `title` as in `print_plan`."""
    _line(title or _title(manifest))
    console.print(_summary(manifest, "written", manifest["studies_written"]))
    _print_skipped(manifest, f"{counted(manifest['studies_skipped'], 'study')} skipped", "Written, but check")


def _line(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _title(manifest: dict[str, Any]) -> str:
    layout = manifest["options"].get("layout")
    name = manifest["source"] if layout in (None, manifest["source"]) else f"{manifest['source']}, layout {layout}"
    return f"{name}: {counted(manifest['studies_read'], 'study')} read"


def _print_skipped(manifest: dict[str, Any], skipped: str, noted: str) -> None:
    if manifest["skipped"]:
        console.print(_reasons(manifest["skipped"], skipped))
    if manifest["notes"]:
        console.print(_reasons(manifest["notes"], noted))
    for remark in manifest["remarks"]:
        _line(remark)


# Names are passed as Text, because they may contain rich markup.
def _summary(manifest: dict[str, Any], last: str, studies: int) -> Table:
    table = Table()
    for name in ("split", "studies", "images"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, count in manifest["splits"].items():
        table.add_row(split, f"{count['studies']:,}", f"{count['images']:,}")
    table.add_section()
    table.add_row(last, f"{studies:,}", f"{manifest['images']:,}")
    return table


def _reasons(entries: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("reason")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for reason, entry in entries.items():
        first = Text(", ".join(dict.fromkeys(entry["examples"][0].values())))  # an id is often the path
        table.add_row(reason, counted(entry["count"], entry["unit"]), first)
    return table
