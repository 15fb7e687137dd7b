"""Summarises a dataset directory in one pass over its text; only the images of a few studies are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emrrg_cli.datasets.manifest import MANIFEST, read_manifest
from emrrg_cli.datasets.parquet_rows import rows_at_equal_distances
from emrrg_cli.datasets.report_text import select_section
from emrrg_cli.datasets.shard_files import find_shards
from emrrg_cli.datasets.summary_counts import MOST, SummaryCounts
from emrrg_cli.datasets.summary_types import SYNTHETIC, Example, Repeated, SplitCounts, Summary
from emrrg_cli.files.atomic import whole_directory
from emrrg_cli.imaging.base import EncodedImage
from emrrg_cli.vocabulary import UNKNOWN_VIEW

__all__ = ["SYNTHETIC", "Example", "Repeated", "SplitCounts", "Summary", "summarise"]


def summarise(root: str | Path, *, examples: int = 12) -> Summary:
    """Counts studies, images, reports, labels and sentences of a dataset directory.

    Text is read in batches and images are not decoded, so memory grows by about 80 bytes per study. All columns except
    the study ids may be missing.

    Args:
        root: Directory written by `emrrg preprocess`, or any directory with Parquet files of these names in `data/`.
        examples: Number of example studies, drawn evenly from every split.

    Raises:
        UsageError: `root` does not exist or is not a dataset directory.
        RunError: Its files are broken.
    """
    folder = whole_directory(Path(root))
    shards = find_shards(folder)
    counts = SummaryCounts(shards)
    per_split = max(1, -(-examples // len(shards)))
    shown = [
        _example(split, row) for split, files in shards.items() for row in rows_at_equal_distances(files, per_split)
    ]
    return Summary(
        root=str(root),
        sources=dict(counts.sources.most_common(MOST)),
        splits=counts.splits,
        views=counts.views_by_split(),
        labels=counts.labels_by_split(),
        words=dict(sorted(counts.words.items())),
        sentences=counts.common_sentences(),
        repeated=counts.repeated_reports(),
        patients_in_several_splits=counts.patients_in_several_splits(),
        examples=shown[:examples],
        manifest=read_manifest(folder) if (folder / MANIFEST).is_file() else {},
    )


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
