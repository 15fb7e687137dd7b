"""Reports for the studies in files and folders."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from emrrg_cli.console import progress_bar
from emrrg_cli.decoding.outputs import Output, Row, Shard, fingerprint_of
from emrrg_cli.decoding.reports import load_generator, study_pixels
from emrrg_cli.decoding.studies import StudyFiles, path_name
from emrrg_cli.decoding.writer import Studies, WrittenReport
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.locks import locked
from emrrg_cli.files.output_paths import check_writable
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.notes import image_notes
from emrrg_cli.imaging.read import read_image
from emrrg_cli.labeling.labeler import label_report
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.reporting.page import Card, Page, write_page
from emrrg_cli.reporting.tables import DISCLAIMER
from emrrg_cli.signals import interrupted_by
from emrrg_cli.silence_libraries import silence_libraries

PAGE_LIMIT = 60  # films shown on the page


@dataclass
class Written:
    """Outcome of `run_generation`: the records, and skipped files with their reasons."""

    rows: list[Row] = field(default_factory=list)  # those of earlier runs among them
    earlier: int = 0  # records that were there before
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    pictures: dict[str, Image] = field(default_factory=dict)  # small, of the first files, for the page
    skipped_file: Path = Path("skipped.jsonl")  # where all the skipped files are listed

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        skipped = [{"path": path, "reason": reason} for path, reason in self.skipped]
        return {"note": DISCLAIMER, "reports": self.rows, "skipped": skipped, "seconds": round(self.seconds, 3)}


def run_generation(
    studies: Sequence[StudyFiles],
    run_dir: Path,
    recipe: FinetuneRecipe,
    output: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    shard: Shard | None = None,
) -> Written:
    """Writes a report for each study with a readable image into `reports.jsonl` (and `reports.csv`, `page.html`).

    Records are saved as soon as they are written, in `reports.jsonl.partial`, which becomes `reports.jsonl` at the end,
    also when the run is interrupted. Studies that an earlier run with the same model and options has written are
    skipped. With `overwrite`, earlier reports are replaced only after the new run completes.

    Args:
        shard: write only this part of the studies, into files of its own, with a `.done` file at the end.

    Raises:
        UsageError: when `output` holds reports of another model or other options and `overwrite` is false, or when it
            cannot be written.
        RunError: when another process writes there, the model cannot be loaded, or the output is removed or
            leads elsewhere by a link.
        Interrupted: after SIGINT or SIGTERM; what was written so far is kept.
    """
    check_writable(output)
    place = Output(output, shard, fingerprint_of(run_dir, recipe))
    with locked(output if shard is None else place.reports):
        place.open()
        own = list(studies) if shard is None else list(studies[shard.index :: shard.count])
        return _Run(own, run_dir, recipe, place, overwrite).run(device)


@dataclass
class ReadStudy:
    """The images of a study.

    Args:
        pixels: uint8 `[views, size, size]`; None where no image can be read.
        used: the files that were read.
        notes: what a reader should know about them.
        skipped: files that could not be read, with the reasons.
        picture: the first image, small.
    """

    study: StudyFiles
    pixels: torch.Tensor | None
    used: list[Path]
    notes: list[str]
    skipped: list[tuple[str, str]]
    picture: Image | None


def read_study(study: StudyFiles, size: int, most: int | None) -> ReadStudy:
    """Reads the images of a study that can be read, the first `most` of them."""
    read = ReadStudy(study, None, [], [], [], None)
    views: list[torch.Tensor] = []
    for file in study.files:
        if len(views) == most:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about odd metadata
                image = read_image(file)
            pixels = study_pixels(image, size)
        except ImageError as error:
            read.skipped.append((path_name(file), ": ".join(filter(None, [error.reason, error.detail]))))
            continue
        if read.picture is None:
            read.picture = image.copy()
            read.picture.thumbnail((480, 480))
        views.append(pixels)
        read.notes += [note for note in image_notes(image) if note not in read.notes]
        read.used.append(file)
    if views:
        read.pixels = torch.cat(views)
        if read.skipped:
            read.notes.append(f"{len(read.skipped)} of {len(study.files)} images could not be read")
    return read


class _Run:
    def __init__(
        self, studies: list[StudyFiles], run_dir: Path, recipe: FinetuneRecipe, place: Output, overwrite: bool
    ) -> None:
        self.studies, self.run_dir, self.recipe, self.place = studies, run_dir, recipe, place
        self.result = Written(rows=[] if overwrite else place.earlier_rows())
        self.result.earlier = len(self.result.rows)
        self.replaces = overwrite and place.reports.exists()
        self.reading: dict[str, ReadStudy] = {}  # studies in decoding
        self.threads = 0

    def run(self, device: str) -> Written:
        result, place = self.result, self.place
        done = {row["study"] for row in result.rows}
        left = [study for study in self.studies if study.name not in done]
        silence_libraries()
        whole, began = False, time.perf_counter()
        try:
            if left:
                generator = load_generator(self.run_dir, device=device, recipe=self.recipe)
                # Beside a GPU the processor is free to read images; on a CPU that decodes it is not.
                self.threads = min(8, os.cpu_count() or 1) if is_gpu(generator) else 0
                if not result.earlier:
                    place.partial.unlink(missing_ok=True)
                place.done_marker.unlink(missing_ok=True)
                began = time.perf_counter()
                with (
                    interrupted_by(signal.SIGINT, signal.SIGTERM, message=self._stopped),
                    progress_bar("writing reports", len(left)) as advance,
                ):
                    self._write(generator, left, advance)
            whole = True
        finally:
            result.seconds = time.perf_counter() - began
            if left or place.partial.exists():
                self._finish(whole)
        if whole and place.shard is not None:
            atomic_write_text(place.done_marker, f"{len(result.rows)} reports, {len(result.skipped)} skipped\n")
        return result

    def _stopped(self) -> str:
        result, place = self.result, self.place
        written = len(result.rows) - result.earlier
        where = f"{place.partial}, the earlier ones as they were" if self.replaces else place.folder
        done = written + len(result.skipped)
        return f"stopped after {done} of {len(self.studies) - result.earlier} files; {written} reports are in {where}"

    def _write(self, generator: Any, left: list[StudyFiles], advance: Callable[[int], None]) -> None:
        last = time.perf_counter()
        for done in generator.write(self._readable(left, advance)):
            now = time.perf_counter()
            seconds, last = round((now - last) / len(done), 4), now
            for report in done:
                row = self._record(report, seconds)
                self.place.append(row)
                self.result.rows.append(row)
            advance(len(done))

    def _record(self, report: WrittenReport, seconds: float) -> Row:
        read = self.reading.pop(report.key)
        study, files = read.study, read.used
        labels = label_report(report.text)
        return {
            "study": study.name,
            "path": path_name(files[0]),
            "files": [path_name(file) for file in files],
            "views": [view or None for file, view in zip(study.files, study.views, strict=True) if file in files],
            "report": report.text,
            "findings": {name: label for name, label in labels.items() if label is not None},
            "log_probability": round(report.log_probability, 4),
            **({} if report.confidence is None else report.confidence.as_dict()),
            "seconds": seconds,
            "notes": read.notes,
            "fingerprint": self.place.fingerprint,
        }

    def _readable(self, studies: list[StudyFiles], advance: Callable[[int], None]) -> Iterator[Studies]:
        """Studies with at least one readable image, a batch at a time."""
        size, most = self.recipe.generation.batch_size, self.recipe.data.max_views
        image_size = self.recipe.model.encoder.image_size
        batch: list[tuple[StudyFiles, torch.Tensor]] = []
        for read in _ahead(lambda study: read_study(study, image_size, most), studies, self.threads):
            self.result.skipped += read.skipped
            if read.pixels is None:
                advance(1)
                continue
            if len(self.result.pictures) < PAGE_LIMIT and read.picture is not None:
                self.result.pictures[path_name(read.used[0])] = read.picture
            self.reading[read.study.name] = read
            batch.append((read.study, read.pixels))
            if len(batch) == size:
                yield _joined(batch)
                batch = []
        if batch:
            yield _joined(batch)

    def _finish(self, whole: bool) -> None:
        result, place = self.result, self.place
        order = {study.name: number for number, study in enumerate(self.studies)}
        result.rows.sort(key=lambda row: order.get(row["study"], -1))  # those of other folders come first
        keep_partial = self.replaces and not (whole and result.rows)
        partial_list = place.skipped.with_name(place.skipped.name + ".partial")
        result.skipped_file = partial_list if keep_partial else place.skipped
        if result.skipped:
            lines = [json.dumps({"path": p, "reason": reason}, ensure_ascii=False) for p, reason in result.skipped]
            atomic_write_text(result.skipped_file, "\n".join(lines) + "\n")
        else:
            result.skipped_file.unlink(missing_ok=True)
        place.finish(result.rows, keep_partial=keep_partial)
        if result.rows and not keep_partial:
            partial_list.unlink(missing_ok=True)
            if place.shard is None:
                self._write_page()

    def _write_page(self) -> None:
        result = self.result
        cards = [
            Card(row["path"], [result.pictures[row["path"]]], row["report"], notes="; ".join(row["notes"]))
            for row in result.rows
            if row["path"] in result.pictures
        ]
        intro = (
            f"{len(result.rows)} reports; the first {len(cards)} are shown. All are in reports.jsonl and reports.csv."
        )
        write_page(self.place.folder / "page.html", Page("Generated reports", intro, cards))


def _joined(batch: list[tuple[StudyFiles, torch.Tensor]]) -> Studies:
    names = [study.name for study, _ in batch]
    views = torch.tensor([len(pixels) for _, pixels in batch])
    return Studies(names, [study.number for study, _ in batch], torch.cat([pixels for _, pixels in batch]), views)


def _ahead(read: Callable[[StudyFiles], ReadStudy], studies: list[StudyFiles], threads: int) -> Iterator[ReadStudy]:
    """Reads studies in order, with `threads` a few of them ahead of the one that is asked for."""
    if not threads:
        yield from map(read, studies)
        return
    waiting: deque[Future[ReadStudy]] = deque()
    rest = iter(studies)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for study in islice(rest, 4 * threads):
                waiting.append(pool.submit(read, study))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(read, study) for study in islice(rest, 1))
                yield done
        finally:
            for future in waiting:
                future.cancel()


def is_gpu(generator: Any) -> bool:
    """Whether a generator computes on a GPU."""
    return getattr(getattr(generator, "device", None), "type", "cpu") == "cuda"
