"""Reports for files and folders of images."""

from __future__ import annotations

import csv
import io
import json
import signal
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from emrrg_cli.console import progress_bar
from emrrg_cli.decoding.reports import load_generator, study_pixels
from emrrg_cli.errors import UsageError
from emrrg_cli.files import append_jsonl, atomic_write_text, check_writable
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.notes import image_notes
from emrrg_cli.imaging.read import read_image
from emrrg_cli.recipe.schema import FinetuneRecipe
from emrrg_cli.reporting.page import Card, Page, write_page
from emrrg_cli.reporting.tables import DISCLAIMER
from emrrg_cli.signals import interrupted_by
from emrrg_cli.silence_libraries import quiet_libraries

PAGE_LIMIT = 60  # films shown on the page


@dataclass
class Written:
    """Outcome of `run_generation`: rows with `path`, `report`, `seconds`, `notes`; skipped files with their reasons."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    pictures: dict[str, Image] = field(default_factory=dict)  # small, of the first files, for the page
    skipped_file: Path = Path("skipped.jsonl")  # where all the skipped files are listed

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        skipped = [{"path": path, "reason": reason} for path, reason in self.skipped]
        return {"note": DISCLAIMER, "reports": self.rows, "skipped": skipped, "seconds": round(self.seconds, 3)}


def run_generation(
    files: list[Path],
    run_dir: Path,
    recipe: FinetuneRecipe,
    output: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Written:
    """Writes a report for each readable image and leaves `reports.jsonl`, `reports.csv` and `page.html` in `output`.

    Rows are put in safety batch by batch in `reports.jsonl.partial`, which becomes `reports.jsonl` at the end, also
    when the run is interrupted. Earlier reports are replaced by a whole run alone: one that is cut short, or that finds
    no readable image, leaves them and what belongs to them as they were, and its own in `.partial`.

    Raises:
        UsageError: when `output` already holds reports, or those of a run that was killed, and `overwrite` is false;
            or when it cannot be written.
        RunError: when the model cannot be loaded.
        Interrupted: after SIGINT or SIGTERM; what was written so far is kept.
    """
    check_writable(output)
    partial = output / "reports.jsonl.partial"
    earlier = (output / "reports.jsonl").exists()
    if (earlier or partial.exists()) and not overwrite:
        where = output if earlier else f"{partial}, from a run that was cut short,"
        raise UsageError(f"{where} already holds reports", hint="Give --overwrite, or another --output.")
    quiet_libraries()
    generator = load_generator(run_dir, device=device, recipe=recipe)
    partial.unlink(missing_ok=True)
    result = Written()
    whole = False
    began = time.perf_counter()

    def stopped() -> str:
        done = len(result.rows) + len(result.skipped)
        where = f"{partial}, the earlier ones as they were" if earlier else output
        return f"stopped after {done} of {len(files)} files; {len(result.rows)} reports are in {where}"

    try:
        with (
            interrupted_by(signal.SIGINT, signal.SIGTERM, message=stopped),
            progress_bar("writing reports", len(files)) as advance,
        ):
            for batch in _readable_batches(files, recipe, result, advance):
                started = time.perf_counter()
                reports = generator.generate_pixels([pixels for _, pixels, _ in batch], first=len(result.rows))
                seconds = round((time.perf_counter() - started) / len(batch), 4)
                for (path, _, notes), report in zip(batch, reports, strict=True):
                    row = {"path": _name(path), "report": report, "seconds": seconds, "notes": list(notes)}
                    append_jsonl(partial, row)
                    result.rows.append(row)
                advance(len(batch))
        whole = True
    finally:
        result.seconds = time.perf_counter() - began
        _finish(output, partial, result, replace=not earlier or (whole and bool(result.rows)))
    return result


def _readable_batches(
    files: list[Path], recipe: FinetuneRecipe, result: Written, advance: Any
) -> Iterable[list[tuple[Path, torch.Tensor, tuple[str, ...]]]]:
    """Batches of a file, its pixels and what should be said about it."""
    batch: list[tuple[Path, torch.Tensor, tuple[str, ...]]] = []
    for file in files:
        try:
            with warnings.catch_warnings():
                # Pillow warns about odd metadata; an image either decodes or is reported.
                warnings.simplefilter("ignore")
                image = read_image(file)
            if len(result.pictures) < PAGE_LIMIT:
                small = image.copy()
                small.thumbnail((480, 480))
                result.pictures[_name(file)] = small
            batch.append((file, study_pixels(image, recipe.model.encoder.image_size), image_notes(image)))
        except ImageError as error:
            result.skipped.append((_name(file), ": ".join(filter(None, [error.reason, error.detail]))))
            advance(1)
            continue
        if len(batch) == recipe.generation.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _name(path: Path) -> str:
    # Bytes of a file name that are no UTF-8 fit into no JSON file.
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _finish(output: Path, partial: Path, result: Written, *, replace: bool) -> None:
    result.skipped_file = output / ("skipped.jsonl" if replace else "skipped.jsonl.partial")
    if result.skipped:
        lines = [json.dumps({"path": path, "reason": reason}, ensure_ascii=False) for path, reason in result.skipped]
        atomic_write_text(result.skipped_file, "\n".join(lines) + "\n")
    else:
        result.skipped_file.unlink(missing_ok=True)
    if not result.rows or not replace:
        return
    (output / "skipped.jsonl.partial").unlink(missing_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["path", "report", "seconds", "notes"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"notes": "; ".join(row["notes"])} for row in result.rows)
    atomic_write_text(output / "reports.csv", table.getvalue())
    partial.replace(output / "reports.jsonl")
    cards = [
        Card(row["path"], [result.pictures[row["path"]]], row["report"], notes="; ".join(row["notes"]))
        for row in result.rows
        if row["path"] in result.pictures
    ]
    intro = f"{len(result.rows)} reports; the first {len(cards)} are shown. All are in reports.jsonl and reports.csv."
    write_page(output / "page.html", Page("Generated reports", intro, cards))
