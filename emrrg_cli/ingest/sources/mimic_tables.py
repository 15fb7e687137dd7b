"""Reads the tables of MIMIC-CXR-JPG: the images, split, views and labels of each study."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.views import view_name
from emrrg_cli.ingest.sources.chexpert_labels import LABELS, NOT_MENTIONED, LabelRows
from emrrg_cli.ingest.sources.table import CsvFile, whole_number
from emrrg_cli.ingest.study import ImportLog
from emrrg_cli.vocabulary import SPLIT_NAMES, SPLITS, UNKNOWN_VIEW, Split

Labeler = Literal["chexpert", "negbio"]


@dataclass(slots=True)
class _Listed:
    """A study while its rows are read."""

    split: Split
    subject: int
    images: list[str] = field(default_factory=list)
    twice: list[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class ListedStudy:
    """A study of the tables.

    Attributes:
        subject, study: Numbers of the patient and the study.
        images: Name without extension, and view, of each image.
        twice: Names that are listed a second time, with the line.
    """

    split: Split
    subject: int
    study: int
    images: tuple[tuple[str, str], ...]
    twice: tuple[tuple[str, int], ...]


class MimicTables:
    """The tables, joined in memory, because their rows are in different orders.

    Args:
        root: Folder with `mimic-cxr-2.0.0-split.csv.gz`, `-metadata` and the labels; gzipped or plain.
        labeler: Labeler whose labels are read.
        split: Whether to read the official split; without it there are only views and labels.

    Attributes:
        remarks: Remarks about missing tables.

    Raises:
        UsageError: The table of the split does not exist.
        RunError: A table has the wrong format, or a patient is in two splits.
    """

    def __init__(self, root: Path, labeler: Labeler, *, split: bool = True) -> None:
        self._root = root
        self.remarks: list[str] = []
        self._studies: dict[int, _Listed] = {}
        self._skipped: list[tuple[str, str, str]] = []
        if split:
            self._read_split()
        self._views = self._read_views()
        self._labels = self._read_labels(labeler)

    def count(self, limit: int | None) -> int:
        """Returns the number of studies that `studies` yields plus the rows that `skip_rows` counts."""
        counts = Counter(study.split for study in self._studies.values()).values()
        return sum(count if limit is None else min(count, limit) for count in counts) + len(self._skipped)

    def skip_rows(self, log: ImportLog) -> None:
        """Counts the rows of the split that cannot be used."""
        for reason, study_id, detail in self._skipped:
            log.read += 1
            log.skip_study(reason, study_id, detail=detail)

    def studies(self, limit: int | None) -> Iterator[ListedStudy]:
        """Yields the first `limit` studies of train, validation and test, each by patient and study."""
        for split in SPLITS:
            chosen = ((study.subject, number) for number, study in self._studies.items() if study.split == split)
            for subject, number in sorted(chosen)[:limit]:
                study = self._studies[number]
                images = tuple((dicom, self.view(dicom)) for dicom in study.images)
                yield ListedStudy(split, subject, number, images, tuple(study.twice))

    def view(self, dicom: str) -> str:
        """Returns the projection of an image, or `unknown`."""
        return self._views.get(dicom, UNKNOWN_VIEW)

    def labels(self, study: int | None) -> str:
        """Returns the encoded labels of a study."""
        return self._labels.get(study) or NOT_MENTIONED

    # Reading.

    def _table(self, kind: str) -> Path | None:
        endings = ("csv", "csv.gz")
        return next((path for end in endings for path in sorted(self._root.glob(f"mimic-cxr-*-{kind}.{end}"))), None)

    def _read_split(self) -> None:
        path = self._table("split")
        if path is None:
            raise UsageError(
                f"no mimic-cxr-2.0.0-split.csv.gz in {self._root}",
                hint="ROOT is the folder of MIMIC-CXR-JPG. If you have R2Gen's file, pass it with --annotation.",
            )
        seen: set[str] = set()
        twice: dict[int, list[tuple[str, int]]] = {}
        splits: dict[int, Split] = {}
        for line, cells in CsvFile(path, ("dicom_id", "study_id", "subject_id", "split")):
            where = f"{path.name}:{line}"
            if cells is None:
                self._skipped.append(("row and header differ in length", where, ""))
                continue
            dicom, study, subject, split = cells[0], whole_number(cells[1]), whole_number(cells[2]), cells[3].lower()
            if not dicom or study is None or subject is None:
                self._skipped.append(("no study id", where, "dicom_id, study_id or subject_id is not an id"))
            elif split not in SPLIT_NAMES:
                self._skipped.append(("unknown split", str(study), f"{where}: {printable(split) or 'empty'}"))
            elif dicom in seen:
                twice.setdefault(study, []).append((dicom, line))
            else:
                seen.add(dicom)
                named = SPLIT_NAMES[split]
                _same(path, f"patient {subject} is in two splits", splits.setdefault(subject, named), named)
                listed = self._studies.setdefault(study, _Listed(splits[subject], subject))
                _same(path, f"study {study} has two patients", listed.subject, subject)
                listed.images.append(dicom)
        for study, images in twice.items():
            if study in self._studies:
                self._studies[study].twice = images
            else:
                self._skipped.append(("id seen before", str(study), "its images belong to another study"))

    def _read_views(self) -> dict[str, str]:
        path = self._table("metadata")
        if path is None:
            self.remarks.append("No mimic-cxr-2.0.0-metadata.csv.gz: the views are unknown.")
            return {}
        views: dict[str, str] = {}
        for _, cells in CsvFile(path, ("dicom_id", "ViewPosition")):
            if cells is not None and cells[1]:
                views.setdefault(cells[0], sys.intern(view_name(cells[1])))
        return views

    def _read_labels(self, labeler: Labeler) -> LabelRows:
        labels = LabelRows()
        path = self._table(labeler)
        if path is None:
            self.remarks.append(f"No mimic-cxr-2.0.0-{labeler}.csv.gz: the studies have no labels.")
            return labels
        for line, cells in CsvFile(path, ("study_id", *LABELS)):
            where = f"{path}:{line}"
            study = None if cells is None else whole_number(cells[0])
            if cells is None:
                labels.skip(where, "row and header differ in length")
            elif study is None:
                labels.skip(where, f"{cells[0] or 'empty'} is not a study id")
            else:
                labels.add(study, cells[1:], where)
        self.remarks += labels.remarks(path.name)
        return labels


def _same(path: Path, message: str, first: object, second: object) -> None:
    if first != second:
        raise RunError(f"{path}: {message}, {first} and {second}")
