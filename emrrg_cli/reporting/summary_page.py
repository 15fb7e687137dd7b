"""Writes the summary of a dataset directory to files: a page, a contact sheet and JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from emrrg_cli.console import printable
from emrrg_cli.datasets.summary import SYNTHETIC, Example, Summary
from emrrg_cli.errors import UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.output_paths import check_writable
from emrrg_cli.imaging.base import EncodedImage, ImageError
from emrrg_cli.imaging.read import read_image
from emrrg_cli.reporting.contact_sheet import Tile, draw_contact_sheet
from emrrg_cli.reporting.page import Bar, Card, Page, write_page
from emrrg_cli.reporting.summary_sections import remarks, sections, title
from emrrg_cli.reporting.tables import DISCLAIMER
from emrrg_cli.vocabulary import UNKNOWN_VIEW

PAGE, SHEET, DATA = "page.html", "sheet.png", "summary.json"

_SIDE = 800  # of a decoded image, pixels


def check_summary(output: Path) -> None:
    """Checks that a summary can be written to `output`.

    Raises:
        UsageError: `output` has other content or is a file.
        RunError: `output` is read-only.
    """
    check_writable(output)
    if output.is_dir() and any(output.iterdir()) and not (output / DATA).is_file():
        raise UsageError(f"{output} has other files than those of a summary", hint="Give another --output.")


def write_summary(summary: Summary, output: Path) -> None:
    """Writes `summary.json`, `sheet.png` (if there are example studies) and `page.html`; replaces older files.

    Raises:
        UsageError: As `check_summary`.
        RunError: A file cannot be written.
    """
    check_summary(output)
    atomic_write_text(output / DATA, json.dumps(summary.as_dict(), indent=2, ensure_ascii=False) + "\n")
    shown = [(example, [_decoded(image) for image in example.images]) for example in summary.examples]
    intro = " ".join([*remarks(summary), f"From {printable(summary.root)}."])
    if shown:
        tiles = [
            Tile(printable(one.study_id), _about(one), images, printable(" ".join(one.report.split())))
            for one, images in shown
        ]
        note = "Synthetic images, no patient. " if summary.is_synthetic else ""
        draw_contact_sheet(output / SHEET, title(summary), note + DISCLAIMER, tiles)
    else:
        (output / SHEET).unlink(missing_ok=True)
    tables = [(section.name, _with_heads(section.heads, section.rows)) for section in sections(summary)]
    cards = [
        Card(
            f"{printable(example.study_id)} · {_about(example)}",
            [image for image in images if image is not None],
            example.report,
            heading="Report",
            notes="cannot be decoded" if None in images else "",
        )
        for example, images in shown
    ]
    write_page(output / PAGE, Page(title(summary), intro, cards, tables))


def _about(example: Example) -> str:
    views = [printable(view) for view in dict.fromkeys(example.views) if view != UNKNOWN_VIEW]
    return " · ".join([example.split, *views, *(["synthetic"] if example.source == SYNTHETIC else [])])


def _with_heads(heads: Sequence[str], rows: Mapping[str, Sequence[str | Bar]]) -> dict[str, Sequence[str | Bar]]:
    return {heads[0]: list(heads[1:]), **rows}


def _decoded(image: EncodedImage) -> Image.Image | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata
            decoded = read_image(image.data)
    except ImageError:
        return None
    decoded.thumbnail((_SIDE, _SIDE))
    return decoded
