"""The study ids that a source has read so far."""

from __future__ import annotations

from emrrg_cli.ingest.study import ImportLog
from emrrg_cli.vocabulary import Split


class SeenIds:
    """The ids that were read so far, each with its split."""

    def __init__(self) -> None:
        self._splits: dict[str, Split] = {}

    def add(self, study_id: str, split: Split) -> Split | None:
        """Adds an id; returns the split of an earlier study with this id, or None."""
        before = self._splits.get(study_id)
        if before is None:
            self._splits[study_id] = split
        return before

    def skip(self, study_id: str, split: Split, log: ImportLog) -> bool:
        """Adds an id and returns whether it was seen before; a repeated id is counted in `log`, the first is kept.

        A repeated study would be trained on twice, or be in both train and test.
        """
        before = self.add(study_id, split)
        if before is not None:
            log.skip_study("id seen before", study_id, detail=f"in {split}, kept from {before}")
        return before is not None
