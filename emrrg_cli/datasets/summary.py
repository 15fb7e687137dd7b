"""What is in a dataset directory, counted in one pass over its text; only the images of a few studies are read."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from emrrg_cli.datasets.directory import FEATURES, MANIFEST, find_shards, read_manifest
from emrrg_cli.datasets.report_text import select_section
from emrrg_cli.errors import RunError
from emrrg_cli.files import whole_directory
from emrrg_cli.imaging.base import EncodedImage
from emrrg_cli.vocabulary import UNKNOWN_VIEW

# Sources whose images show no patient.
SYNTHETIC = "phantom"

_BATCH = 512  # studies whose text is in memory at a time
_IMAGE_BATCH = 8  # the same, where images are read too
_MOST = 30  # labels, views and sentences that are kept
_REPEATED = 5  # texts of repeated reports that are kept

# A line that ends is no sentence that ends: reports come wrapped.
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")

T = TypeVar("T")


@dataclass
class SplitCounts:
    """One split; `without_patient` and `without_report` are studies, `patients` are those that have an id."""

    studies: int = 0
    images: int = 0
    patients: int = 0
    without_patient: int = 0
    without_report: int = 0


@dataclass(frozen=True)
class Repeated:
    """Reports whose words are the same, upper and lower case aside.

    Attributes:
        distinct: Different reports.
        repeated: Those of them that more than one study has.
        studies: Studies with a report that another study has too.
        across_splits: Different reports that more than one split has.
        most: The texts met most often, with the number of their studies.
    """

    distinct: int
    repeated: int
    studies: int
    across_splits: int
    most: list[tuple[str, int]]


@dataclass(frozen=True)
class Example:
    """One study to look at, its images as the files that they are."""

    study_id: str
    split: str
    source: str
    images: list[EncodedImage]
    views: list[str]
    report: str


@dataclass
class Summary:
    """What `summarise` found.

    Attributes:
        root: The dataset directory.
        sources: Studies by their source.
        views: Images by split, by view.
        labels: Studies by split, by label, by column; for each column that is a list of texts.
        words: Number of reports by their length in words.
        sentences: The most common ones, with the number of reports that have them.
        uncertainty: At most so many may be missing from a number of views, labels or sentences; 0: all are exact.
        patients_in_several_splits: Leakage, where it is not 0.
        manifest: What `emrrg preprocess` recorded; empty where there is none.
    """

    root: str
    sources: dict[str, int]
    splits: dict[str, SplitCounts]
    views: dict[str, dict[str, int]]
    labels: dict[str, dict[str, dict[str, int]]]
    words: dict[int, int]
    sentences: list[tuple[str, int]]
    uncertainty: int
    repeated: Repeated
    patients_in_several_splits: int
    examples: list[Example]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def studies(self) -> int:
        """Of all splits."""
        return sum(split.studies for split in self.splits.values())

    @property
    def images(self) -> int:
        """Of all splits."""
        return sum(split.images for split in self.splits.values())

    @property
    def is_synthetic(self) -> bool:
        """Whether some of the images were drawn by a program."""
        return SYNTHETIC in self.sources

    @property
    def median_words(self) -> int:
        """Of a report; 0 where there is none."""
        middle, seen = (sum(self.words.values()) + 1) // 2, 0
        for length in sorted(self.words):
            seen += self.words[length]
            if seen >= middle:
                return length
        return 0

    def histogram(self) -> list[tuple[int, int | None, int]]:
        """Report lengths as `(from, to, reports)` in at most 16 steps of equal width; the last may be open (None)."""
        total = sum(self.words.values())
        if not total:
            return []
        # Up to where all but one in 200 end: a single long report would leave the others one bar.
        seen, last = 0, 0
        for length in sorted(self.words):
            seen, last = seen + self.words[length], length
            if seen >= 0.995 * total:
                break
        width = next(width for width in _widths() if last // width < 15)
        counts: Counter[int] = Counter()
        for length, reports in self.words.items():
            counts[min(length // width, last // width + 1)] += reports
        bars: list[tuple[int, int | None, int]] = [
            (step * width, step * width + width - 1, counts[step]) for step in range(last // width + 1)
        ]
        if above := counts[last // width + 1]:
            bars.append(((last // width + 1) * width, None, above))
        return bars

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but images."""
        total = sum(self.words.values())
        return {
            "root": self.root,
            "studies": self.studies,
            "images": self.images,
            "sources": self.sources,
            "fingerprint": self.manifest.get("fingerprint"),
            "splits": {split: asdict(counts) for split, counts in self.splits.items()},
            "views": self.views,
            "labels": self.labels,
            "report_words": {
                "reports": total,
                "shortest": min(self.words, default=0),
                "median": self.median_words,
                "mean": round(sum(length * n for length, n in self.words.items()) / total, 2) if total else 0.0,
                "longest": max(self.words, default=0),
                "histogram": [{"from": low, "to": high, "reports": n} for low, high, n in self.histogram()],
            },
            "sentences": [{"text": text, "reports": reports} for text, reports in self.sentences],
            "uncertainty": self.uncertainty,
            "repeated_reports": asdict(self.repeated)
            | {"most": [{"text": text, "studies": studies} for text, studies in self.repeated.most]},
            "patients_in_several_splits": self.patients_in_several_splits,
            **{name: self.manifest.get(name) or empty for name, empty in _ACCOUNT.items()},
            "examples": [
                {"study_id": one.study_id, "split": one.split, "views": one.views, "report": one.report}
                for one in self.examples
            ],
        }


