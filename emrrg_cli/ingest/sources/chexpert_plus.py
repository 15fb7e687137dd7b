"""Reads CheXpert Plus: the table of reports, the PNG (or DICOM) images and the CheXbert labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.directory import Column
from emrrg_cli.datasets.splits import drawn_remark
from emrrg_cli.ingest.sources.annotation import Annotation, AnnotationRow
from emrrg_cli.ingest.sources.chexpert_labels import COLUMNS, NOT_MENTIONED, label_columns
from emrrg_cli.ingest.sources.chexpert_table import ChexpertTable, TableStudy, parse_path
from emrrg_cli.ingest.sources.image_paths import find_image, require_folder, split_found
from emrrg_cli.ingest.sources.texts import with_text
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study
from emrrg_cli.vocabulary import CONTEXT_FIELDS, UNKNOWN_VIEW, Section, Split

NAME = "chexpert_plus"
# The parts of the published split (CXPMRG-Bench): 40,463, 5,780 and 11,562 of 57,805 studies.
FRACTIONS = (0.7, 0.1, 0.2)

_IMAGES = ("PNGs", "PNG", "PNG/PNG", "DICOMs", "DICOM", "CheXpert-v1.0", "CheXpert-v1.0-small")

_COLUMNS = COLUMNS | {
    "indication": Column("text", "section of the report: clinical history"),
    "comparison": Column("text", "section of the report"),
    "technique": Column("text", "section of the report"),
    "age": Column("text", "age of the patient in years"),
    "sex": Column("text", "sex of the patient"),
}
_ABOUT = (
    "Studies of CheXpert Plus (Chambon et al., arXiv 2405.19538), under the Stanford University School of Medicine "
    "research use agreement, which does not allow redistribution. Labels by CheXbert."
)


class ChexpertPlusSource:
    """CheXpert Plus as Stanford AIMI distributes it.

    The rows of `df_chexpert_plus_240401.csv` are grouped by the study in their paths, such as `patient00001_study1`.
    Each view has its own anonymised report, and dates may differ between them; the report of the first row is kept.
    Paths in the table end in `.jpg`; images are looked up as `.png`, then by the name in the table, then as DICOM.

    `report` is the findings section, as in CXPMRG-Bench. Labels are CheXbert's labels of `section`.

    Args:
        root: Folder with the table, `PNGs/` (or another of `_IMAGES`) and `chexbert_labels/`.
        section: Section that becomes the report; labels are read for the same section.
        annotation: A file in R2Gen's format. Its rows then define the studies: texts, images and splits. The table
            adds views, sections and labels if it exists.
        fractions: Fractions of train, validation and test in a random split by patient; not used with `annotation`.
        seed: Random seed of the split.
        limit: Number of studies to read from the start of each split; None: all.

    Raises:
        UsageError: A folder or file does not exist.
        RunError: A file cannot be read or has the wrong format.
    """

    name = NAME
    columns = _COLUMNS
    about = _ABOUT

    def __init__(
        self,
        root: Path,
        *,
        section: Section = "report",
        annotation: Path | None = None,
        fractions: Sequence[float] = FRACTIONS,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        require_folder(root)
        self.root = root.resolve()
        self.image_folders = (*(self.root / name for name in _IMAGES if (root / name).is_dir()), self.root)
        self._section, self._limit = section, limit
        self._annotation = Annotation(annotation) if annotation else None
        self._table = ChexpertTable(root, section, needed=annotation is None)
        self.remarks = list(self._table.remarks)
        if self._annotation is None:
            self._table.draw(fractions, seed)
            self.remarks.append(drawn_remark(fractions, seed))

    def __len__(self) -> int:
        return (self._table if self._annotation is None else self._annotation).count(self._limit)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields the studies of train, validation and test, each in the order of the table or the annotation.

        Rows that cannot be used and studies without the text are skipped and counted in `log`. Missing images are
        listed in `Study.problems`.
        """
        log.remarks += self.remarks
        if self._annotation is None:
            studies = self._listed(log)
        else:
            studies = map(self._annotated, self._annotation.unique(self._limit, log))
        yield from with_text(studies, self._section, log)

    def _listed(self, log: ImportLog) -> Iterator[Study]:
        self._table.skip_rows(log)
        for split, listed in self._table.studies(self._limit):
            log.read += 1
            yield self._study(split, listed)

    def _study(self, split: Split, listed: TableStudy) -> Study:
        images, views, problems = split_found(
            (self._find(*_names(path), dicom), view) for path, dicom, view in listed.images
        )
        return Study(
            study_id=listed.study_id,
            patient_id=listed.patient,
            split=split,
            image_paths=images,
            views=views,
            findings=listed.findings or None,
            impression=listed.impression or None,
            report=listed.findings or None,
            source=self.name,
            problems=(
                *problems,
                *(ImageProblem(path, "listed twice", f"line {line}") for path, line in listed.twice),
            ),
            extra=_extra(listed),
        )

    def _annotated(self, row: AnnotationRow) -> Study:
        listed_images = [(path, parse_path(path)) for path in row.image_paths]
        first = next((image for _, image in listed_images if image), None)
        listed = self._table.study(first.study) if first else None
        images, views, problems = split_found(
            (
                self._find(*_names(path), *_names(image.stem if image else "")),
                self._table.view(image) if image else UNKNOWN_VIEW,
            )
            for path, image in listed_images
        )
        report = row.report if row.report.strip() else None
        return Study(
            study_id=row.study_id,
            patient_id=row.patient_id or (first.patient if first else None),
            split=row.split,
            image_paths=images,
            views=views,
            # The texts of the published annotation are findings.
            findings=(listed.findings if listed else "") or report,
            impression=(listed.impression if listed else "") or None,
            report=report,
            source=self.name,
            problems=problems,
            extra=_extra(listed),
        )

    def _find(self, *names: str) -> Path | ImageProblem:
        return find_image(tuple(dict.fromkeys(filter(None, names))), self.root, self.image_folders)


def _extra(listed: TableStudy | None) -> dict[str, Any]:
    labels = label_columns(listed.labels if listed else NOT_MENTIONED)
    return {**labels, **{name: getattr(listed, name, "") or None for name in CONTEXT_FIELDS}}


def _names(path: str) -> tuple[str, ...]:
    """Returns the possible paths of an image: PNG, the path itself, JPEG, DICOM."""
    path = path.replace("\\", "/")
    stem = re.sub(r"\.(jpe?g|png|dcm)$", "", path, flags=re.IGNORECASE)
    return (f"{stem}.png", path, f"{stem}.jpg", f"{stem}.dcm") if stem else ()
