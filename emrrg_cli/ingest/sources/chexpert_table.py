"""The table of CheXpert Plus with its CheXbert labels: rows of images, gathered into studies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.report_text import ReportSection
from emrrg_cli.datasets.splits import draw_splits
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.views import view_name
from emrrg_cli.ingest.sources.chexpert_labels import LABELS, NOT_MENTIONED, encode_labels
from emrrg_cli.ingest.sources.table import CsvFile
from emrrg_cli.ingest.sources.temporary_index import scratch_database, scratch_errors
from emrrg_cli.ingest.study import Account
from emrrg_cli.vocabulary import SPLITS, Split

TABLE = "df_chexpert_plus_240401.csv"

_TABLES = "df_chexpert_plus*.csv"
_LABEL_FOLDERS = ("chexbert_labels", "CheXpert_Labels", ".")
_LABEL_FILES: dict[str, str] = {"impression": "impression_fixed.json", "both": "report_fixed.json"}

_REQUIRED = ("path_to_image", "section_findings", "section_impression")
_OPTIONAL = ("path_to_dcm", "frontal_lateral", "ap_pa", "section_clinical_history", "section_history",
             "section_comparison")  # fmt: skip
_PATH = re.compile(r"(?:.*/)?(\w+/(patient\d+)/(study\d+)/view\d+_(\w+))\.\w+")

_SCHEMA = """
CREATE TABLE studies (number INTEGER PRIMARY KEY, id TEXT UNIQUE, patient TEXT, findings TEXT, impression TEXT,
                      indication TEXT, comparison TEXT, versions INTEGER);
CREATE TABLE images (number INTEGER PRIMARY KEY, study INTEGER, path TEXT UNIQUE, dicom TEXT, view TEXT);
CREATE INDEX of_study ON images (study);
CREATE TABLE twice (study INTEGER, path TEXT, line INTEGER);
CREATE TABLE labels (path TEXT PRIMARY KEY, code TEXT) WITHOUT ROWID;
CREATE TABLE skipped (reason TEXT, id TEXT, detail TEXT);
CREATE TABLE splits (patient TEXT PRIMARY KEY, split INTEGER) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class ImagePath:
    """What a path such as `train/patient00001/study1/view1_frontal.jpg` says.

    Attributes:
        stem: The path without what stands before the split, and without its ending.
        study: `patient00001_study1`.
        view: `FRONTAL`, `LATERAL`.
    """

    stem: str
    patient: str
    study: str
    view: str


def parse_path(path: str) -> ImagePath | None:
    """The parts of a path, in whatever folder; None: it is of another form."""
    match = _PATH.fullmatch(path.replace("\\", "/"))
    return match and ImagePath(match[1], match[2], f"{match[2]}_{match[3]}", view_name(match[4]))


@dataclass(frozen=True)
class TableStudy:
    """A study as the table has it.

    Attributes:
        images: Path without ending, path as DICOM, and view, of each image.
        twice: Paths that are listed again, and the line.
        labels: Encoded.
    """

    study_id: str
    patient: str
    findings: str
    impression: str
    indication: str
    comparison: str
    images: tuple[tuple[str, str, str], ...]
    twice: tuple[tuple[str, int], ...]
    labels: str


