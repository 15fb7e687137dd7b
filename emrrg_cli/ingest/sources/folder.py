"""Reads any folder of images and DICOM files, with or without a table of texts."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.directory import Column
from emrrg_cli.datasets.manifest import MANIFEST
from emrrg_cli.datasets.splits import drawn_remark
from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.base import RASTER_SUFFIXES
from emrrg_cli.imaging.dicom.facts import DicomFacts, find_dicom_facts, study_name
from emrrg_cli.imaging.image_paths import files_below
from emrrg_cli.imaging.views import view_name
from emrrg_cli.ingest.sources.drafts import Draft, Drafts
from emrrg_cli.ingest.sources.image_paths import MISSING, listed_images, locate, require_folder
from emrrg_cli.ingest.sources.table import Table, cell_list, cell_text, read_table
from emrrg_cli.ingest.sources.text_files import encoding_remarks
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study
from emrrg_cli.reporting.summary_page import DATA, PAGE
from emrrg_cli.vocabulary import CONTEXT_FIELDS, SPLIT_NAMES, Split

_LABELS = "labels, unchanged from the table"


@dataclass(frozen=True)
class Columns:
    """Column names of a table; None: the table has no such column."""

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
        """The context columns, by field."""
        return {field: name for field in CONTEXT_FIELDS if (name := getattr(self, field)) is not None}

    def named(self) -> dict[str, str]:
        """Returns the given columns, by option."""
        return {f"--{kind}-column": name for kind, name in vars(self).items() if name is not None}


class FolderSource:
    """Images and DICOM files below a folder, as studies.

    Without a table, every file whose name does not begin with a dot is tried. DICOM files are grouped by `study_name`;
    any other file is a study, named by its path. There are no reports. With a table, the rows list the images
    (`listed_images`), and rows with the same `study` form one study. If no column gives the patient or the view of a
    DICOM file, they come from its header.

    `report` is the report column, or else findings followed by impression. Labels go to the column `labels` of the
    dataset, and each context field (indication and others) to a column with its name.

    Args:
        root: The folder. Every image must be inside it; see `locate`.
        table: CSV, TSV or JSON lines; image paths are relative to `root` or to its `images/`. A name without folders
            may be that of a file at any depth.
        columns: Columns of the table.
        fractions: Fractions of train, validation and test in a random split by patient; not used with a split column.
        seed: Random seed of the split.
        source: Name of the data set.
        limit: Number of studies to read from the start of each split; None: all.

    Raises:
        UsageError: The folder, the table or a column does not exist, or the folder is empty.
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
        self._unknown_splits: defaultdict[str, list[ImageProblem]] = defaultdict(list)
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
        """Yields the studies of train, validation and test, each in the order of the table or the paths.

        Rows that cannot be used and studies with empty text are skipped and counted in `log`. Images that are missing
        or outside the folder are listed in `Study.problems`.
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
        patients: dict[str, str] = {}
        for path in self._walk():
            name = printable(path.relative_to(self.root).as_posix())
            found = locate(str(path), self.root, (self.root,))
            if isinstance(found, ImageProblem):
                self._drafts.add(Draft(name, problems=[replace(found, path=name)]))
                continue
            facts = find_dicom_facts(found)
            study_id = study_name(facts, patients) or name
            draft = self._drafts.get(study_id) or Draft(study_id, patient_id=_patient(facts))
            draft.images[str(found)] = view_name(facts.view if facts else "")
            self._drafts.add(draft)
        if not self._drafts.count(None):
            raise UsageError(f"no files in {self.root}")
        self.remarks.append("Without a table there are no reports: use this dataset only for stages that need no text.")

    def _walk(self) -> Iterator[Path]:
        """Yields all files except hidden ones and our own, sorted, and counts folders that cannot be read."""

        def unreadable(error: OSError) -> None:
            path = printable(os.path.relpath(error.filename or self.root, self.root))
            self._skip("folder cannot be read", path, detail=error.strerror or "")

        is_output = cache(_is_output)
        for path in files_below(self.root, unreadable):
            depth = len(path.relative_to(self.root).parents) - 1  # folders between the root and the file
            if not any(is_output(folder) for folder in path.parents[:depth]):
                yield path

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """The files by name, for tables that have no folders, such as that of ChestX-ray14."""
        found: dict[str, list[Path]] = {}
        for path in self._walk():
            found.setdefault(path.name, []).append(path)
        return found

    def _locate(self, path: str) -> Path | ImageProblem:
        found = locate(path, self.root, self.image_folders)
        if isinstance(found, Path) or found.reason != MISSING:
            return found
        files = self._by_name.get(path, [])  # a path with folders is no name
        if len(files) > 1:
            places = (file.relative_to(self.root).as_posix() for file in files[:2])
            return ImageProblem(path, "several files of this name", " and ".join(places))
        return locate(str(files[0]), self.root, (self.root,)) if files else found

    # With a table.

    def _from_table(self, table: Table, columns: Columns) -> None:
        table.check_columns(columns.named())
        self.remarks += encoding_remarks(table.path, table.encoding)
        texts = {kind: name for kind in ("report", "findings", "impression") if (name := getattr(columns, kind))}
        if not texts:
            self.remarks.append("No column with text was named: use this dataset only for stages that need no text.")
        for number, row in table.rows():
            where = f"{table.path.name}:{number}"
            if row is None:
                self._skip("row and header differ in length", where)
                continue
            draft = self._draft(row, where, columns, texts)
            if draft is not None:
                self._add(draft, where, merge=columns.study is not None)
        for study_id, problems in self._unknown_splits.items():
            if first := self._drafts.get(study_id):
                first.problems += problems
            else:
                self._skip(problems[0].reason, study_id, problems[0].detail)

    def _draft(self, row: dict[str, Any], where: str, columns: Columns, texts: dict[str, str]) -> Draft | None:
        """Returns one row as a study, or None if the row cannot be used."""

        def cell(column: str | None) -> str:
            return cell_text(row.get(column)) if column else ""

        paths = listed_images(row.get(columns.image), self.image_folders)
        views = cell_list(row.get(columns.view)) if columns.view else []
        views = views if len(views) == len(paths) else [cell(columns.view)] * len(paths)
        study_id = cell(columns.study) if columns.study else (paths[0] if paths else "")
        if not study_id:
            self._skip("no study id" if columns.study else "no image listed", where)
            return None
        split = SPLIT_NAMES.get(cell(columns.split).lower()) if columns.split else None
        if columns.split and split is None:
            detail = f"{where}: {cell(columns.split) or 'empty'}"
            if columns.study:  # other rows of the study may have a split
                self._unknown_splits[study_id].append(ImageProblem(", ".join(paths), "unknown split", detail))
            else:
                self._skip("unknown split", study_id, detail)
            return None
        draft = Draft(study_id, cell(columns.patient) or None, split)
        draft.texts = {kind: cell(name) for kind, name in texts.items()}
        draft.context = {field: cell(name) for field, name in columns.context.items()}
        draft.labels = cell_list(row.get(columns.labels)) if columns.labels else []
        for path, view in zip(paths, views, strict=True):
            found = self._locate(path)
            if isinstance(found, ImageProblem):
                draft.problems.append(found)
                continue
            # A DICOM file may have any suffix or none, except those of other image formats: such a file is not opened.
            facts = None if found.suffix.lower() in RASTER_SUFFIXES else find_dicom_facts(found)
            draft.images[str(found)] = view_name(view or (facts.view if facts else ""))
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
                first.problems += [
                    ImageProblem(printable(Path(path).name), "row differs from its study", f"{where}: another {what}")
                    for path in draft.images or [where]
                ]
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


def _is_output(folder: Path) -> bool:
    """Whether emrrg wrote this folder: a dataset directory, or its summary, whose contact sheet is not a film."""
    return any((folder / one).exists() and (folder / two).exists() for one, two in ((MANIFEST, "data"), (DATA, PAGE)))


def _patient(facts: DicomFacts | None) -> str | None:
    return printable(facts.patient_id) if facts and facts.patient_id else None
