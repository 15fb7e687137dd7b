"""Reads the table of CheXpert Plus and its CheXbert labels, and groups rows of images into studies."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from emrrg_cli.console import printable
from emrrg_cli.datasets.splits import draw_splits
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.views import view_name
from emrrg_cli.ingest.sources.chexpert_labels import LABELS, NOT_MENTIONED, LabelRows
from emrrg_cli.ingest.sources.table import CsvFile
from emrrg_cli.ingest.sources.text_files import encoding_remarks, read_lines, reading
from emrrg_cli.ingest.study import ImportLog
from emrrg_cli.vocabulary import SPLITS, Section, Split

TABLE = "df_chexpert_plus_240401.csv"

_TABLES = ("df_chexpert_plus*.csv", "df_chexpert_plus*.csv.gz")
_LABEL_FOLDERS = ("chexbert_labels", "CheXpert_Labels", ".")
_LABEL_FILES: dict[str, str] = {"impression": "impression_fixed.json", "both": "report_fixed.json"}

_REQUIRED = ("path_to_image", "section_findings", "section_impression")
_OPTIONAL = ("path_to_dcm", "frontal_lateral", "ap_pa", "section_clinical_history", "section_history",
             "section_comparison", "section_technique", "age", "sex")  # fmt: skip
_PATH = re.compile(r"(?:.*/)?(\w+/(patient\d+)/(study\d+)/view\d+_(\w+))\.\w+")


@dataclass(frozen=True)
class ImagePath:
    """The parts of a path such as `train/patient00001/study1/view1_frontal.jpg`.

    Attributes:
        stem: The path from the split on, without the file extension.
        study: `patient00001_study1`.
        view: `FRONTAL`, `LATERAL`.
    """

    stem: str
    patient: str
    study: str
    view: str


def parse_path(path: str) -> ImagePath | None:
    """Parses a path in any folder; returns None for a path of another form."""
    match = _PATH.fullmatch(path.replace("\\", "/"))
    return match and ImagePath(match[1], match[2], f"{match[2]}_{match[3]}", view_name(match[4]))


@dataclass(slots=True)
class TableStudy:
    """A study of the table.

    Attributes:
        images: Path without extension, DICOM path, and view of each image.
        twice: Paths that are listed a second time, with the line.
        labels: Labels as `encode_labels` returns them.
    """

    study_id: str
    patient: str
    findings: str
    impression: str
    indication: str
    comparison: str
    technique: str
    age: str
    sex: str
    images: list[tuple[str, str, str]] = field(default_factory=list)
    twice: list[tuple[str, int]] = field(default_factory=list)
    labels: str = NOT_MENTIONED


class ChexpertTable:
    """The table and the labels, joined in memory; the rows of a study need not be consecutive.

    Args:
        root: Folder with the table and the labels.
        section: Section whose labels are read.
        needed: Whether the table must exist.

    Attributes:
        remarks: Remarks about the files that were read and about missing labels.

    Raises:
        UsageError: The table does not exist, and `needed` is true.
        RunError: A file has the wrong format.
    """

    def __init__(self, root: Path, section: Section, *, needed: bool = True) -> None:
        self.remarks: list[str] = []
        self._studies: dict[str, TableStudy] = {}
        self._views: dict[str, str] = {}
        self._splits: dict[str, Split] = {}
        self._skipped: list[tuple[str, str, str]] = []
        table = next((path for pattern in _TABLES for path in sorted(root.glob(pattern))), None)
        if table is None and needed:
            raise UsageError(f"no {TABLE} in {root}", hint="ROOT is the folder that holds the table and PNGs/.")
        if table is not None:
            self._read_table(table)
            self._read_labels(root, section)

    def draw(self, fractions: Sequence[float], seed: int) -> None:
        """Draws the split of each patient; `studies` uses these splits."""
        self._splits = draw_splits((study.patient for study in self._studies.values()), fractions, seed)

    def count(self, limit: int | None) -> int:
        """Returns the number of studies that `studies` yields plus the rows that `skip_rows` counts."""
        counts = Counter(self._splits[study.patient] for study in self._studies.values()).values()
        return sum(count if limit is None else min(count, limit) for count in counts) + len(self._skipped)

    def skip_rows(self, log: ImportLog) -> None:
        """Counts the rows that cannot be used."""
        for reason, study_id, detail in self._skipped:
            log.read += 1
            log.skip_study(reason, study_id, detail=detail)

    def studies(self, limit: int | None) -> Iterator[tuple[Split, TableStudy]]:
        """Yields the first `limit` studies of train, validation and test, each in the table's order."""
        for split in SPLITS:
            chosen = (study for study in self._studies.values() if self._splits[study.patient] == split)
            yield from ((split, study) for study in islice(chosen, limit))

    def study(self, study_id: str) -> TableStudy | None:
        """Returns a study, or None if the table does not have this id."""
        return self._studies.get(study_id)

    def view(self, image: ImagePath) -> str:
        """Returns the projection of an image from the table, or else from its file name."""
        return self._views.get(image.stem, image.view)

    # Reading.

    def _read_table(self, path: Path) -> None:
        table = CsvFile(path, _REQUIRED, _OPTIONAL)
        self.remarks += encoding_remarks(path, table.encoding)
        several: set[str] = set()
        for line, cells in table:
            where = f"{path.name}:{line}"
            if cells is None:
                self._skipped.append(("row and header differ in length", where, ""))
            elif image := parse_path(cells[0]):
                self._add(image, cells, line, several)
            else:
                self._skipped.append(("no study id", where, f"path_to_image: {printable(cells[0]) or 'empty'}"))
        if several:
            self.remarks.append(
                f"Studies whose views have differently anonymised reports: {len(several):,}. The first report is kept."
            )

    def _add(self, image: ImagePath, cells: tuple[str, ...], line: int, several: set[str]) -> None:
        """Adds one image to its study, and the study to `several` if its views have different reports."""
        _, findings, impression, dicom, frontal, position, *context = cells
        study = self._studies.get(image.study)
        if study is None:
            history, other_history, comparison, technique, age, sex = context
            texts = (findings, impression, history or other_history, comparison, technique, age, sex)
            study = self._studies[image.study] = TableStudy(image.study, image.patient, *texts)
        elif (study.findings, study.impression) != (findings, impression):
            several.add(image.study)
        view = view_name(frontal) if frontal else image.view
        if view == "FRONTAL" and position:
            view = view_name(position)
        if image.stem in self._views:
            study.twice.append((image.stem, line))
        else:
            self._views[image.stem] = view = sys.intern(view)
            study.images.append((image.stem, dicom, view))

    def _read_labels(self, root: Path, section: Section) -> None:
        name = _LABEL_FILES.get(section, "findings_fixed.json")
        file = next((path for folder in _LABEL_FOLDERS if (path := root / folder / name).is_file()), None)
        if file is None:
            self.remarks.append(f"No {_LABEL_FOLDERS[0]}/{name}: the studies have no labels.")
            return
        labels = LabelRows()
        try:
            with reading(file):
                for number, line in enumerate(read_lines(file, "utf-8-sig", errors="strict"), start=1):
                    if line.strip():
                        _add_labels(labels, line, f"{file}:{number}")
        except UnicodeDecodeError:
            raise RunError(f"{file}: not UTF-8 text") from None
        self.remarks += labels.remarks(name)
        for study in self._studies.values():
            study.labels = next(filter(None, (labels.get(stem) for stem, *_ in study.images)), NOT_MENTIONED)


def _add_labels(labels: LabelRows, line: str, where: str) -> None:
    """Adds the labels of a line, by the path of its image without the extension."""
    try:
        row = json.loads(line)
        image = parse_path(row["path_to_image"])
    except (ValueError, RecursionError) as error:
        if not line.endswith("\n"):
            raise RunError(f"{where}: the last line is cut short: {error}", hint="Download the file again.") from None
        labels.skip(where, f"not JSON: {error}")
    except (TypeError, KeyError, AttributeError):
        labels.skip(where, "not an object with path_to_image")
    else:
        if image is None:
            labels.skip(where, f"path_to_image: {row['path_to_image']}")
        else:
            labels.add(image.stem, [row.get(label) for label in LABELS], where)
