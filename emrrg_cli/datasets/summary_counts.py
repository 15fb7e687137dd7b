"""Counts the rows of a dataset directory for `summarise`."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emrrg_cli.datasets.directory import FEATURES
from emrrg_cli.datasets.parquet_rows import text_rows
from emrrg_cli.datasets.summary_types import Repeated, SplitCounts
from emrrg_cli.vocabulary import UNKNOWN_VIEW

MOST = 30  # number of labels, views and sentences kept
_REPEATED = 5  # number of repeated reports kept

# A line end is not a sentence end, because reports may be wrapped.
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")

Hashes = Mapping[str, "array[int]"]
Shards = Mapping[str, Sequence[Path]]


class SummaryCounts:
    """The counts of a dataset directory.

    Patients, reports and sentences are kept as hashes of 8 bytes; `repeated_reports` and `common_sentences` read the
    displayed texts again.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.splits = {split: SplitCounts() for split in shards}
        self.patients = {split: array("Q") for split in shards}
        self.reports = {split: array("Q") for split in shards}
        self.sentences = array("Q")
        self.sources: Counter[str] = Counter()
        self.views: dict[str, Counter[str]] = {}
        self.labels: dict[str, dict[str, Counter[str]]] = {}
        self.words: Counter[int] = Counter()
        for split, files in shards.items():
            for file in files:
                for row in text_rows(file):
                    self._add(split, row)
            self.splits[split].patients = len(np.unique(self.patients[split]))

    def _add(self, split: str, row: dict[str, Any]) -> None:
        """Counts a study."""
        counts = self.splits[split]
        counts.studies += 1
        self.sources[row.get("source") or "unknown"] += 1
        images = row.get("images") or []
        counts.images += len(images)
        known = [view or UNKNOWN_VIEW for view in row.get("views") or []]
        if images:
            self.views.setdefault(split, Counter()).update((known + [UNKNOWN_VIEW] * len(images))[: len(images)])
        for name, value in row.items():
            if name not in FEATURES and isinstance(value, list):
                column = self.labels.setdefault(name, {}).setdefault(split, Counter())
                column.update({label for label in value if isinstance(label, str)})  # once per study
        if patient := row.get("patient_id"):
            self.patients[split].append(_hash(str(patient)))
        else:
            counts.without_patient += 1
        self._add_report(split, row.get("report") or "")

    def _add_report(self, split: str, report: str) -> None:
        words = report.split()
        if not words:
            self.splits[split].without_report += 1
            return
        self.reports[split].append(_hash_report(report))
        self.words[len(words)] += 1
        self.sentences.extend(dict.fromkeys(map(_hash_sentence, sentences_of(report))))

    def views_by_split(self) -> dict[str, dict[str, int]]:
        """Returns the number of images of the most frequent views, by split."""
        return _by_split(self.views)

    def labels_by_split(self) -> dict[str, dict[str, dict[str, int]]]:
        """Returns the number of studies with the most frequent labels, by split, for each column of labels."""
        return {name: _by_split(by_split) for name, by_split in self.labels.items()}

    def patients_in_several_splits(self) -> int:
        """Leakage."""
        return _in_several(self.patients)

    def common_sentences(self) -> list[tuple[str, int]]:
        """Returns the sentences that occur in most reports, as first written; ties in order of appearance."""
        values, first, times = np.unique(self.sentences, return_index=True, return_counts=True)
        chosen = np.lexsort((first, -times))[:MOST].tolist()
        wanted = {int(values[index]): int(times[index]) for index in chosen}
        texts: dict[int, str] = {}
        for report in self._reports():
            if len(texts) == len(wanted):
                break
            for sentence in sentences_of(report):
                if (key := _hash_sentence(sentence)) in wanted:
                    texts.setdefault(key, sentence)
        return [(texts[key], times) for key, times in wanted.items() if key in texts]

    def repeated_reports(self) -> Repeated:
        """Returns the reports that several studies have."""
        together = np.concatenate([np.asarray(values, dtype=np.uint64) for values in self.reports.values()])
        values, times = np.unique(together, return_counts=True)
        often = times > 1
        order = np.argsort(-times, kind="stable")[:_REPEATED]
        left = {int(values[index]): int(times[index]) for index in order if often[index]}
        most: list[tuple[str, int]] = []
        for report in self._reports() if left else ():
            if (studies := left.pop(_hash_report(report), None)) is not None:
                most.append((" ".join(report.split()), studies))
            if not left:
                break
        return Repeated(
            distinct=len(values),
            repeated=int(often.sum()),
            studies=int(times[often].sum()),
            across_splits=_in_several(self.reports),
            most=sorted(most, key=lambda one: -one[1]),
        )

    def _reports(self) -> Iterator[str]:
        for file in (file for files in self._shards.values() for file in files):
            for row in text_rows(file, only=("report",)):
                if report := row.get("report"):
                    yield report


def sentences_of(report: str) -> Iterator[str]:
    """Yields the sentences of a report, without their end marks."""
    for part in _SENTENCE.split(report):
        sentence = " ".join(part.split()).rstrip(".!?")
        if any(character.isalpha() for character in sentence):  # not the number of an enumeration
            yield sentence


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _hash_report(report: str) -> int:
    return _hash(" ".join(report.split()).casefold())


def _hash_sentence(sentence: str) -> int:
    return _hash(sentence.casefold())


def _by_split(counters: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Returns the most frequent values over all splits, each with its count in every split."""
    totals = sum(counters.values(), Counter[str]())
    return {
        value: {split: counter[value] for split, counter in counters.items()} for value, _ in totals.most_common(MOST)
    }


def _in_several(by_split: Hashes) -> int:
    """Returns the number of values that occur in more than one split."""
    different = [np.unique(values) for values in by_split.values()]
    if not different:
        return 0
    _, times = np.unique(np.concatenate(different), return_counts=True)
    return int((times > 1).sum())
