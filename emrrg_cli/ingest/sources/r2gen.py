"""Reads R2Gen's layout: an `annotation.json` with train, val and test, and a folder of images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from emrrg_cli.errors import UsageError
from emrrg_cli.ingest.sources.annotation import Annotation, AnnotationRow
from emrrg_cli.ingest.sources.image_paths import locate
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study
from emrrg_cli.vocabulary import UNKNOWN_VIEW

# R2Gen's ids of IU X-Ray: patient, then study. One of the 2,955 ids has an extra number in the middle: CXR1_1_IM-0001.
# Open-i's own ids, which we also write, have only the patient: CXR44.
IU_ID = re.compile(r"CXR(\d+)(?:(?:_\d+)?_IM-\d+.*)?", re.DOTALL)


class R2GenSource:
    """A data set in R2Gen's layout.

    Each row of `annotation.json` is a study: `id` (text or number), `report` (text or null), `image_path` (a path or a
    list of paths, relative to the folder of the file or to its `images/`), and, in MIMIC-CXR's file, `subject_id`.
    Paths must stay inside that folder; see `locate`.

    Args:
        root: The folder, or the JSON file itself.
        source: Name of the data set. None: `iu_xray` if all ids look like `CXR2384_IM-0942`, or some of them and the
            others like `CXR44`; otherwise `r2gen`.
        findings: Whether the reports are findings sections, as in R2Gen's own files.
        limit: Number of studies to read from the start of each split; None: all.

    Raises:
        UsageError: `root` does not exist or has no `annotation.json`, or `source` is empty.
        RunError: The file has the wrong format; the message names the row.

    Source: R2Gen (Chen et al., EMNLP 2020).
    """

    def __init__(
        self, root: Path, *, source: str | None = None, findings: bool = False, limit: int | None = None
    ) -> None:
        if source is not None and not source.strip():
            raise UsageError("--source is empty", hint="Give the data set a name, or leave the option out.")
        self.annotation = _find_annotation(root)
        self.root = self.annotation.parent.resolve()
        self.image_folders = (self.root, self.root / "images")
        self._rows = Annotation(self.annotation)
        self._limit, self._findings = limit, findings
        of_iu = all(IU_ID.fullmatch(row.study_id) for row in self._rows) and any(
            "_" in row.study_id for row in self._rows
        )
        self.name = source or ("iu_xray" if of_iu else "r2gen")

    def __len__(self) -> int:
        return self._rows.count(self._limit)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields the studies of train, validation and test, each in the file's order.

        Repeated ids (the first is kept, so that no study is in both train and test) and empty reports are skipped and
        counted in `log`. Images that are missing or outside the root are listed in `Study.problems`.
        """
        for row in self._rows.unique(self._limit, log):
            if row.report.strip():
                yield self._study(row)
            else:
                log.skip_study("empty report", row.study_id)

    def _study(self, row: AnnotationRow) -> Study:
        found = [locate(path, self.root, self.image_folders) for path in row.image_paths]
        images = tuple(image for image in found if isinstance(image, Path))
        return Study(
            study_id=row.study_id,
            patient_id=row.patient_id or self._patient(row.study_id),
            split=row.split,
            image_paths=images,
            views=(UNKNOWN_VIEW,) * len(images),  # the layout does not say
            findings=row.report if self._findings else None,
            impression=None,
            report=row.report,
            source=self.name,
            problems=tuple(image for image in found if isinstance(image, ImageProblem)),
        )

    def _patient(self, study_id: str) -> str | None:
        match = IU_ID.fullmatch(study_id) if self.name == "iu_xray" else None
        return match[1] if match else None


def _find_annotation(root: Path) -> Path:
    if root.is_file():
        return root
    if not root.exists():
        raise UsageError(f"no such folder: {root}", hint="ROOT is the folder that holds annotation.json.")
    annotation = root / "annotation.json"
    if not annotation.is_file():
        raise UsageError(
            f"no annotation.json in {root}",
            hint="ROOT is the folder of R2Gen's annotation.json, or the file itself under any name.",
        )
    return annotation
