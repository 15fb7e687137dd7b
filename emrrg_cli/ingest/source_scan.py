"""Reads a source once without decoding images: counts studies, finds patients in two splits, computes a fingerprint."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError
from emrrg_cli.imaging.views import projection
from emrrg_cli.ingest.selection import select
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study, StudySource
from emrrg_cli.recipe.preprocessing import PreprocessRecipe
from emrrg_cli.vocabulary import SPLITS, Split

_EXAMPLES = 5
# One shared object for each set of splits, to save memory.
_SETS = {
    chosen: chosen
    for count in range(1, len(SPLITS) + 1)
    for chosen in map(frozenset[Split], combinations(SPLITS, count))
}
_SAMPLE = 40


@dataclass
class SourceScan:
    """What a source contains after the selection of the recipe.

    Attributes:
        log: Items that were skipped while reading.
        studies: Studies to write, by split.
        images: Images to write, by split.
        views: Images to write, by projection.
        problems: Images already known to be unusable, by reason, with the first as `(study, problem)`.
        leaks: Number of patients in more than one split.
        leaking: The first of these patients.
        digest: Digest of every study and of the size and time of its files, in hexadecimal.
        sample: Some studies, evenly spread over the source.
    """

    log: ImportLog = field(default_factory=ImportLog)
    studies: Counter[Split] = field(default_factory=Counter)
    images: Counter[Split] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    first_problems: dict[str, tuple[str, ImageProblem]] = field(default_factory=dict)
    leaks: int = 0
    leaking: list[str] = field(default_factory=list)
    digest: str = ""
    sample: list[Study] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Studies of all splits."""
        return self.studies.total()

    def add_patient(self, study: Study, splits_of: dict[str, frozenset[Split]]) -> None:
        """Record the split of the study's patient. A patient in a second split is counted once."""
        patient = study.patient_id or ""
        before = splits_of.get(patient, frozenset())
        if len(before) == 1 and study.split not in before:
            self.leaks += 1
            if len(self.leaking) < _EXAMPLES:
                self.leaking.append(f"{printable(patient)} (study {printable(study.study_id)})")
        if study.split not in before:
            splits_of[patient] = _SETS[before | {study.split}]

    def check_leakage(self) -> None:
        """Checks that no patient is in two splits.

        Raises:
            RunError: A patient is in two splits; the message names the first ones.
        """
        if self.leaks:
            some = ", ".join(self.leaking) + (", ..." if self.leaks > len(self.leaking) else "")
            what = "1 patient is" if self.leaks == 1 else f"{self.leaks:,} patients are"
            raise RunError(
                f"{what} in more than one split: {some}",
                hint="A model would be tested on patients it was trained on. Correct the splits, or pass "
                "--allow-leakage if a published split has them.",
            )


def scan_source(
    source: StudySource, recipe: PreprocessRecipe, report_progress: Callable[[int], None] = lambda read: None
) -> SourceScan:
    """Reads all studies of a source.

    Args:
        source: The source; it is read once, from its start.
        recipe: The selection.
        report_progress: Called now and then with the number of studies read.
    """
    found = SourceScan()
    digest = hashlib.blake2b(digest_size=16)
    splits_of: dict[str, frozenset[Split]] = {}
    step = 1
    for number, study in enumerate(select(source.studies(found.log), recipe, source.root, found.log)):
        if number % 256 == 0:
            report_progress(found.log.read)
        found.studies[study.split] += 1
        found.images[study.split] += len(study.views)
        found.views.update(projection(view) for view in study.views)
        for problem in study.problems:
            found.problems[problem.reason] += 1
            found.first_problems.setdefault(problem.reason, (study.study_id, problem))
        if study.patient_id is not None:
            found.add_patient(study, splits_of)
        digest.update(_identity(study))
        if number % step == 0:
            found.sample.append(study)
            if len(found.sample) == 2 * _SAMPLE:
                found.sample, step = found.sample[::2], 2 * step
    found.digest = digest.hexdigest()
    return found


def _identity(study: Study) -> bytes:
    """Values that differ between two studies, and change when a file of a study is replaced."""
    files = [(str(path), *_state(path)) for path in study.image_paths]
    rendered = [image.name for image in study.rendered]
    texts: list[Any] = [study.study_id, study.patient_id, study.split, study.source, study.views]
    texts += [study.findings, study.impression, study.report, sorted(study.extra.items()), study.problems]
    return repr((texts, files, rendered)).encode("utf-8", "backslashreplace")


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns
