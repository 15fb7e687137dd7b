"""A page that shows images with their reports: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.reporting.rendering import render


@dataclass
class Card:
    """One study on the page.

    `truth` is None where there is no report to compare with. `tags` are findings with `good` (found), `bad` (reported,
    but not there) or `missed`. `heading` stands above the report.
    """

    title: str
    images: Sequence[Image.Image]
    report: str
    truth: str | None = None
    tags: Sequence[tuple[str, str]] = ()
    notes: str = ""
    heading: str = "Generated"


@dataclass(frozen=True)
class Bar:
    """A cell of a table that is a bar: `part` (0 to 1) of the longest."""

    part: float


@dataclass
class Page:
    """A page: what it shows, figures as tables of `name -> columns`, the commands that made it, and the studies.

    `legend` explains the tags of the cards, each with a tag of its kind.
    """

    title: str
    intro: str
    cards: Sequence[Card]
    tables: Sequence[tuple[str, Mapping[str, Sequence[str | Bar]]]] = ()
    commands: Sequence[str] = field(default_factory=list)
    legend: Sequence[tuple[str, str]] = ()


def write_page(path: Path, page: Page) -> None:
    """Writes the page as one HTML file, images inside; a disclaimer heads it.

    Raises:
        RunError: when it cannot be written.
    """
    atomic_write_text(path, render("page.html", title=page.title, intro=page.intro, page=page))
