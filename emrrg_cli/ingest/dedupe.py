"""Finds duplicate images and reports in the journals of the shards, and drops duplicate images on request.

Images are compared by their bytes and by their content (`emrrg_cli.ingest.duplicates`), reports word by word. Reports
are never dropped, because many patients have the same normal report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from emrrg_cli.ingest.duplicates import Duplicate, find_duplicates
from emrrg_cli.ingest.shards import REPORT_HASH_BYTES, SplitShards
from emrrg_cli.ingest.study import ImportLog
from emrrg_cli.vocabulary import SPLITS, Split

# A duplicate is kept in test first, then validation, then train, so published test sets do not change.
_KEPT_FIRST: tuple[Split, ...] = SPLITS[::-1]
_EXAMPLES = 5

DUPLICATE_IMAGE, DUPLICATE_STUDY = "duplicate image", "only duplicate images"


@dataclass(frozen=True)
class Shard:
    """A shard of the dataset: its index among the written shards, and the studies and images that remain in it."""

    split: Split
    index: int
    studies: int
    images: int
    dropped: tuple[tuple[int, int], ...] = ()  # (study in the shard, view of the study)


@dataclass(frozen=True)
class Plan:
    """How finished shards become a dataset directory.

    Attributes:
        shards: The remaining shards, in order.
        duplicates: Entry of the manifest; empty if duplicates were not searched.
        skipped: Log entries of dropped duplicates.
    """

    shards: tuple[Shard, ...]
    duplicates: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        shards = tuple(
            Shard(**{**shard, "dropped": tuple(map(tuple, shard["dropped"]))}) for shard in content["shards"]
        )
        return cls(shards, content["duplicates"], content["skipped"])


def make_plan(splits: Mapping[Split, SplitShards], *, look: bool, drop: bool) -> Plan:
    """Searches finished shards for duplicates and decides what is written.

    Args:
        splits: The shards.
        look: Whether duplicates are searched and reported; the journals must have hashes.
        drop: Whether duplicate images are dropped.
    """
    if not look:
        return Plan(
            tuple(
                Shard(split, index, journal.studies, journal.images)
                for split, shards in splits.items()
                for index, journal in enumerate(shards.journals())
                if journal.studies
            )
        )
    index = _Index(splits)
    found = find_duplicates(bytes(index.hashes), index.study, index.rank)
    dropped: dict[int, list[tuple[int, int]]] = {}
    log = ImportLog()
    if drop:
        for duplicate in found:
            number, study, view = index.place(duplicate.index)
            dropped.setdefault(number, []).append((study, view))
        index.count(found, log)
    kept = []
    for number, shard in enumerate(index.shards):
        gone = dropped.get(number, [])
        per_study = np.array(index.views[number])
        for study, _ in gone:
            per_study[study] -= 1
        if left := int((per_study > 0).sum()):
            kept.append(Shard(shard.split, shard.index, left, shard.images - len(gone), tuple(gone)))
    return Plan(tuple(kept), index.summary(found, dropped=drop), log.as_dict())


class _Index:
    """The images of the finished shards, with hash, study and place."""

    def __init__(self, splits: Mapping[Split, SplitShards]) -> None:
        self._splits = splits
        self.shards: list[Shard] = []
        self.views: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        self.hashes, self._reports = bytearray(), bytearray()
        for split, shards in splits.items():
            for number, journal in enumerate(shards.journals()):
                if journal.studies:
                    self.shards.append(Shard(split, number, journal.studies, journal.images))
                    self.views.append(np.array(journal.views, np.int32))
                    self.hashes += bytes.fromhex(journal.hashes)
                    self._reports += bytes.fromhex(journal.reports)
        views = np.concatenate(self.views) if self.views else np.zeros(0, np.int32)
        self.study = np.repeat(np.arange(len(views), dtype=np.int64), views)
        self._starts = np.concatenate(([0], np.cumsum(views)))  # first image of each study
        self._first_study = np.concatenate(([0], np.cumsum([shard.studies for shard in self.shards]))).astype(np.int64)
        ranks = [_KEPT_FIRST.index(shard.split) for shard in self.shards]
        self._study_rank = np.repeat(np.array(ranks, np.int64), [shard.studies for shard in self.shards])
        self.rank = self._study_rank[self.study]

    def place(self, image: int) -> tuple[int, int, int]:
        """Returns the number of the shard, the study in it and the view of the study."""
        study = int(self.study[image])
        shard = int(np.searchsorted(self._first_study, study, side="right")) - 1
        return shard, study - int(self._first_study[shard]), image - int(self._starts[study])

    def split(self, image: int) -> Split:
        return self.shards[self.place(image)[0]].split

    def names(self, images: Iterable[int]) -> dict[int, tuple[str, str]]:
        """Reads study id and name of some images from their shards."""
        wanted: dict[int, list[int]] = {}
        for image in images:
            wanted.setdefault(self.place(image)[0], []).append(image)
        names = {}
        for shard, of_shard in wanted.items():
            file = self._splits[self.shards[shard].split].path(self.shards[shard].index)
            table = pq.ParquetFile(file).read(columns=["study_id", "images.list.element.path"])
            for image in of_shard:
                _, study, view = self.place(image)
                names[image] = (table["study_id"][study].as_py(), table["images"][study].as_py()[view]["path"])
        return names

    def count(self, found: Sequence[Duplicate], log: ImportLog) -> None:
        """Counts dropped images, and studies that have only dropped images."""
        gone = np.bincount(self.study[[duplicate.index for duplicate in found]], minlength=len(self._starts) - 1)
        whole = gone == np.diff(self._starts)
        alone = [duplicate for duplicate in found if not whole[self.study[duplicate.index]]]
        lost = {int(self.study[d.index]): d for d in reversed(found) if whole[self.study[d.index]]}
        first_of_study = [lost[study] for study in sorted(lost)]
        for reason, duplicates in ((DUPLICATE_IMAGE, alone), (DUPLICATE_STUDY, first_of_study)):
            names = self.names(i for d in duplicates[:_EXAMPLES] for i in (d.index, d.first))
            for duplicate in duplicates:
                study, path = names.get(duplicate.index, ("", ""))
                as_in = f"as {self.split(duplicate.first)}: {', '.join(names.get(duplicate.first, ()))}"
                if reason == DUPLICATE_IMAGE:
                    log.leave_out_image(study, path, reason, as_in)
                else:
                    log.skip_study(reason, study, path=path, detail=as_in)

    def summary(self, found: Sequence[Duplicate], *, dropped: bool) -> dict[str, Any]:
        """Returns the counts and examples for the manifest."""
        crossing = [d for d in found if self.rank[d.index] != self.rank[d.first]]
        shown = (crossing or list(found))[:_EXAMPLES]
        names = self.names(i for d in shown for i in (d.index, d.first))
        examples = [
            {
                "id": names[d.index][0],
                "path": names[d.index][1],
                "split": self.split(d.index),
                "as_id": names[d.first][0],
                "as_path": names[d.first][1],
                "as_split": self.split(d.first),
                "exact": d.exact,
            }
            for d in shown
        ]
        return {
            "images": {
                "exact": sum(d.exact for d in found),
                "near": sum(not d.exact for d in found),
                "across_splits": len(crossing),
                "dropped": dropped,
                "examples": examples,
            },
            "reports": self._repeated_reports(),
        }

    def _repeated_reports(self) -> dict[str, int]:
        """Counts repeated reports, and studies of validation and test whose report is also in train."""
        reports = np.frombuffer(bytes(self._reports), f"V{REPORT_HASH_BYTES}").view(np.uint64)
        there = reports != 0
        reports, rank = reports[there], self._study_rank[there]
        train = _KEPT_FIRST.index("train")
        held_out = reports[rank != train]
        return {
            "repeated": int(len(reports) - len(np.unique(reports))),
            "across_splits": int(np.isin(held_out, reports[rank == train]).sum()),
        }


def remarks_about(duplicates: Mapping[str, Any]) -> list[str]:
    """Returns the result as sentences for the manifest."""
    if not duplicates:
        return []
    images, reports = duplicates["images"], duplicates["reports"]
    total = images["exact"] + images["near"]
    remarks = [
        f"Duplicate images: {total:,} ({images['exact']:,} exact, {images['near']:,} nearly equal), "
        f"{images['across_splits']:,} of them across splits"
        + ("; one copy was kept, in test first, then validation, then train." if images["dropped"] else ".")
    ]
    if images["across_splits"] and not images["dropped"]:
        example = images["examples"][0]
        remarks.append(
            f"Leakage: {example['path']} of study {example['id']} ({example['split']}) is also "
            f"{example['as_path']} of study {example['as_id']} ({example['as_split']}). `--dedupe drop` drops one."
        )
    if reports["repeated"]:
        remarks.append(
            f"Reports with the same words as an earlier one: {reports['repeated']:,}; studies of validation and "
            f"test whose report is also in train: {reports['across_splits']:,}. "
            "Repeated reports are never dropped."
        )
    return remarks


assert set(_KEPT_FIRST) == set(SPLITS)
