"""Writes the files of an evaluation: `scores.json`, one row per study as JSON and CSV, a page, and plots."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emrrg_cli.console import counted, printable
from emrrg_cli.errors import RunError
from emrrg_cli.evaluation.assess import Assessment
from emrrg_cli.evaluation.error_figures import study_rows
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.output_paths import directory_guard
from emrrg_cli.files.spreadsheets import spreadsheet_writer
from emrrg_cli.reporting.evaluation_page import draw_plots, write_evaluation_page

if TYPE_CHECKING:
    from emrrg_cli.datasets.report_dataset import ReportDataset

DATA = "scores.json"
PAGE = "page.html"
OWN_FILES = ("*.json", "*.jsonl*", "*.csv", "*.png", PAGE)  # glob patterns of all files that an evaluation writes
# Maximum number of studies with films on the page, side in pixels, JPEG quality: about 10 kB per film.
_FILMS, _SIDE, _QUALITY = 600, 320, 75
_STUDIES = 10_000  # on the page: with 100,000 it has 42 MB, and browsers stop responding


def write_assessment(
    folder: Path,
    result: dict[str, Any],
    predictions: Predictions,
    found: Assessment,
    films: ReportDataset | None = None,
) -> dict[str, Any]:
    """Writes `scores.json`, `studies.json`, `studies.csv`, `page.html` and the plots; returns the result.

    Args:
        folder: Directory to write to.
        result: Content of `scores.json`.
        predictions: Generated reports and references.
        found: Result of `assess`.
        films: Dataset with the films of the studies; None shows no films.

    Raises:
        RunError: A file cannot be written, or the folder was removed meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    require_folder = directory_guard(folder)
    labels = found.labels["chexbert" if "chexbert" in found.labels else "rules"]
    rows = study_rows(predictions, found.statistics, labels, found.train_reports)
    atomic_write_text(folder / "studies.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    atomic_write_text(folder / "studies.csv", _table(rows))
    pictures = _pictures(films, predictions.study_ids)
    what = f"{result['split']} split of {result['data']}" if "split" in result else str(result["predictions"])
    maker = f"Model: {printable(result['model'])}. " if "model" in result else ""
    intro = (
        f"{maker}{counted(len(predictions), 'study')}. studies.csv and studies.json contain one row per study; "
        f"{DATA} contains all figures."
    )
    if len(rows) > _STUDIES:
        intro += f" This page shows the first {_STUDIES:,} studies."
    shown = [row | {"pictures": views} for row, views in zip(rows, pictures, strict=True)][:_STUDIES]
    write_evaluation_page(folder / PAGE, f"Evaluation: {printable(what)}", intro, result, shown)
    draw_plots(folder, result)
    require_folder()
    atomic_write_text(folder / DATA, json.dumps(result, indent=2) + "\n")
    return result


def _table(rows: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    write = spreadsheet_writer(stream, list(rows[0]))
    for row in rows:
        write("; ".join(value) if isinstance(value, list) else value for value in row.values())
    return stream.getvalue()


def _pictures(films: ReportDataset | None, study_ids: Sequence[str]) -> list[list[str]]:
    """Returns the encoded films of each study for the page; an empty list if they are not known or cannot be read."""
    if films is None:
        return [[] for _ in study_ids]
    from PIL import Image

    from emrrg_cli.reporting.rendering import picture

    places = {study: number for number, study in enumerate(films.study_ids)}
    found: list[list[str]] = []
    for number, study in enumerate(study_ids):
        shown: list[str] = []
        if number < _FILMS and study in places:
            try:
                views = films[places[study]].pixels.numpy()
                shown = [picture(Image.fromarray(view), _SIDE, _QUALITY) for view in views]
            except RunError:
                shown = []
        found.append(shown)
    return found
