"""Turns studies into records: reads images, writes reports, and reads findings from them, study by study."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from emrrg_cli.decoding.cards import NO_PAGE, PageOptions, StudyCard, pictures_with_maps
from emrrg_cli.decoding.outputs import Row
from emrrg_cli.decoding.read_studies import ReadStudy, read_studies, read_study
from emrrg_cli.decoding.studies import StudyFiles, path_name
from emrrg_cli.decoding.writer import Studies, WrittenReport
from emrrg_cli.labeling.labeler import label_report
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.reporting.gallery import Pictures
from emrrg_cli.vocabulary import ContextField

_CARDS = 16  # cards made at a time; more need more memory and are not faster


@dataclass(frozen=True)
class StudyResult:
    """The result of a study.

    Args:
        study: name of the study.
        row: record of the study; None if none of its images could be read.
        skipped: files that could not be read, with the reasons.
    """

    study: str
    row: Row | None
    skipped: list[tuple[str, str]] = field(default_factory=list)


class WritesReports(Protocol):
    """An object that writes reports, such as a `Generator`."""

    def write(self, studies: Iterable[Studies]) -> Iterator[list[WrittenReport]]:
        """Yields reports as soon as they are finished, not always in the order of the studies."""

    def ground(
        self,
        pixels: Sequence[torch.Tensor],
        reports: Sequence[WrittenReport],
        contexts: Sequence[Mapping[ContextField, str]],
        projections: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Computes maps of where the model looked in each sentence of each report."""


class StudyWriter:
    """Writes the records of studies with a model. Only studies in progress are kept in memory.

    Args:
        page: options of the page, for which the first readable studies get cards.
        workers: number of processes that read images ahead; 0: this process reads them.
    """

    def __init__(
        self, generator: WritesReports, recipe: FinetuneRecipe, page: PageOptions = NO_PAGE, *, workers: int = 0
    ) -> None:
        self.generator = generator
        self.recipe = recipe
        self.page = page
        self.workers = workers
        self._reading: dict[str, ReadStudy] = {}  # studies in decoding
        self._unreadable: list[StudyResult] = []
        self._pictured: list[tuple[ReadStudy, WrittenReport]] = []  # written, their cards not yet made

    def write(self, studies: Sequence[StudyFiles]) -> Iterator[list[StudyResult | StudyCard]]:
        """Yields results as soon as they are finished, not always in the order of the studies; cards follow later."""
        last = time.perf_counter()
        for done in self.generator.write(self._readable(studies)):
            now = time.perf_counter()
            seconds, last = round((now - last) / len(done), 4), now
            yield [*self._take_unreadable(), *(self._result(report, seconds) for report in done)]
            if len(self._pictured) >= min(self.recipe.generation.batch_size, _CARDS):
                yield [*self._cards()]
                last = time.perf_counter()  # the seconds of a report are only for its writing
        if self._unreadable or self._pictured:
            yield [*self._take_unreadable(), *self._cards()]

    def _take_unreadable(self) -> list[StudyResult]:
        taken, self._unreadable = self._unreadable, []
        return taken

    def _cards(self) -> Iterator[StudyCard]:
        taken, self._pictured = self._pictured, []
        for first in range(0, len(taken), _CARDS):
            some = taken[first : first + _CARDS]
            pictures = [Pictures(read.pictures) for read, _ in some]
            if self.page.grounding:
                pixels = [torch.from_numpy(read.pixels) for read, _ in some if read.pixels is not None]
                contexts = [read.study.context for read, _ in some]
                projections = torch.tensor([place for read, _ in some for place in read.projections])
                maps = self.generator.ground(pixels, [report for _, report in some], contexts, projections)
                pictures = [pictures_with_maps(one.images, its) for one, its in zip(pictures, maps, strict=True)]
            for (read, _), one in zip(some, pictures, strict=True):
                yield StudyCard(read.study.name, one)

    def _result(self, report: WrittenReport, seconds: float) -> StudyResult:
        read = self._reading.pop(report.key)
        if read.pictures:
            self._pictured.append((read, report))
        return StudyResult(report.key, study_record(read, report, seconds), read.skipped)

    def _readable(self, studies: Sequence[StudyFiles]) -> Iterator[Studies]:
        """Yields studies with at least one readable image, a batch at a time."""
        size = self.recipe.generation.batch_size
        image_size, most = self.recipe.model.encoder.image_size, self.recipe.data.max_views
        batch: list[ReadStudy] = []
        pictured = 0
        for read in read_studies(studies, image_size, most, self.workers, self.page.studies):
            if read.used and not read.pictures and pictured < self.page.studies:  # in place of an unreadable study
                read = read_study(read.study, image_size, most, pictured=True)
            if read.pixels is None:
                self._unreadable.append(StudyResult(read.study.name, None, read.skipped))
                continue
            pictured += 1
            self._reading[read.study.name] = read
            batch.append(read)
            if len(batch) == size:
                yield _joined(batch)
                batch = []
        if batch:
            yield _joined(batch)


def study_record(read: ReadStudy, report: WrittenReport, seconds: float) -> Row:
    """Makes the record of a study, without the fingerprint of the run."""
    study, files = read.study, read.used
    unused = [path_name(file) for file in study.files if file not in files]
    labels, distance = label_report(report.text), report.film_distance
    note = None if distance is None else distance.note
    return {
        "study": study.name,
        "path": path_name(files[0]),
        "files": [path_name(file) for file in files],
        **({"unused_files": unused} if unused else {}),
        **({"stamps": read.stamps} if any(read.stamps) else {}),
        "views": [view or None for file, view in zip(study.files, study.views, strict=True) if file in files],
        **({"context": dict(study.context)} if study.context else {}),
        "report": report.text,
        "findings": {name: label for name, label in labels.items() if label is not None},
        **(
            {"finding_probabilities": {name: round(p, 4) for name, p in report.findings.items()}}
            if report.findings
            else {}
        ),
        "log_probability": round(report.log_probability, 4),
        **({} if report.confidence is None else report.confidence.as_dict()),
        "seconds": seconds,
        **({} if distance is None else {"film_distance": round(distance.distance, 2)}),
        "notes": [*read.notes, *([note] if note else [])],
    }


def _joined(batch: list[ReadStudy]) -> Studies:
    pixels = [read.pixels for read in batch if read.pixels is not None]
    views = torch.tensor([len(images) for images in pixels])
    studies = [read.study for read in batch]
    names, numbers = [study.name for study in studies], [study.number for study in studies]
    projections = torch.tensor([place for read in batch for place in read.projections])
    return Studies(
        names,
        numbers,
        torch.from_numpy(np.concatenate(pixels)),
        views,
        [study.context for study in studies],
        projections,
    )


def reading_processes(device: torch.device, processes: int = 1) -> int:
    """Returns how many processes should read images for each of `processes` writing ones.

    If a GPU decodes, the CPU is free to read images ahead. On a CPU, reading takes a small part of the time.
    """
    from joblib import cpu_count

    return max(1, min(8, cpu_count() // processes)) if device.type == "cuda" else 0
