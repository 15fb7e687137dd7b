"""MIMIC-CXR: the images and tables of MIMIC-CXR-JPG with the notes of MIMIC-CXR."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

from emrrg_cli.data.report_text import ReportSection
from emrrg_cli.data.sources.annotation import Annotation, AnnotationRow
from emrrg_cli.data.sources.chexpert_labels import COLUMNS, LABELS, NOT_MENTIONED, encode_labels, label_columns
from emrrg_cli.data.sources.locate import locate
from emrrg_cli.data.sources.mimic_note import Note, read_note
from emrrg_cli.data.sources.mimic_reports import MimicReports, ReportError
from emrrg_cli.data.sources.scratch import SeenIds, scratch_database, scratch_errors
from emrrg_cli.data.sources.table import CsvFile
from emrrg_cli.data.sources.texts import lacks_text
from emrrg_cli.data.sources.views import view_name
from emrrg_cli.data.study import SPLITS, UNKNOWN_VIEW, Account, Column, ImageProblem, Split, Study, printable
from emrrg_cli.errors import RunError, UsageError

NAME = "mimic_cxr"
Labeler = Literal["chexpert", "negbio"]

_SPLIT_NAMES: dict[str, Split] = {"train": "train", "validate": "validation", "test": "test"}
_REPORTS = ("mimic-cxr-reports", "mimic-cxr-reports.zip")
_IMAGE = re.compile(r"(?:.*/)?p\d+/p(\d+)/s(\d+)/([^/]+)\.\w+")

_COLUMNS = COLUMNS | {
    "indication": Column("text", "section of the note: indication or history"),
    "comparison": Column("text", "section of the note"),
}
_ABOUT = (
    "Studies of MIMIC-CXR-JPG and MIMIC-CXR (Johnson et al., Scientific Data 2019; PhysioNet), under the PhysioNet "
    "credentialed health data use agreement, which does not allow them to be passed on."
)

_SCHEMA = """
CREATE TABLE images (number INTEGER PRIMARY KEY, dicom TEXT UNIQUE, subject INTEGER, study INTEGER, split INTEGER);
CREATE TABLE twice (study INTEGER, dicom TEXT, line INTEGER);
CREATE TABLE views (dicom TEXT PRIMARY KEY, view TEXT) WITHOUT ROWID;
CREATE TABLE labels (study INTEGER PRIMARY KEY, code TEXT);
CREATE TABLE skipped (reason TEXT, id TEXT, detail TEXT);
"""


class MimicCxrSource:
    """MIMIC-CXR-JPG as PhysioNet ships it, with the notes of `mimic-cxr-reports`.

    Studies, their images and the official split come from `mimic-cxr-2.0.0-split.csv.gz`, views from `-metadata`,
    labels from `-chexpert` or `-negbio`; each gzipped or plain. Images are `files/p10/p10000032/s50414267/*.jpg`. Ids
    are the tables' numbers.

    `report` is the findings section; in a note with neither findings nor impression, the text after the first paragraph
    of its last section. See `read_note`.

    Args:
        root: Folder of MIMIC-CXR-JPG.
        section: What the report will be; `report`: as above, and a study without one is left out.
        reports: Folder or zip of the notes; None: `mimic-cxr-reports` or its zip in `root`, or notes beside the images.
        annotation: R2Gen's file, whose rows are then the studies: its texts, images and split. It has a row an image,
            so that its ids are those of images. Tables and notes, where they are there, add views, labels, sections.
        labeler: Whose labels.
        limit: First studies of each split that are read; None: all.

    Raises:
        UsageError: A folder or file is not there.
        RunError: A file cannot be read, or is not what it should be; a patient is in two splits.
    """

    name = NAME
    columns = _COLUMNS
    about = _ABOUT

    def __init__(
        self,
        root: Path,
        *,
        section: ReportSection = "report",
        reports: Path | None = None,
        annotation: Path | None = None,
        labeler: Labeler = "chexpert",
        limit: int | None = None,
    ) -> None:
        if not root.is_dir():
            raise UsageError(f"{root} is not a folder" if root.exists() else f"no such folder: {root}")
        self.root = root.resolve()
        self.image_folders = (self.root / "files", self.root / "images", self.root)
        self.remarks: list[str] = []
        self._section, self._limit = section, limit
        self._reports = _find_reports(root, reports, needed=annotation is None)
        self._annotation = Annotation(annotation) if annotation else None
        self._database = scratch_database()
        self._database.executescript(_SCHEMA)
        with scratch_errors():
            if self._annotation is None:
                self._read_split(self._table("split", needed=True))
            self._read_views(self._table("metadata"))
            self._read_labels(self._table(labeler), labeler)

    def __len__(self) -> int:
        if self._annotation is not None:
            return self._annotation.count(self._limit)
        query = "SELECT count(DISTINCT study) FROM images GROUP BY split"
        counts: list[int] = [count for (count,) in self._database.execute(query)]
        skipped: int = self._one("SELECT count(*) FROM skipped")[0]
        return sum(count if self._limit is None else min(count, self._limit) for count in counts) + skipped

    def studies(self, account: Account) -> Iterator[Study]:
        """Yields train, validation, test, each by patient and study, or in the order of the annotation.

        Left out and counted in `account`: rows that cannot be used, studies whose note is missing, cannot be read or
        has no text. Missing images travel with their study as problems.
        """
        account.remarks += self.remarks
        studies = self._listed(account) if self._annotation is None else self._annotated(self._annotation, account)
        with scratch_errors():
            for study in studies:
                if problem := lacks_text(study, self._section):
                    account.skip_study(problem, study.study_id)
                else:
                    yield study

    def _listed(self, account: Account) -> Iterator[Study]:
        for reason, study_id, detail in self._database.execute("SELECT reason, id, detail FROM skipped"):
            account.read += 1
            account.skip_study(reason, str(study_id), detail=detail)
        rows = self._database.execute(
            "SELECT split, subject, study, dicom, view FROM images LEFT JOIN views USING (dicom)"
            " ORDER BY split, subject, study, number"
        )
        read = [0] * len(SPLITS)
        for (split, subject, study), images in groupby(rows, key=lambda row: row[:3]):
            read[split] += 1
            if self._limit is not None and read[split] > self._limit:
                continue
            account.read += 1
            try:
                note = self._note(subject, study)
            except ReportError as error:
                account.skip_study("report cannot be read", str(study), detail=str(error))
                continue
            if note is None:
                account.skip_study("report missing", str(study), path=f"p{str(subject)[:2]}/p{subject}/s{study}.txt")
                continue
            folder = f"p{str(subject)[:2]}/p{subject}/s{study}"
            found = [(self._locate(f"{folder}/{row[3]}.jpg"), row[4] or UNKNOWN_VIEW) for row in images]
            twice = self._database.execute("SELECT dicom, line FROM twice WHERE study = ?", (study,)).fetchall()
            yield Study(
                study_id=str(study),
                patient_id=str(subject),
                split=SPLITS[split],
                image_paths=tuple(image for image, _ in found if isinstance(image, Path)),
                views=tuple(view for image, view in found if isinstance(image, Path)),
                findings=note.findings or None,
                impression=note.impression or None,
                report=note.findings or note.last_paragraph or None,
                source=self.name,
                problems=(
                    *(image for image, _ in found if isinstance(image, ImageProblem)),
                    *(ImageProblem(f"{dicom}.jpg", "listed twice", f"line {line}") for dicom, line in twice),
                ),
                extra=self._extra(study, note),
            )

    def _annotated(self, annotation: Annotation, account: Account) -> Iterator[Study]:
        seen = SeenIds()
        for row in annotation.first(self._limit):
            account.read += 1
            if not seen.skip(row.study_id, row.split, account):
                yield self._annotated_study(row)

    def _annotated_study(self, row: AnnotationRow) -> Study:
        found = [self._locate(path) for path in row.image_paths]
        matches = [_IMAGE.fullmatch(path.replace("\\", "/")) for path in row.image_paths]
        views = [self._view(match[3] if match else row.study_id) for match in matches]
        first = next(filter(None, matches), None)
        study = _number(row.other.get("study_id", "")) or (int(first[2]) if first else None)
        subject = _number(row.patient_id or "") or (int(first[1]) if first else None)
        note = None
        if study is not None and subject is not None and self._reports is not None:
            try:
                note = self._note(subject, study)
            except ReportError:
                note = None  # the annotation has the text
        report = row.report.strip() and row.report
        return Study(
            study_id=row.study_id,
            patient_id=row.patient_id or (first[1] if first else None),
            split=row.split,
            image_paths=tuple(image for image in found if isinstance(image, Path)),
            views=tuple(view for image, view in zip(found, views, strict=True) if isinstance(image, Path)),
            # R2Gen's texts are findings.
            findings=(note.findings if note else "") or report or None,
            impression=(note.impression if note else "") or None,
            report=report or None,
            source=self.name,
            problems=tuple(image for image in found if isinstance(image, ImageProblem)),
            extra=self._extra(study, note or Note()),
        )

    def _note(self, subject: int, study: int) -> Note | None:
        text = self._reports.read(subject, study) if self._reports else None
        return None if text is None else read_note(text, study)

    def _locate(self, path: str) -> Path | ImageProblem:
        return locate(path.replace("\\", "/"), self.root, self.image_folders)

    def _view(self, dicom: str) -> str:
        row = self._one("SELECT view FROM views WHERE dicom = ?", dicom)
        return row[0] if row else UNKNOWN_VIEW

    def _extra(self, study: int | None, note: Note) -> dict[str, Any]:
        (code,) = self._one("SELECT code FROM labels WHERE study = ?", study) or (NOT_MENTIONED,)
        return {
            **label_columns(code),
            "indication": note.indication or None,
            "comparison": note.comparison or None,
        }

    def _one(self, query: str, *values: object) -> Any:
        """The first row of the answer, or None."""
        return self._database.execute(query, values).fetchone()

    # The tables.

    def _table(self, kind: str, *, needed: bool = False) -> Path | None:
        found = sorted(path for ending in ("csv", "csv.gz") for path in self.root.glob(f"mimic-cxr-*-{kind}.{ending}"))
        if not found and needed:
            raise UsageError(
                f"no mimic-cxr-2.0.0-{kind}.csv.gz in {self.root}",
                hint="ROOT is the folder of MIMIC-CXR-JPG. With R2Gen's file pass --annotation.",
            )
        return found[0] if found else None

    def _read_split(self, path: Path | None) -> None:
        if path is None:
            return
        execute = self._database.execute
        execute("BEGIN")
        for line, cells in CsvFile(path, ("dicom_id", "study_id", "subject_id", "split")):
            where = f"{path.name}:{line}"
            if cells is None:
                self._skip("row of another length than the header", where)
                continue
            dicom, study, subject, split = cells[0], _number(cells[1]), _number(cells[2]), cells[3].lower()
            if not dicom or study is None or subject is None:
                self._skip("no study id", where, "dicom_id, study_id or subject_id is no id")
            elif split not in _SPLIT_NAMES:
                self._skip("unknown split", str(study), f"{where}: {printable(split) or 'empty'}")
            else:
                row = (dicom, subject, study, SPLITS.index(_SPLIT_NAMES[split]))
                if not execute("INSERT OR IGNORE INTO images VALUES (NULL, ?, ?, ?, ?)", row).rowcount:
                    execute("INSERT INTO twice VALUES (?, ?, ?)", (study, dicom, line))
        execute(
            "INSERT INTO skipped SELECT 'id seen before', study, 'its images are those of another study' FROM twice"
            " WHERE study NOT IN (SELECT study FROM images) GROUP BY study"
        )
        execute("COMMIT")
        for what, other in (("subject", "split"), ("study", "subject")):
            several = self._one(
                f"SELECT {what}, min({other}), max({other}) FROM images"
                f" GROUP BY {what} HAVING min({other}) < max({other}) LIMIT 1"
            )
            if several:
                parts = [SPLITS[part] if other == "split" else str(part) for part in several[1:]]
                name = {"subject": "patient", "study": "study", "split": "splits"}
                raise RunError(
                    f"{path}: {name[what]} {several[0]} is in two {'splits' if other == 'split' else 'patients'}, "
                    f"{parts[0]} and {parts[1]}"
                )

    def _read_views(self, path: Path | None) -> None:
        if path is None:
            self.remarks.append("No mimic-cxr-2.0.0-metadata.csv.gz: the views are unknown.")
            return
        rows = (cells for _, cells in CsvFile(path, ("dicom_id", "ViewPosition")) if cells is not None)
        self._insert("views", ((dicom, view_name(view)) for dicom, view in rows if view))

    def _read_labels(self, path: Path | None, labeler: Labeler) -> None:
        if path is None:
            self.remarks.append(f"No mimic-cxr-2.0.0-{labeler}.csv.gz: the studies have no labels.")
            return
        self._insert("labels", _label_rows(path))
        self.remarks.append(f"Labels: {path.name}.")

    def _insert(self, table: str, rows: Iterator[tuple[object, object]]) -> None:
        self._database.execute("BEGIN")
        self._database.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?, ?)", rows)
        self._database.execute("COMMIT")

    def _skip(self, reason: str, study_id: str, detail: str = "") -> None:
        self._database.execute("INSERT INTO skipped VALUES (?, ?, ?)", (reason, study_id, detail))


def _find_reports(root: Path, reports: Path | None, *, needed: bool) -> MimicReports | None:
    if reports is not None:
        return MimicReports(reports)
    for name in _REPORTS:
        if (root / name).exists():
            return MimicReports(root / name)
    # A few patients will do: there are 65,000.
    if any(next(patient.glob("s*.txt"), None) for patient in islice(root.glob("files/p*/p*"), 20)):
        return MimicReports(root)
    if needed:
        raise UsageError(
            f"no notes in {root}: neither {_REPORTS[0]} nor {_REPORTS[1]}",
            hint="They are part of MIMIC-CXR, not of MIMIC-CXR-JPG: name the folder or zip with --reports.",
        )
    return None


def _label_rows(path: Path) -> Iterator[tuple[int, str]]:
    for line, cells in CsvFile(path, ("study_id", *LABELS)):
        study = None if cells is None else _number(cells[0])
        if cells is None or study is None:
            continue
        try:
            yield study, encode_labels(cells[1:])
        except ValueError as error:
            raise RunError(f"{path}:{line}: {error}") from None


def _number(text: str) -> int | None:
    """An id: a whole number, with the `.0` that data frames add where a column has gaps."""
    digits = text.removesuffix(".0")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 16 else None
