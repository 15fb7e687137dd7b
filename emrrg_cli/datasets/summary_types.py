"""The summary of a dataset directory."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from emrrg_cli.imaging.base import EncodedImage

# Source whose images show no patient.
SYNTHETIC = "phantom"


@dataclass
class SplitCounts:
    """Counts of one split; `without_patient` and `without_report` count studies, `patients` only those with an id."""

    studies: int = 0
    images: int = 0
    patients: int = 0
    without_patient: int = 0
    without_report: int = 0


@dataclass(frozen=True)
class Repeated:
    """Reports with the same words, ignoring case.

    Attributes:
        distinct: Number of different reports.
        repeated: Number of different reports that more than one study has.
        studies: Number of studies whose report another study also has.
        across_splits: Number of different reports that more than one split has.
        most: The most frequent texts, each with its number of studies.
    """

    distinct: int
    repeated: int
    studies: int
    across_splits: int
    most: list[tuple[str, int]]


@dataclass(frozen=True)
class Example:
    """One example study; its images are encoded files."""

    study_id: str
    split: str
    source: str
    images: list[EncodedImage]
    views: list[str]
    report: str


@dataclass
class Summary:
    """The result of `summarise`.

    Attributes:
        root: The dataset directory.
        sources: Number of studies by source.
        views: Number of images by split, by view.
        labels: Number of studies by split, by label, by column; for each column that is a list of texts.
        words: Number of reports by their length in words.
        sentences: The most common sentences, with the number of reports that have them.
        patients_in_several_splits: Number of patients in more than one split (leakage).
        manifest: The manifest of `emrrg preprocess`; empty if there is none.
    """

    root: str
    sources: dict[str, int]
    splits: dict[str, SplitCounts]
    views: dict[str, dict[str, int]]
    labels: dict[str, dict[str, dict[str, int]]]
    words: dict[int, int]
    sentences: list[tuple[str, int]]
    repeated: Repeated
    patients_in_several_splits: int
    examples: list[Example]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def studies(self) -> int:
        """Number of studies in all splits."""
        return sum(split.studies for split in self.splits.values())

    @property
    def images(self) -> int:
        """Number of images in all splits."""
        return sum(split.images for split in self.splits.values())

    @property
    def is_synthetic(self) -> bool:
        """Whether some of the images are synthetic."""
        return SYNTHETIC in self.sources

    @property
    def median_words(self) -> float:
        """Median number of words of a report; 0 if there is no report."""
        return statistics.median(Counter(self.words).elements()) if self.words else 0

    def histogram(self) -> list[tuple[int, int | None, int]]:
        """Report lengths as `(from, to, reports)` in at most 16 steps of equal width; the last may be open (None)."""
        total = sum(self.words.values())
        if not total:
            return []
        # The steps cover 99.5% of the reports: a single long report would put all others into one bar.
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
        """Returns everything except images, for JSON."""
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
            "repeated_reports": asdict(self.repeated)
            | {"most": [{"text": text, "studies": studies} for text, studies in self.repeated.most]},
            "patients_in_several_splits": self.patients_in_several_splits,
            **{name: self.manifest.get(name) or empty for name, empty in _NOTHING.items()},
            "examples": [
                {"study_id": one.study_id, "split": one.split, "views": one.views, "report": one.report}
                for one in self.examples
            ],
        }


_NOTHING: dict[str, Any] = {"studies_skipped": 0, "skipped": {}, "notes": {}, "remarks": []}


def _widths() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    decade = 1
    while True:
        yield from (decade, 2 * decade, 5 * decade)
        decade *= 10
