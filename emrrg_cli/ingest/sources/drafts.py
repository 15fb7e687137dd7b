"""Studies that are assembled from the rows of a table or from files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from emrrg_cli.console import printable
from emrrg_cli.datasets.splits import draw_splits
from emrrg_cli.ingest.study import ImageProblem
from emrrg_cli.vocabulary import SPLITS, Split


@dataclass(slots=True)
class Draft:
    """A study while its rows are collected. `images` maps paths to views."""

    study_id: str
    patient_id: str | None = None
    split: Split | None = None
    images: dict[str, str] = field(default_factory=dict)
    problems: list[ImageProblem] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    context: dict[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The key of the group that must stay in one split: the patient, or the study if the patient is unknown."""
        return f"p{self.patient_id}" if self.patient_id else f"s{self.study_id}"


class Drafts:
    """Studies by id, in the order in which they were added, and rows that cannot be used.

    Attributes:
        skipped: Reason, study id and detail of these rows.
    """

    def __init__(self) -> None:
        self.skipped: list[tuple[str, str, str]] = []
        self._drafts: dict[str, Draft] = {}

    def skip(self, reason: str, study_id: str, detail: str) -> None:
        """Records a row that cannot be used."""
        self.skipped.append((reason, printable(study_id), printable(detail)))

    def get(self, study_id: str) -> Draft | None:
        """Returns the study with this id, or None."""
        return self._drafts.get(study_id)

    def add(self, draft: Draft) -> None:
        """Adds a study whose id is new."""
        self._drafts[draft.study_id] = draft

    def draw(self, fractions: Sequence[float], seed: int) -> int:
        """Draws the split of each patient; returns how many studies have no patient."""
        splits = draw_splits((draft.unit for draft in self._drafts.values()), fractions, seed)
        for study_id, draft in self._drafts.items():
            self._drafts[study_id] = replace(draft, split=splits[draft.unit])
        return sum(draft.patient_id is None for draft in self._drafts.values())

    def count(self, limit: int | None) -> int:
        """Returns the number of studies that `first` yields plus the skipped rows."""
        counts = Counter(draft.split for draft in self._drafts.values()).values()
        return len(self.skipped) + sum(count if limit is None else min(limit, count) for count in counts)

    def first(self, limit: int | None) -> Iterator[tuple[Split, Draft]]:
        """Yields the first `limit` studies of train, validation and test, each in the order of `add`."""
        for split in SPLITS:
            chosen = (draft for draft in self._drafts.values() if draft.split == split)
            yield from ((split, draft) for draft in islice(chosen, limit))