_ACCOUNT: dict[str, Any] = {"studies_skipped": 0, "skipped": {}, "notes": {}, "remarks": []}


class Frequent(Generic[T]):
    """Counts of the values met most often, in memory that does not grow with the number of different ones.

    Args:
        width: Values after which the rare ones are forgotten; one is missed at most once for each time this happened.

    Source: lossy counting, Manku and Motwani, VLDB 2002, section 4.2.
    """

    def __init__(self, width: int = 50_000) -> None:
        self.width = width
        self.total = 0
        self.uncertainty = 0
        self._counts: dict[T, tuple[int, int]] = {}  # what was counted, what may have been forgotten before

    def add(self, value: T) -> None:
        """Counts a value once more."""
        step = self.total // self.width
        count, missed = self._counts.get(value, (0, step))
        self._counts[value] = (count + 1, missed)
        self.total += 1
        if self.total % self.width == 0:
            kept = {value: entry for value, entry in self._counts.items() if sum(entry) > step + 1}
            if len(kept) < len(self._counts):
                self.uncertainty = step + 1
            self._counts = kept

    def get(self, value: T) -> int:
        """How often a value was counted."""
        return self._counts.get(value, (0, 0))[0]

    def most(self, number: int) -> list[tuple[T, int]]:
        """The most frequent values; among equals those that came first."""
        return sorted(((value, entry[0]) for value, entry in self._counts.items()), key=lambda one: -one[1])[:number]


