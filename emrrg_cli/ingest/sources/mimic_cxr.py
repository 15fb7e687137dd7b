"""Reads MIMIC-CXR: the images and tables of MIMIC-CXR-JPG with the notes of MIMIC-CXR."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.directory import Column
from emrrg_cli.errors import UsageError
from emrrg_cli.ingest.sources.annotation import Annotation, AnnotationRow
from emrrg_cli.ingest.sources.chexpert_labels import COLUMNS, label_columns
from emrrg_cli.ingest.sources.image_paths import find_image, require_folder, split_found
from emrrg_cli.ingest.sources.mimic_note import Note
from emrrg_cli.ingest.sources.mimic_reports import MimicReports, ReportError, open_reports
from emrrg_cli.ingest.sources.mimic_tables import Labeler, MimicTables
from emrrg_cli.ingest.sources.table import whole_number
from emrrg_cli.ingest.sources.texts import with_text
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study
from emrrg_cli.vocabulary import Section

NAME = "mimic_cxr"
_REPORTS = ("mimic-cxr-reports", "mimic-cxr-reports.zip", "mimic_cxr_sectioned.csv", "mimic_cxr_sectioned.csv.gz")
_SUFFIXES = (".jpg", ".png", ".dcm")  # MIMIC-CXR-JPG, copies of a smaller size, MIMIC-CXR
_IMAGE = re.compile(r"(?:.*/)?(p\d+/p(\d+)/s(\d+)/([^/]+))\.\w+")

_COLUMNS = COLUMNS | {
    "indication": Column("text", "section of the note: indication or history"),
    "comparison": Column("text", "section of the note"),
    "technique": Column("text", "section of the note"),
}
_ABOUT = (
    "Studies of MIMIC-CXR-JPG and MIMIC-CXR (Johnson et al., Scientific Data 2019; PhysioNet), under the PhysioNet "
    "credentialed health data use agreement, which does not allow redistribution."
)


class MimicCxrSource:
    """MIMIC-CXR-JPG as PhysioNet distributes it, with the notes of `mimic-cxr-reports`.

    Studies, their images and the official split come from `mimic-cxr-2.0.0-split.csv.gz`, views from `-metadata`,
    labels from `-chexpert` or `-negbio`; each gzipped or plain. Images are `files/p10/p10000032/s50414267/*.jpg` (or
    `.png`, `.dcm`). Ids are the numbers in the tables.

    `report` is the findings section. If a note has neither findings nor impression, it is the text after the first
    paragraph of the last section; see `read_note`.

    Args:
        root: Folder of MIMIC-CXR-JPG.
        section: Section that becomes the report; `report`: as above, and studies without it are skipped.
        reports: Folder or zip of the notes, or a table of their sections (`open_reports`); None: one of `_REPORTS` in
            `root`, or notes beside the images.
        annotation: R2Gen's file. Its rows then define the studies: texts, images and splits. It has one row for each
            image, so its ids are image ids. Tables and notes add views, labels and sections if they exist.
        labeler: Labeler whose labels are read.
        limit: Number of studies to read from the start of each split; None: all.

    Raises:
        UsageError: A folder or file does not exist.
        RunError: A file cannot be read or has the wrong format, or a patient is in two splits.
    """

    name = NAME
    columns = _COLUMNS
    about = _ABOUT

    def __init__(
        self,
        root: Path,
        *,
        section: Section = "report",
        reports: Path | None = None,
        annotation: Path | None = None,
        labeler: Labeler = "chexpert",
        limit: int | None = None,
    ) -> None:
        require_folder(root)
        self.root = root.resolve()
        self.image_folders = (self.root / "files", self.root / "images", self.root)
        self._section, self._limit = section, limit
        self._reports = _find_reports(root, reports, needed=annotation is None)
        self._annotation = Annotation(annotation) if annotation else None
        self._tables = MimicTables(self.root, labeler, split=annotation is None)

    def __len__(self) -> int:
        return (self._tables if self._annotation is None else self._annotation).count(self._limit)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields the studies of train, validation and test, each by patient and study or in the annotation's order.

        Rows that cannot be used, and studies whose note is missing, unreadable or without text, are skipped and
        counted in `log`. Missing images are listed in `Study.problems`.
        """
        log.remarks += self._tables.remarks
        if self._annotation is None:
            studies = self._listed(log)
        else:
            studies = map(self._annotated, self._annotation.unique(self._limit, log))
        yield from with_text(studies, self._section, log)

    def _listed(self, log: ImportLog) -> Iterator[Study]:
        self._tables.skip_rows(log)
        for listed in self._tables.studies(self._limit):
            log.read += 1
            study_id = str(listed.study)
            folder = f"p{str(listed.subject)[:2]}/p{listed.subject}/s{listed.study}"
            try:
                note = self._reports.note(listed.subject, listed.study) if self._reports else None
            except ReportError as error:
                log.skip_study("report cannot be read", study_id, detail=str(error))
                continue
            if note is None:
                log.skip_study("report missing", study_id, path=f"{folder}.txt")
                continue
            found = [(self._find(*_names(f"{folder}/{dicom}")), view) for dicom, view in listed.images]
            images, views, problems = split_found(found)
            yield Study(
                study_id=study_id,
                patient_id=str(listed.subject),
                split=listed.split,
                image_paths=images,
                views=views,
                findings=note.findings or None,
                impression=note.impression or None,
                report=note.findings or note.last_paragraph or None,
                source=self.name,
                problems=(
                    *problems,
                    *(ImageProblem(f"{dicom}.jpg", "listed twice", f"line {line}") for dicom, line in listed.twice),
                ),
                extra=self._extra(listed.study, note),
            )

    def _annotated(self, row: AnnotationRow) -> Study:
        matches = [_IMAGE.fullmatch(path.replace("\\", "/")) for path in row.image_paths]
        # The path as it is; then, from a file of another machine or with images of another format, as in the release.
        named = [_names(match[1]) if match else () for match in matches]
        images, views, problems = split_found(
            (self._find(path, *names), self._tables.view(match[4] if match else row.study_id))
            for path, names, match in zip(row.image_paths, named, matches, strict=True)
        )
        first = next(filter(None, matches), None)
        study = whole_number(row.other.get("study_id", "")) or (int(first[3]) if first else None)
        subject = whole_number(row.patient_id or "") or (int(first[2]) if first else None)
        note = None
        if study is not None and subject is not None and self._reports is not None:
            try:
                note = self._reports.note(subject, study)
            except ReportError:
                note = None  # the annotation has the text
        report = row.report.strip() and row.report
        return Study(
            study_id=row.study_id,
            patient_id=row.patient_id or (first[2] if first else None),
            split=row.split,
            image_paths=images,
            views=views,
            # R2Gen's texts are findings.
            findings=(note.findings if note else "") or report or None,
            impression=(note.impression if note else "") or None,
            report=report or None,
            source=self.name,
            problems=problems,
            extra=self._extra(study, note or Note()),
        )

    def _find(self, *paths: str) -> Path | ImageProblem:
        return find_image(paths, self.root, self.image_folders)

    def _extra(self, study: int | None, note: Note) -> dict[str, Any]:
        return {
            **label_columns(self._tables.labels(study)),
            "indication": note.indication or None,
            "comparison": note.comparison or None,
            "technique": note.technique or None,
        }


def _names(stem: str) -> tuple[str, ...]:
    return tuple(f"{stem}{suffix}" for suffix in _SUFFIXES)


def _find_reports(root: Path, reports: Path | None, *, needed: bool) -> MimicReports | None:
    if reports is not None:
        return open_reports(reports)
    for name in _REPORTS:
        if (root / name).exists():
            return open_reports(root / name)
    # There are 65,000 patients, so only a few are checked.
    if any(next(patient.glob("s*.txt"), None) for patient in islice(root.glob("files/p*/p*"), 20)):
        return open_reports(root)
    if needed:
        raise UsageError(
            f"no notes in {root}: neither {_REPORTS[0]} nor {_REPORTS[1]}",
            hint="The notes are part of MIMIC-CXR, not of MIMIC-CXR-JPG. Name their folder, zip or table of sections "
            "with --reports.",
        )
    return None
