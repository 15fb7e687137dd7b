"""Reads an annotation file of several data sets, whose image paths may name folders of another machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.views import view_of_path
from emrrg_cli.ingest.sources.annotation import Annotation, AnnotationRow
from emrrg_cli.ingest.sources.image_paths import MISSING, OUTSIDE, locate
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study
from emrrg_cli.vocabulary import UNKNOWN_VIEW

NAME = "combined"

# The patient in the paths of the three public sets: CXR2384_IM-0942, p10/p10000032/s50414267, patient00001.
_PATIENT = re.compile(r"(?:^|/)(?:CXR(\d+)_[^/]*IM-|p\d\d/p(\d+)/s\d|(patient\d+)/study)")


class CombinedSource:
    """An annotation file of several data sets in R2Gen's format, such as the one published for stage 2 of MambaXray-VL.

    The longest prefix in `moved` that matches an image path is replaced. The path must then name a file inside one of
    the roots (`locate`). A relative path is looked up in each root and its `images/`, in order.
    The name of the root becomes the `source` of the study, which decides how its report is cleaned, such as `iu_xray`.

    Args:
        annotation: The annotation file.
        roots: Folders of the data sets, by name.
        moved: Path prefixes in the file, and the folders of this machine that replace them.
        limit: Number of studies to read from the start of each split; None: all.

    Raises:
        UsageError: A folder or file does not exist, or a folder of `moved` is not inside a root.
        RunError: The file has the wrong format.

    Source: CXPMRG-Bench (arXiv 2410.00379).
    """

    name = NAME

    def __init__(
        self,
        annotation: Path,
        roots: Mapping[str, Path],
        *,
        moved: Mapping[str, Path] | None = None,
        limit: int | None = None,
    ) -> None:
        if not roots:
            raise UsageError("no --root", hint="Name each data set's folder: --root iu_xray=DIR --root mimic_cxr=DIR")
        for name, folder in roots.items():
            if not folder.is_dir():
                raise UsageError(f"--root {name}: no such folder: {folder}")
        self._roots = {name: folder.resolve() for name, folder in roots.items()}
        self._moved = {PurePosixPath(old.replace("\\", "/")): new.resolve() for old, new in (moved or {}).items()}
        for old, new in self._moved.items():
            if not any(new.is_relative_to(root) for root in self._roots.values()):
                raise UsageError(f"--map {old}: {new} is not inside a root", hint="Every image must be inside a root.")
        self.root = Path(os.path.commonpath(list(self._roots.values())))
        self.image_folders = tuple(self._roots.values())
        self._annotation, self._limit = Annotation(annotation), limit

    def __len__(self) -> int:
        return self._annotation.count(self._limit)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields the studies of train, validation and test, each in the file's order.

        Repeated ids of a data set and empty reports are skipped and counted in `log`. Images that are missing or not
        inside a root are listed in `Study.problems`.
        """
        seen: set[str] = set()
        for row in self._annotation.first(self._limit, log):
            log.read += 1
            study = self._study(row)
            name = f"{study.source}/{row.study_id}"
            repeated = name in seen
            seen.add(name)
            if repeated:
                log.skip_study("id seen before", row.study_id, detail=f"in {row.split}")
            elif not row.report.strip():
                log.skip_study("empty report", row.study_id)
            else:
                yield study

    def _study(self, row: AnnotationRow) -> Study:
        found = [self._locate(path) for path in row.image_paths]
        images = [pair for pair in found if not isinstance(pair, ImageProblem)]
        patients = (_PATIENT.search(path.replace("\\", "/")) for path in (*row.image_paths, row.study_id))
        patient = next((match[match.lastindex or 0] for match in patients if match), None)
        return Study(
            study_id=row.study_id,
            patient_id=row.patient_id or patient,
            split=row.split,
            image_paths=tuple(image for _, image in images),
            views=tuple(view_of_path(image.as_posix()) or UNKNOWN_VIEW for _, image in images),
            findings=None,
            impression=None,
            report=row.report,
            source=images[0][0] if images else self.name,
            problems=tuple(image for image in found if isinstance(image, ImageProblem)),
        )

    def _locate(self, path: str) -> tuple[str, Path] | ImageProblem:
        """Returns the image and the name of its root, or why there is no image."""
        here = self._here(path)
        # A root without the image reports OUTSIDE for an absolute path and MISSING for a relative one.
        telling = MISSING if Path(here).is_absolute() else OUTSIDE
        problem: ImageProblem | None = None
        for name, root in self._roots.items():
            found = locate(here, root, (root, root / "images"))
            if isinstance(found, Path):
                return name, found
            if problem is None or found.reason == telling:
                problem = found
        reason = problem.reason if problem else MISSING
        return ImageProblem(path, reason, f"looked up as {here}" if here != path else "")

    def _here(self, path: str) -> str:
        pure = PurePosixPath(path.replace("\\", "/"))
        fitting = [old for old in self._moved if pure.is_relative_to(old)]
        if not fitting:
            return str(pure) if "\\" in path else path
        old = max(fitting, key=lambda prefix: len(prefix.parts))
        return str(self._moved[old] / pure.relative_to(old))


def parse_pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Splits each `NAME=DIR` at its first `=` into name and folder.

    Raises:
        UsageError: A pair has no `=`, nothing before or after it, or the same name as an earlier pair.
    """
    parsed: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name.strip() or not value.strip():
            raise UsageError(f"{option} {pair!r} has no name or no folder", hint=f"Write {option} NAME=FOLDER.")
        if name in parsed:
            raise UsageError(f"{option} {name} is given twice")
        parsed[name] = value
    return parsed
