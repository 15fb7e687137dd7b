"""Any folder of images and DICOM files, with or without a table of texts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.directory import Column
from emrrg_cli.datasets.splits import drawn_remark
from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.base import DICOM_SUFFIXES, ImageError, is_dicom, open_stream
from emrrg_cli.imaging.dicom.facts import DicomFacts, read_dicom_facts
from emrrg_cli.imaging.image_paths import files_below
from emrrg_cli.imaging.views import view_name
from emrrg_cli.ingest.sources.drafts import Draft, Drafts
from emrrg_cli.ingest.sources.image_paths import locate, require_folder
from emrrg_cli.ingest.sources.table import Table, cell_list, cell_text, read_table
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study
from emrrg_cli.vocabulary import CONTEXT_FIELDS, SPLIT_NAMES, Split

_OTHER_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")  # no DICOM is called so
_LABELS = "labels of the table, as it writes them"


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None: the table does not have it."""

    image: str = "image"
    report: str | None = None
    findings: str | None = None
    impression: str | None = None
    split: str | None = None
    patient: str | None = None
    study: str | None = None
    view: str | None = None
    labels: str | None = None
    indication: str | None = None
    comparison: str | None = None
    technique: str | None = None
    age: str | None = None
    sex: str | None = None

    @property
    def context(self) -> dict[str, str]:
        """Those of the context, by its fields."""
        return {field: name for field in CONTEXT_FIELDS if (name := getattr(self, field)) is not None}

    def named(self) -> dict[str, str]:
        """Option and column, of those that are given."""
        return {f"--{kind}-column": name for kind, name in vars(self).items() if name is not None}


