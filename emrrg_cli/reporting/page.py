"""Writes a page of images with their reports as one HTML file without other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.reporting.rendering import render


@dataclass
class Card:
    """One study on the page.

    `truth` is None if there is no reference report. `heading` is the title of the report.
    """

    title: str
    images: Sequence[Image.Image]
    report: str
    truth: str | None = None
    notes: str = ""
    heading: str = "Generated"


@dataclass(frozen=True)
class Bar:
    """A table cell with a bar: `part` (0 to 1) of the longest bar."""

    part: float


@dataclass
class Page:
    """A page: introduction, tables of `name -> columns`, and the studies."""

    title: str
    intro: str
    cards: Sequence[Card]
    tables: Sequence[tuple[str, Mapping[str, Sequence[str | Bar]]]] = ()


def write_page(path: Path, page: Page) -> None:
    """Writes the page as one HTML file that contains the images; it begins with a disclaimer.

    Raises:
        RunError: if the file cannot be written.
    """
    atomic_write_text(path, render("page.html", title=page.title, intro=page.intro, page=page))