class ChexpertTable:
    """The table and the labels, joined on the disk; the rows of a study need not stand together.

    Args:
        root: Folder with both.
        section: Whose labels.
        needed: The table must be there.

    Attributes:
        remarks: About what was read, and labels that are missing.

    Raises:
        UsageError: No table, though it is needed.
        RunError: A file is not what it should be.
    """

    def __init__(self, root: Path, section: ReportSection, *, needed: bool = True) -> None:
        self.remarks: list[str] = []
        self._database = scratch_database()
        self._database.executescript(_SCHEMA)
        table = next(iter(sorted(root.glob(_TABLES))), None)
        if table is None and needed:
            raise UsageError(f"no {TABLE} in {root}", hint="ROOT is the folder that holds the table and PNGs/.")
        if table is not None:
            with scratch_errors():
                self._read_table(table)
                self._read_labels(root, section)

    def draw(self, fractions: Sequence[float], seed: int) -> None:
        """Draws the split of each patient, which `studies` goes by."""
        patients = (patient for (patient,) in self._database.execute("SELECT DISTINCT patient FROM studies"))
        rows = ((patient, SPLITS.index(split)) for patient, split in draw_splits(patients, fractions, seed).items())
        with scratch_errors():
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO splits VALUES (?, ?)", rows)
            self._database.execute("COMMIT")

    def count(self, limit: int | None) -> int:
        """Studies that `studies` yields, and rows that `skip_rows` counts."""
        query = "SELECT count(*) FROM studies JOIN splits USING (patient) GROUP BY split"
        counts: list[int] = [count for (count,) in self._database.execute(query)]
        skipped: int = self._one("SELECT count(*) FROM skipped")[0]
        return sum(count if limit is None else min(count, limit) for count in counts) + skipped

    def skip_rows(self, account: Account) -> None:
        """Counts the rows that cannot be used."""
        for reason, study_id, detail in self._database.execute("SELECT reason, id, detail FROM skipped"):
            account.read += 1
            account.skip_study(reason, study_id, detail=detail)

    def studies(self, limit: int | None) -> Iterator[tuple[Split, TableStudy]]:
        """Yields train, validation, test, each in the table's order; only the first `limit` of each."""
        read = [0] * len(SPLITS)
        query = "SELECT split, id FROM studies JOIN splits USING (patient) ORDER BY split, number"
        for split, study_id in self._database.execute(query):
            read[split] += 1
            study = self.study(study_id) if limit is None or read[split] <= limit else None
            if study is not None:
                yield SPLITS[split], study

    def study(self, study_id: str) -> TableStudy | None:
        """One study, or None where the table has none of that id."""
        columns = "number, patient, findings, impression, indication, comparison"
        row = self._one(f"SELECT {columns} FROM studies WHERE id = ?", study_id)
        if row is None:
            return None
        number, patient, findings, impression, indication, comparison = row
        labels = self._one(
            "SELECT code FROM images JOIN labels USING (path) WHERE study = ? ORDER BY number LIMIT 1", number
        )
        return TableStudy(
            study_id=study_id,
            patient=patient,
            findings=findings,
            impression=impression,
            indication=indication,
            comparison=comparison,
            images=self._all("SELECT path, dicom, view FROM images WHERE study = ? ORDER BY number", number),
            twice=self._all("SELECT path, line FROM twice WHERE study = ?", number),
            labels=labels[0] if labels else NOT_MENTIONED,
        )

    def view(self, image: ImagePath) -> str:
        """The projection of an image: by the table, or by the name of the file."""
        row = self._one("SELECT view FROM images WHERE path = ?", image.stem)
        return str(row[0]) if row else image.view

    def _one(self, query: str, *values: object) -> Any:
        """The first row of the answer, or None."""
        return self._database.execute(query, values).fetchone()

    def _all(self, query: str, *values: object) -> tuple[Any, ...]:
        return tuple(self._database.execute(query, values))

    # Reading.

    def _read_table(self, path: Path) -> None:
        table = CsvFile(path, _REQUIRED, _OPTIONAL)
        if table.encoding == "cp1252":
            self.remarks.append(f"{path.name} is not UTF-8: it was read as Windows-1252.")
        self._database.execute("BEGIN")
        for line, cells in table:
            where = f"{path.name}:{line}"
            if cells is None:
                self._skip("row of another length than the header", where)
            elif image := parse_path(cells[0]):
                self._add(image, cells, line)
            else:
                self._skip("no study id", where, f"path_to_image: {printable(cells[0]) or 'empty'}")
        self._database.execute("COMMIT")
        (several,) = self._one("SELECT count(*) FROM studies WHERE versions > 1")
        if several:
            self.remarks.append(
                f"The views of {several:,} studies carry reports that were anonymised differently: the first is kept."
            )

    def _add(self, image: ImagePath, cells: tuple[str, ...], line: int) -> None:
        _, findings, impression, dicom, frontal, projection, history, other_history, comparison = cells
        execute = self._database.execute
        study = (image.study, image.patient, findings, impression, history or other_history, comparison)
        added = execute("INSERT OR IGNORE INTO studies VALUES (NULL, ?, ?, ?, ?, ?, ?, 1)", study).rowcount
        number, *texts = self._one("SELECT number, findings, impression FROM studies WHERE id = ?", image.study)
        if not added and texts != [findings, impression]:
            execute("UPDATE studies SET versions = versions + 1 WHERE number = ?", (number,))
        view = view_name(frontal) if frontal else image.view
        if view == "FRONTAL" and projection:
            view = view_name(projection)
        row = (number, image.stem, dicom, view)
        if not execute("INSERT OR IGNORE INTO images VALUES (NULL, ?, ?, ?, ?)", row).rowcount:
            execute("INSERT INTO twice VALUES (?, ?, ?)", (number, image.stem, line))

    def _read_labels(self, root: Path, section: ReportSection) -> None:
        name = _LABEL_FILES.get(section, "findings_fixed.json")
        file = next((path for folder in _LABEL_FOLDERS if (path := root / folder / name).is_file()), None)
        if file is None:
            self.remarks.append(f"No {_LABEL_FOLDERS[0]}/{name}: the studies have no labels.")
            return
        self._database.execute("BEGIN")
        self._database.executemany("INSERT OR IGNORE INTO labels VALUES (?, ?)", _label_lines(file))
        self._database.execute("COMMIT")
        self.remarks.append(f"Labels: {name}.")

    def _skip(self, reason: str, study_id: str, detail: str = "") -> None:
        self._database.execute("INSERT INTO skipped VALUES (?, ?, ?)", (reason, study_id, detail))


def _label_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The path of each image, without its ending, and its labels."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                    image = parse_path(row["path_to_image"])
                    code = encode_labels(row.get(label) for label in LABELS)
                except (ValueError, RecursionError) as error:
                    raise RunError(f"{where}: not a line of labels: {error}") from None
                except (TypeError, KeyError, AttributeError):
                    raise RunError(f"{where}: not an object with path_to_image", hint="One a line.") from None
                if image is not None:
                    yield image.stem, code
    except UnicodeDecodeError:
        raise RunError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