class FolderSource:
    """Images and DICOM files below a folder, as studies.

    Without a table every file that does not begin with a dot is tried: DICOM files are grouped by Study Instance UID,
    any other file is a study of its own, named by its path; there are no reports. With a table its rows say which
    images there are; rows of the same `study` are one study. The patient and the view of a DICOM file come from its
    header where no column says them.

    Texts: `report` is the column of that name, else findings and impression, one after the other. Labels become the
    column `labels` of the dataset, indication and the rest of the context columns of their names.

    Args:
        root: The folder. Every image must lie inside it, links followed.
        table: CSV, TSV or JSON lines; image paths are relative to `root` or to `images/` in it.
        columns: Of the table.
        fractions: Parts of train, validation and test, drawn by patient, where there is no split column.
        seed: Of that draw.
        source: Name of the data set.
        limit: First studies of each split that are read; None: all.

    Raises:
        UsageError: No such folder or table, an empty folder, a column that is not there.
        RunError: The table cannot be read.
    """

    def __init__(
        self,
        root: Path,
        *,
        table: Path | None = None,
        columns: Columns | None = None,
        fractions: tuple[float, ...] = (0.8, 0.1, 0.1),
        seed: int = 0,
        source: str | None = None,
        limit: int | None = None,
    ) -> None:
        if source is not None and not source.strip():
            raise UsageError("--source is empty", hint="Give the data set a name, or leave the option out.")
        require_folder(root)
        self.name = source or "folder"
        self.root = root.resolve()
        self.image_folders = (self.root, self.root / "images")
        self.columns = {"labels": Column("texts", _LABELS)} if columns and columns.labels else {}
        self._context = tuple(columns.context) if columns else ()
        self.columns |= {field: Column("text", "column of the table") for field in self._context}
        self.about = ""
        self.remarks: list[str] = []
        self._limit = limit
        self._drafts = Drafts()
        if table is None:
            self._from_files()
        else:
            self._from_table(read_table(table), columns or Columns())
        if table is None or columns is None or columns.split is None:
            alone = self._drafts.draw(fractions, seed)
            self.remarks.append(drawn_remark(fractions, seed, alone))

    def __len__(self) -> int:
        return self._drafts.count(self._limit)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields train, validation, test, each in the order of the table or the paths.

        Left out and counted in `log`: rows that cannot be used, studies whose text is empty. Images that are
        missing or outside the folder travel with their study as problems.
        """
        log.remarks += self.remarks
        for reason, study_id, detail in self._drafts.skipped:
            log.read += 1
            log.skip_study(reason, study_id, detail=detail)
        for split, draft in self._drafts.first(self._limit):
            log.read += 1
            if draft.texts and not any(draft.texts.values()):
                log.skip_study("empty report", draft.study_id)
                continue
            yield self._study(split, draft)

    def _study(self, split: Split, draft: Draft) -> Study:
        findings, impression = draft.texts.get("findings"), draft.texts.get("impression")
        report = draft.texts.get("report") or "\n".join(filter(None, (findings, impression)))
        return Study(
            study_id=draft.study_id,
            patient_id=draft.patient_id,
            split=split,
            image_paths=tuple(map(Path, draft.images)),
            views=tuple(draft.images.values()),
            findings=findings or None,
            impression=impression or None,
            report=report or None,
            source=self.name,
            problems=tuple(draft.problems),
            extra=({"labels": draft.labels} if "labels" in self.columns else {})
            | {field: draft.context.get(field) or None for field in self._context},
        )

    # Without a table.

    def _from_files(self) -> None:
        for path in self._walk():
            name = printable(path.relative_to(self.root).as_posix())
            found = locate(str(path), self.root, (self.root,))
            if isinstance(found, ImageProblem):
                self._drafts.add(Draft(name, problems=[replace(found, path=name)]))
                continue
            facts = _dicom_facts(found)
            study_id = printable(facts.study_uid) if facts and facts.study_uid else name
            draft = self._drafts.get(study_id) or Draft(study_id, patient_id=_patient(facts))
            draft.images[str(found)] = view_name(facts.view if facts else "")
            self._drafts.add(draft)
        if not self._drafts.count(None):
            raise UsageError(f"no files in {self.root}")
        self.remarks.append("Without a table there are no reports: this dataset serves stages that need images only.")

    def _walk(self) -> Iterator[Path]:
        """All files, sorted, without hidden ones; folders that cannot be read are counted."""

        def unreadable(error: OSError) -> None:
            path = printable(os.path.relpath(error.filename or self.root, self.root))
            self._skip("folder cannot be read", path, detail=error.strerror or "")

        yield from files_below(self.root, unreadable)

    # With a table.

    def _from_table(self, table: Table, columns: Columns) -> None:
        table.check_columns(columns.named())
        if table.encoding == "cp1252":
            self.remarks.append(f"{table.path.name} is not UTF-8: it was read as Windows-1252.")
        texts = {kind: name for kind in ("report", "findings", "impression") if (name := getattr(columns, kind))}
        if not texts:
            self.remarks.append("No column with text was named: this dataset serves stages that need images only.")
        for number, row in table.rows():
            where = f"{table.path.name}:{number}"
            if row is None:
                self._skip("row of another length than the header", where)
                continue
            draft = self._draft(row, where, columns, texts)
            if draft is not None:
                self._add(draft, where, merge=columns.study is not None)

    def _draft(self, row: dict[str, Any], where: str, columns: Columns, texts: dict[str, str]) -> Draft | None:
        """One row as a study, or None where it cannot be one."""

        def cell(column: str | None) -> str:
            return cell_text(row.get(column)) if column else ""

        image = row.get(columns.image)
        paths = [cell_text(path) for path in (image if isinstance(image, list) else [image])]
        paths = [path for path in paths if path]
        study_id = cell(columns.study) if columns.study else (paths[0] if paths else "")
        if not study_id:
            self._skip("no study id" if columns.study else "no image listed", where)
            return None
        split = SPLIT_NAMES.get(cell(columns.split).lower()) if columns.split else None
        if columns.split and split is None:
            self._skip("unknown split", study_id, detail=f"{where}: {cell(columns.split) or 'empty'}")
            return None
        draft = Draft(study_id, cell(columns.patient) or None, split)
        draft.texts = {kind: cell(name) for kind, name in texts.items()}
        draft.context = {field: cell(name) for field, name in columns.context.items()}
        draft.labels = cell_list(row.get(columns.labels)) if columns.labels else []
        for path in paths:
            found = locate(path, self.root, self.image_folders)
            if isinstance(found, ImageProblem):
                draft.problems.append(found)
                continue
            # A DICOM file may have any name or none; one named as another kind of image is not opened for it.
            facts = None if found.suffix.lower() in _OTHER_SUFFIXES else _dicom_facts(found)
            draft.images[str(found)] = view_name(cell(columns.view) or (facts.view if facts else ""))
            draft.patient_id = draft.patient_id or (None if columns.patient else _patient(facts))
        return draft

    def _add(self, draft: Draft, where: str, *, merge: bool) -> None:
        first = self._drafts.get(draft.study_id)
        if first is None:
            self._drafts.add(draft)
            return
        if not merge:
            self._skip("id seen before", draft.study_id, detail=where)
            return
        for kind in ("patient_id", "split", "texts"):
            if getattr(first, kind) != getattr(draft, kind):
                what = {"patient_id": "patient", "split": "split", "texts": "text"}[kind]
                self._skip("row differs from its study", draft.study_id, detail=f"{where}: another {what}")
                return
        for path, view in draft.images.items():
            if path in first.images:
                first.problems.append(ImageProblem(printable(Path(path).name), "listed twice", where))
            else:
                first.images[path] = view
        first.problems += draft.problems
        first.context = {field: text or draft.context[field] for field, text in first.context.items()}
        first.labels += [label for label in draft.labels if label not in first.labels]

    def _skip(self, reason: str, study_id: str, detail: str = "") -> None:
        self._drafts.skip(reason, study_id, detail)


def _dicom_facts(path: Path) -> DicomFacts | None:
    """The facts of a DICOM file; None for others, and for one that cannot be read: decoding it will say why."""
    try:
        with open_stream(path, str(path)) as (stream, _):
            candidate = is_dicom(stream) or path.suffix.lower() in DICOM_SUFFIXES
        return read_dicom_facts(path) if candidate else None
    except (ImageError, OSError):
        return None


def _patient(facts: DicomFacts | None) -> str | None:
    return printable(facts.patient_id) if facts and facts.patient_id else None
