"""A page that shows images with their reports: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from emrrg_cli.files import atomic_write_text
from emrrg_cli.reporting.tables import DISCLAIMER

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a8a4a; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.note { color: #888; } .warning { border-left: 4px solid var(--bad); padding: .3rem .8rem; background: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #4878a8; height: .8rem; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; }
.tables { display: flex; gap: 3rem; flex-wrap: wrap; }
.card { display: grid; grid-template-columns: 15rem 1fr 1fr; gap: 1.2rem; padding: 1rem 0;
  border-top: 1px solid var(--line); }
.card img { width: 100%; image-rendering: auto; } .card h3 { margin: 0 0 .3rem; font-size: .95rem; }
.tag { display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .6rem; margin: 0 .3rem .3rem 0;
  font-size: .85rem; }
.good { color: var(--good); } .good::before { content: "✓ "; }
.bad { color: #fff; background: var(--bad); border-color: var(--bad); } .bad::before { content: "✗ "; }
.missed { color: var(--bad); border-style: dashed; } .missed::before { content: "○ "; }
@media (max-width: 50rem) { .card { grid-template-columns: 1fr; } }
"""


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
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{_text(page.title)}</title><style>{_STYLE}</style>",
        f"<h1>{_text(page.title)}</h1><p class=note>{_text(page.intro)}</p>",
        f"<p class=warning>{_text(DISCLAIMER)}</p>",
    ]
    if page.tables:
        parts.append("<div class=tables>" + "".join(_table(name, rows) for name, rows in page.tables) + "</div>")
    if page.commands:
        parts.append("<h2>Commands</h2><pre>" + _text("\n".join(page.commands)) + "</pre>")
    legend = f"<p>{_tags(page.legend)}</p>" if page.legend else ""
    parts += [f"<h2>Reports</h2>{legend}", *map(_card, page.cards)]
    atomic_write_text(path, "\n".join(parts) + "\n")


def _table(name: str, rows: Mapping[str, Sequence[str | Bar]]) -> str:
    body = "".join(f"<tr><td>{_text(row)}</td>" + "".join(map(_cell, cells)) + "</tr>" for row, cells in rows.items())
    return f"<div><h2>{_text(name)}</h2><table>{body}</table></div>"


def _cell(cell: str | Bar) -> str:
    if isinstance(cell, Bar):
        return f"<td><div class=bar style='width:{12 * cell.part:.2f}rem'></div></td>"
    return f"<td>{_text(cell)}</td>"


def _card(card: Card) -> str:
    images = "".join(f"<img alt='' src='{_source(image)}'>" for image in card.images)
    tags = _tags(card.tags)
    notes = f"<p class=note>{_text(card.notes)}</p>" if card.notes else ""
    truth = "" if card.truth is None else f"<div><h3>Reference</h3><p>{_text(card.truth)}</p></div>"
    return (
        f"<div class=card><div>{images}<p class=note>{_text(card.title)}</p>{notes}</div>"
        f"<div><h3>{_text(card.heading)}</h3><p>{_text(card.report) or '(empty)'}</p>{tags}</div>{truth}</div>"
    )


def _tags(tags: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<span class='tag {kind}'>{_text(name)}</span>" for name, kind in tags)


def _source(image: Image.Image) -> str:
    small = image.convert("L")
    small.thumbnail((480, 480))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _text(text: str) -> str:
    return html.escape(text)
