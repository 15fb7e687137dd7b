"""CheXpert Plus: its table of reports, its PNG (or DICOM) images and its CheXbert labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emrrg_cli.data.report_text import ReportSection
from emrrg_cli.data.sources.annotation import Annotation, AnnotationRow
from emrrg_cli.data.sources.chexpert_labels import COLUMNS, LABELS, NOT_MENTIONED, encode_labels, label_columns
from emrrg_cli.data.sources.locate import find_image
from emrrg_cli.data.sources.scratch import SeenIds, scratch_database, scratch_errors
from emrrg_cli.data.sources.splits import draw_splits, drawn_remark
from emrrg_cli.data.sources.table import CsvFile
from emrrg_cli.data.sources.texts import lacks_text
from emrrg_cli.data.sources.views import view_name
from emrrg_cli.data.study import SPLITS, Account, Column, ImageProblem, Split, Study, printable
from emrrg_cli.errors import RunError, UsageError

NAME = "chexpert_plus"
TABLE = "df_chexpert_plus_240401.csv"
# The parts of the published split (CXPMRG-Bench): 40,463, 5,780 and 11,562 of 57,805 studies.
FRACTIONS = (0.7, 0.1, 0.2)

_TABLES = "df_chexpert_plus*.csv"
_IMAGES = ("PNGs", "PNG", "PNG/PNG", "DICOMs", "DICOM")
_LABEL_FOLDERS = ("chexbert_labels", "CheXpert_Labels", ".")
_LABEL_FILES: dict[str, str] = {"impression": "impression_fixed.json", "both": "report_fixed.json"}

_REQUIRED = ("path_to_image", "section_findings", "section_impression")
_OPTIONAL = ("path_to_dcm", "frontal_lateral", "ap_pa", "section_clinical_history", "section_history",
             "section_comparison")  # fmt: skip
_PATH = re.compile(r"(?:.*/)?(\w+/(patient\d+)/(study\d+)/(view\d+_(\w+)))\.\w+")

_COLUMNS = COLUMNS | {
    "indication": Column("text", "section of the report: clinical history"),
    "comparison": Column("text", "section of the report"),
}
_ABOUT = (
    "Studies of CheXpert Plus (Chambon et al., arXiv 2405.19538), under the Stanford University School of Medicine "
    "research use agreement, which does not allow them to be passed on. Labels by CheXbert."
)

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


class ChexpertPlusSource:
    """CheXpert Plus as Stanford AIMI ships it.

    The rows of `df_chexpert_plus_240401.csv` that name views of one study make one study, `patient00001_study1`. Its
    views carry reports that were anonymised one by one and may differ in dates: the first row's is kept. Paths in the
    table end in `.jpg`; the images are looked up as `.png`, then under the table's own name, then as DICOM.

    `report` is the findings section, as in CXPMRG-Bench. Labels are CheXbert's of the section that is asked for.

    Args:
        root: Folder with the table, `PNGs/` (or `PNG/`, `DICOM/`) and `chexbert_labels/`.
        section: What the report will be, which chooses the labels.
        annotation: A file in R2Gen's form, whose rows are then the studies: its texts, images and split. The table,
            where it is there, adds views, sections and labels.
        fractions: Parts of train, validation and test, drawn by patient, where there is no annotation.
        seed: Of that draw.
        limit: First studies of each split that are read; None: all.

    Raises:
        UsageError: A folder or file is not there.
        RunError: A file cannot be read, or is not what it should be.
    """

    name = NAME
    columns = _COLUMNS
    about = _ABOUT

    def __init__(
        self,
        root: Path,
        *,
        section: ReportSection = "report",
        annotation: Path | None = None,
        fractions: Sequence[float] = FRACTIONS,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        if not root.is_dir():
            raise UsageError(f"{root} is not a folder" if root.exists() else f"no such folder: {root}")
        self.root = root.resolve()
        self.image_folders = (*(self.root / name for name in _IMAGES if (root / name).is_dir()), self.root)
        self.remarks: list[str] = []
        self._limit, self._section = limit, section
        self._annotation = Annotation(annotation) if annotation else None
        self._database = scratch_database()
        self._database.executescript(_SCHEMA)
        table = _find_table(root, needed=annotation is None)
        with scratch_errors():
            if table is not None:
                self._read_table(table)
                self._read_labels(root, section)
            if self._annotation is None:
                self._draw(fractions, seed)

    def __len__(self) -> int:
        if self._annotation is not None:
            return self._annotation.count(self._limit)
        studies = "SELECT count(*) FROM studies JOIN splits USING (patient) GROUP BY split"
        counts: list[int] = [count for (count,) in self._database.execute(studies)]
        skipped: int = self._one("SELECT count(*) FROM skipped")[0]
        return sum(count if self._limit is None else min(count, self._limit) for count in counts) + skipped

    def studies(self, account: Account) -> Iterator[Study]:
        """Yields train, validation, test, each in the order of the table or the annotation.

        Left out and counted in `account`: rows that cannot be used, studies without findings and impression. Missing
        images travel with their study as problems.
        """
        account.remarks += self.remarks
        if self._annotation is not None:
            yield from self._annotated(self._annotation, account)
            return
        for reason, study_id, detail in self._database.execute("SELECT reason, id, detail FROM skipped"):
            account.read += 1
            account.skip_study(reason, study_id, detail=detail)
        read = dict.fromkeys(SPLITS, 0)
        query = "SELECT split, number FROM studies JOIN splits USING (patient) ORDER BY split, number"
        with scratch_errors():
            for index, number in self._database.execute(query):
                split = SPLITS[index]
                read[split] += 1
                if self._limit is not None and read[split] > self._limit:
                    continue
                account.read += 1
                study = self._study(number, split)
                if problem := lacks_text(study, self._section):
                    account.skip_study(problem, study.study_id)
                else:
                    yield study

    def _study(self, number: int, split: Split) -> Study:
        query = "SELECT id, patient, findings, impression, indication, comparison FROM studies WHERE number = ?"
        study_id, patient, findings, impression, indication, comparison = self._one(query, number)
        images = self._database.execute(
            "SELECT path, dicom, view FROM images WHERE study = ? ORDER BY number", (number,)
        )
        found = [(find_image(_names(path, dicom), self.root, self.image_folders), view) for path, dicom, view in images]
        twice = self._database.execute("SELECT path, line FROM twice WHERE study = ?", (number,)).fetchall()
        return Study(
            study_id=study_id,
            patient_id=patient,
            split=split,
            image_paths=tuple(image for image, _ in found if isinstance(image, Path)),
            views=tuple(view for image, view in found if isinstance(image, Path)),
            findings=findings or None,
            impression=impression or None,
            report=findings or None,
            source=self.name,
            problems=(
                *(image for image, _ in found if isinstance(image, ImageProblem)),
                *(ImageProblem(path, "listed twice", f"line {line}") for path, line in twice),
            ),
            extra=self._extra(number, indication, comparison),
        )

    def _extra(self, number: int | None, indication: str = "", comparison: str = "") -> dict[str, Any]:
        query = "SELECT code FROM images JOIN labels USING (path) WHERE study = ? ORDER BY number LIMIT 1"
        (code,) = self._one(query, number) or (NOT_MENTIONED,)
        return {**label_columns(code), "indication": indication or None, "comparison": comparison or None}

    def _one(self, query: str, *values: object) -> Any:
        """The first row of the answer, or None."""
        return self._database.execute(query, values).fetchone()

    # With an annotation.

    def _annotated(self, annotation: Annotation, account: Account) -> Iterator[Study]:
        seen = SeenIds()
        for row in annotation.first(self._limit):
            account.read += 1
            if seen.skip(row.study_id, row.split, account):
                continue
            if not row.report.strip():
                account.skip_study("empty report", row.study_id)
                continue
            with scratch_errors():
                yield self._annotated_study(row)

    def _annotated_study(self, row: AnnotationRow) -> Study:
        matches = [_PATH.fullmatch(path.replace("\\", "/")) for path in row.image_paths]
        first = next(filter(None, matches), None)
        known = first and self._one(
            "SELECT number, findings, impression, indication, comparison FROM studies WHERE id = ?", _study_id(first)
        )
        number, findings, impression, indication, comparison = known or (None, None, None, "", "")
        found = [
            find_image((*_names(path, ""), *(_names(match[1], "") if match else ())), self.root, self.image_folders)
            for path, match in zip(row.image_paths, matches, strict=True)
        ]
        views = [self._view(match) for match in matches]
        return Study(
            study_id=row.study_id,
            patient_id=row.patient_id or (first[2] if first else None),
            split=row.split,
            image_paths=tuple(image for image in found if isinstance(image, Path)),
            views=tuple(view for image, view in zip(found, views, strict=True) if isinstance(image, Path)),
            findings=findings or row.report,
            impression=impression or None,
            report=row.report,
            source=self.name,
            problems=tuple(image for image in found if isinstance(image, ImageProblem)),
            extra=self._extra(number, indication, comparison),
        )

    def _view(self, match: re.Match[str] | None) -> str:
        known = match and self._one("SELECT view FROM images WHERE path = ?", match[1])
        return known[0] if known else view_name(match[5] if match else "")

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
                continue
            match = _PATH.fullmatch(cells[0])
            if match is None:
                self._skip("no study id", where, f"path_to_image: {printable(cells[0]) or 'empty'}")
                continue
            self._add_row(match, cells, line)
        self._database.execute("COMMIT")
        (several,) = self._one("SELECT count(*) FROM studies WHERE versions > 1")
        if several:
            self.remarks.append(
                f"The views of {several:,} studies carry reports that were anonymised differently: the first is kept."
            )

    def _add_row(self, match: re.Match[str], cells: tuple[str, ...], line: int) -> None:
        _, findings, impression, dicom, frontal, projection, history, other_history, comparison = cells
        study = (_study_id(match), match[2], findings, impression, history or other_history, comparison)
        execute = self._database.execute
        added = execute("INSERT OR IGNORE INTO studies VALUES (NULL, ?, ?, ?, ?, ?, ?, 1)", study).rowcount
        number, *texts = self._one("SELECT number, findings, impression FROM studies WHERE id = ?", study[0])
        if not added and texts != [findings, impression]:
            execute("UPDATE studies SET versions = versions + 1 WHERE number = ?", (number,))
        view = view_name(frontal or match[5])
        if view == "FRONTAL" and projection:
            view = view_name(projection)
        image = (number, match[1], dicom, view)
        if not execute("INSERT OR IGNORE INTO images VALUES (NULL, ?, ?, ?, ?)", image).rowcount:
            execute("INSERT INTO twice VALUES (?, ?, ?)", (number, match[1], line))

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

    def _draw(self, fractions: Sequence[float], seed: int) -> None:
        patients = (patient for (patient,) in self._database.execute("SELECT DISTINCT patient FROM studies"))
        rows = ((patient, SPLITS.index(split)) for patient, split in draw_splits(patients, fractions, seed).items())
        self._database.execute("BEGIN")
        self._database.executemany("INSERT INTO splits VALUES (?, ?)", rows)
        self._database.execute("COMMIT")
        self.remarks.append(drawn_remark(fractions, seed))


def _find_table(root: Path, *, needed: bool) -> Path | None:
    table = next(iter(sorted(root.glob(_TABLES))), None)
    if table is None and needed:
        raise UsageError(f"no {TABLE} in {root}", hint="ROOT is the folder that holds the table and PNGs/.")
    return table


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
                    match = _PATH.fullmatch(row["path_to_image"])
                    code = encode_labels(row.get(label) for label in LABELS)
                except (ValueError, RecursionError) as error:
                    raise RunError(f"{where}: not a line of labels: {error}") from None
                except (TypeError, KeyError, AttributeError):
                    raise RunError(f"{where}: not an object with path_to_image", hint="One a line.") from None
                if match is not None:
                    yield match[1], code
    except UnicodeDecodeError:
        raise RunError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None


def _study_id(match: re.Match[str]) -> str:
    return f"{match[2]}_{match[3]}"


def _names(path: str, dicom: str) -> tuple[str, ...]:
    """Where an image may be: as PNG, as the path says, as DICOM."""
    path = path.replace("\\", "/")
    stem = re.sub(r"\.(jpe?g|png|dcm)$", "", path, flags=re.IGNORECASE)
    return tuple(dict.fromkeys(name for name in (f"{stem}.png", path, f"{stem}.jpg", dicom, f"{stem}.dcm") if name))
