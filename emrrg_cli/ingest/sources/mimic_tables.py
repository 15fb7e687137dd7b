"""The tables of MIMIC-CXR-JPG: which images make which study, in which split, seen from where, with which labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.views import view_name
from emrrg_cli.ingest.sources.chexpert_labels import LABELS, NOT_MENTIONED, encode_labels
from emrrg_cli.ingest.sources.table import CsvFile
from emrrg_cli.ingest.sources.temporary_index import scratch_database, scratch_errors
from emrrg_cli.ingest.study import Account
from emrrg_cli.vocabulary import SPLITS, UNKNOWN_VIEW, Split

Labeler = Literal["chexpert", "negbio"]

_SPLIT_NAMES: dict[str, Split] = {"train": "train", "validate": "validation", "test": "test"}

_SCHEMA = """
CREATE TABLE images (number INTEGER PRIMARY KEY, dicom TEXT UNIQUE, subject INTEGER, study INTEGER, split INTEGER);
CREATE TABLE twice (study INTEGER, dicom TEXT, line INTEGER);
CREATE TABLE views (dicom TEXT PRIMARY KEY, view TEXT) WITHOUT ROWID;
CREATE TABLE labels (study INTEGER PRIMARY KEY, code TEXT);
CREATE TABLE skipped (reason TEXT, id TEXT, detail TEXT);
"""


@dataclass(frozen=True)
class ListedStudy:
    """A study as the tables list it.

    Attributes:
        subject, study: Numbers of the patient and the study.
        images: Name without ending, and view, of each image.
        twice: Names that are listed again, and the line.
    """

    split: Split
    subject: int
    study: int
    images: tuple[tuple[str, str], ...]
    twice: tuple[tuple[str, int], ...]


class MimicTables:
    """The tables, joined on the disk: they are in no order that would let them be read side by side.

    Args:
        root: Folder with `mimic-cxr-2.0.0-split.csv.gz`, `-metadata` and the labels; gzipped or plain.
        labeler: Whose labels.
        split: Read the official split; without it only views and labels are there.

    Attributes:
        remarks: About tables that are missing.

    Raises:
        UsageError: No split.
        RunError: A table is not what it should be; a patient is in two splits.
    """

    def __init__(self, root: Path, labeler: Labeler, *, split: bool = True) -> None:
        self._root = root
        self.remarks: list[str] = []
        self._database = scratch_database()
        self._database.executescript(_SCHEMA)
        with scratch_errors():
            if split:
                self._read_split()
            self._read_views()
            self._read_labels(labeler)

    def count(self, limit: int | None) -> int:
        """Studies that `studies` yields, and rows that `skip_rows` counts."""
        query = "SELECT count(DISTINCT study) FROM images GROUP BY split"
        counts: list[int] = [count for (count,) in self._database.execute(query)]
        skipped: int = self._one("SELECT count(*) FROM skipped")[0]
        return sum(count if limit is None else min(count, limit) for count in counts) + skipped

    def skip_rows(self, account: Account) -> None:
        """Counts the rows of the split that cannot be used."""
        for reason, study_id, detail in self._database.execute("SELECT reason, id, detail FROM skipped"):
            account.read += 1
            account.skip_study(reason, str(study_id), detail=detail)

    def studies(self, limit: int | None) -> Iterator[ListedStudy]:
        """Yields train, validation, test, each by patient and study; only the first `limit` of each."""
        rows = self._database.execute(
            "SELECT split, subject, study, dicom, view FROM images LEFT JOIN views USING (dicom)"
            " ORDER BY split, subject, study, number"
        )
        read = [0] * len(SPLITS)
        for (split, subject, study), images in groupby(rows, key=lambda row: row[:3]):
            read[split] += 1
            if limit is not None and read[split] > limit:
                continue
            listed = tuple((dicom, view or UNKNOWN_VIEW) for *_, dicom, view in images)
            twice = self._database.execute("SELECT dicom, line FROM twice WHERE study = ?", (study,)).fetchall()
            yield ListedStudy(SPLITS[split], subject, study, listed, tuple(twice))

    def view(self, dicom: str) -> str:
        """The projection of an image, or `unknown`."""
        row = self._one("SELECT view FROM views WHERE dicom = ?", dicom)
        return str(row[0]) if row else UNKNOWN_VIEW

    def labels(self, study: int | None) -> str:
        """The labels of a study, encoded."""
        row = self._one("SELECT code FROM labels WHERE study = ?", study)
        return str(row[0]) if row else NOT_MENTIONED

    def _one(self, query: str, *values: object) -> Any:
        """The first row of the answer, or None."""
        return self._database.execute(query, values).fetchone()

    # Reading.

    def _table(self, kind: str) -> Path | None:
        endings = ("csv", "csv.gz")
        return next((path for end in endings for path in sorted(self._root.glob(f"mimic-cxr-*-{kind}.{end}"))), None)

    def _read_split(self) -> None:
        path = self._table("split")
        if path is None:
            raise UsageError(
                f"no mimic-cxr-2.0.0-split.csv.gz in {self._root}",
                hint="ROOT is the folder of MIMIC-CXR-JPG. With R2Gen's file pass --annotation.",
            )
        execute = self._database.execute
        execute("BEGIN")
        for line, cells in CsvFile(path, ("dicom_id", "study_id", "subject_id", "split")):
            where = f"{path.name}:{line}"
            if cells is None:
                self._skip("row of another length than the header", where)
                continue
            dicom, study, subject, split = cells[0], number(cells[1]), number(cells[2]), cells[3].lower()
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
        self._check(path, "subject", "split", "patient {} is in two splits, {} and {}")
        self._check(path, "study", "subject", "study {} is of two patients, {} and {}")

    def _check(self, path: Path, of: str, one: str, message: str) -> None:
        """Makes sure that each value of column `of` has one value of column `one`."""
        row = self._one(
            f"SELECT {of}, min({one}), max({one}) FROM images GROUP BY {of} HAVING min({one}) < max({one}) LIMIT 1"
        )
        if row:
            values = [SPLITS[value] for value in row[1:]] if one == "split" else row[1:]
            raise RunError(f"{path}: {message.format(row[0], *values)}")

    def _read_views(self) -> None:
        path = self._table("metadata")
        if path is None:
            self.remarks.append("No mimic-cxr-2.0.0-metadata.csv.gz: the views are unknown.")
            return
        rows = (cells for _, cells in CsvFile(path, ("dicom_id", "ViewPosition")) if cells is not None)
        self._insert("views", ((dicom, view_name(view)) for dicom, view in rows if view))

    def _read_labels(self, labeler: Labeler) -> None:
        path = self._table(labeler)
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


def number(text: str) -> int | None:
    """An id: a whole number, with the `.0` that data frames add where a column has gaps; None: it is none."""
    digits = text.removesuffix(".0")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 16 else None


def _label_rows(path: Path) -> Iterator[tuple[int, str]]:
    for line, cells in CsvFile(path, ("study_id", *LABELS)):
        study = None if cells is None else number(cells[0])
        if cells is None or study is None:
            continue
        try:
            yield study, encode_labels(cells[1:])
        except ValueError as error:
            raise RunError(f"{path}:{line}: {error}") from None