def summarise(root: str | Path, *, examples: int = 12) -> Summary:
    """Counts what is in a dataset directory.

    Text is read in batches and images are not decoded, so memory does not grow with the data but for 16 bytes a study.
    Columns may be missing, but for those that name studies.

    Args:
        root: Directory written by `emrrg preprocess`, or any with Parquet files named alike in `data/`.
        examples: Studies to look at, drawn evenly from every split.

    Raises:
        UsageError: No such directory, or not a dataset directory.
        RunError: Its files are broken.
    """
    folder = whole_directory(Path(root))
    shards = find_shards(folder)
    tally = _Tally(list(shards))
    for split, files in shards.items():
        for file in files:
            for row in _rows(file, _BATCH):
                tally.add(split, row)
        tally.splits[split].patients = len(np.unique(tally.patients[split]))
    uncertainty = max((counter.uncertainty for counter in tally.counters()), default=0)
    per_split = max(1, -(-examples // len(shards)))
    return Summary(
        root=str(root),
        sources=dict(tally.sources.most(_MOST)),
        splits=tally.splits,
        views=_by_split(tally.views),
        labels={name: _by_split(by_split) for name, by_split in tally.labels.items()},
        words=dict(sorted(tally.words.items())),
        sentences=[(tally.spelling(sentence), reports) for sentence, reports in tally.sentences.most(_MOST)],
        uncertainty=uncertainty,
        repeated=_repeated(shards, tally.reports),
        patients_in_several_splits=_in_several(tally.patients),
        examples=[one for split, files in shards.items() for one in _examples(split, files, per_split)][:examples],
        manifest=read_manifest(folder) if (folder / MANIFEST).is_file() else {},
    )


class _Tally:
    """All that is counted while the rows go by."""

    def __init__(self, splits: Sequence[str]) -> None:
        self.splits = {split: SplitCounts() for split in splits}
        self.patients = {split: array("Q") for split in splits}  # hashes: 8 bytes a study
        self.reports = {split: array("Q") for split in splits}
        self.sources: Frequent[str] = Frequent()
        self.views: dict[str, Frequent[str]] = {}
        self.labels: dict[str, dict[str, Frequent[str]]] = {}
        self.words: Counter[int] = Counter()
        self.sentences: Frequent[str] = Frequent()
        self._spellings: dict[str, str] = {}

    def counters(self) -> Iterator[Frequent[str]]:
        yield from (self.sources, self.sentences, *self.views.values())
        yield from (counter for by_split in self.labels.values() for counter in by_split.values())

    def add(self, split: str, row: dict[str, Any]) -> None:
        """Counts a study."""
        counts = self.splits[split]
        counts.studies += 1
        self.sources.add(row.get("source") or "unknown")
        images = row.get("images") or []
        counts.images += len(images)
        known = [view or UNKNOWN_VIEW for view in row.get("views") or []]
        for view in (known + [UNKNOWN_VIEW] * len(images))[: len(images)]:
            self.views.setdefault(split, Frequent()).add(view)
        for name, value in row.items():
            if name not in FEATURES and isinstance(value, list):
                column = self.labels.setdefault(name, {}).setdefault(split, Frequent())
                for label in dict.fromkeys(value):  # once a study
                    if isinstance(label, str):
                        column.add(label)
        if patient := row.get("patient_id"):
            self.patients[split].append(_hash(patient))
        else:
            counts.without_patient += 1
        words = (row.get("report") or "").split()
        if not words:
            counts.without_report += 1
            return
        self.reports[split].append(_hash_report(row["report"]))
        self.words[len(words)] += 1
        for sentence in dict.fromkeys(_sentences(row["report"])):
            self.sentences.add(sentence.casefold())
            if sentence.casefold() not in self._spellings and len(self._spellings) < self.sentences.width:
                self._spellings[sentence.casefold()] = sentence

    def spelling(self, sentence: str) -> str:
        """A sentence as it was first written."""
        return self._spellings.get(sentence, sentence)


def _widths() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    decade = 1
    while True:
        yield from (decade, 2 * decade, 5 * decade)
        decade *= 10


def _sentences(report: str) -> Iterator[str]:
    for part in _SENTENCE.split(report):
        sentence = " ".join(part.split()).rstrip(".!?")
        if any(character.isalpha() for character in sentence):  # the number of an enumeration is none
            yield sentence


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _hash_report(report: str) -> int:
    return _hash(" ".join(report.split()).casefold())


def _by_split(counters: dict[str, Frequent[str]]) -> dict[str, dict[str, int]]:
    """The most frequent values over all splits, each with its number in every split."""
    totals: Counter[str] = Counter()
    for counter in counters.values():
        for value, count in counter.most(1000):
            totals[value] += count
    return {
        value: {split: counter.get(value) for split, counter in counters.items()}
        for value, _ in totals.most_common(_MOST)
    }


def _in_several(by_split: dict[str, array[int]]) -> int:
    """Values that more than one split has."""
    different = [np.unique(values) for values in by_split.values()]
    if not different:
        return 0
    _, times = np.unique(np.concatenate(different), return_counts=True)
    return int((times > 1).sum())


def _repeated(shards: dict[str, list[Path]], reports: dict[str, array[int]]) -> Repeated:
    every = np.concatenate([np.asarray(values, dtype=np.uint64) for values in reports.values()])
    values, times = np.unique(every, return_counts=True)
    often = times > 1
    order = np.argsort(-times, kind="stable")[:_REPEATED]
    wanted = {int(values[index]): int(times[index]) for index in order if often[index]}
    return Repeated(
        distinct=len(values),
        repeated=int(often.sum()),
        studies=int(times[often].sum()),
        across_splits=_in_several(reports),
        most=sorted(_texts(shards, wanted), key=lambda one: -one[1]),
    )


def _texts(shards: dict[str, list[Path]], wanted: dict[int, int]) -> Iterator[tuple[str, int]]:
    """The reports of some hashes: only these were kept in the first pass."""
    left = dict(wanted)
    for file in (file for files in shards.values() for file in files):
        if not left:
            return
        for row in _rows(file, _BATCH, only=("report",)):
            report = row.get("report") or ""
            if report and (times := left.pop(_hash_report(report), None)) is not None:
                yield " ".join(report.split()), times


def _rows(file: Path, size: int, *, only: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file without the bytes of their images: `images` is a list of their names."""
    with _opened(file) as parquet:
        leaves = (parquet.schema.column(index) for index in range(len(parquet.schema)))
        columns = [
            leaf.path
            for leaf in leaves
            if not (leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "STRING")
            and (only is None or leaf.path.split(".")[0] in only)
        ]
        for batch in _batches(file, parquet, batch_size=size, columns=columns):
            yield from batch.to_pylist()


def _examples(split: str, files: Sequence[Path], number: int) -> Iterator[Example]:
    """Studies at equal distances; one batch of images is in memory at a time."""
    sizes = []
    for file in files:
        with _opened(file) as parquet:
            sizes += [
                (file, group, parquet.metadata.row_group(group).num_rows) for group in range(parquet.num_row_groups)
            ]
    total = sum(rows for _, _, rows in sizes)
    places = sorted({int((place + 0.5) * total / number) for place in range(number)}) if total else []
    start = 0
    for file, group, rows in sizes:
        if here := [place - start for place in places if start <= place < start + rows]:
            with _opened(file) as parquet:
                first = 0
                for batch in _batches(file, parquet, batch_size=_IMAGE_BATCH, row_groups=[group]):
                    for place in here:
                        if first <= place < first + len(batch):
                            yield _example(split, batch.slice(place - first, 1).to_pylist()[0])
                    first += len(batch)
                    if first > here[-1]:
                        break
        start += rows


def _example(split: str, row: dict[str, Any]) -> Example:
    images = [
        EncodedImage(image.get("path") or "", image.get("bytes") or b"") for image in row.get("images") or [] if image
    ]
    known = [view or UNKNOWN_VIEW for view in row.get("views") or []]
    report = row.get("report") or select_section(row, "both")
    return Example(
        study_id=row.get("study_id") or "",
        split=split,
        source=row.get("source") or "unknown",
        images=images,
        views=(known + [UNKNOWN_VIEW] * len(images))[: len(images)],
        report=report.strip(),
    )


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _batches(file: Path, parquet: pq.ParquetFile, **options: Any) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(**options)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> RunError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return RunError(f"{file} cannot be read: {reason}", hint="Write the directory again with `emrrg preprocess`.")
