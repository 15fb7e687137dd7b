"""Reads rows of the Parquet files of a dataset directory, with or without the bytes of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emrrg_cli.errors import RunError

_TEXT_BATCH = 512  # studies whose text is in memory at a time
_IMAGE_BATCH = 8  # studies in memory at a time if images are read too


def text_rows(file: Path, *, only: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows without the bytes of their images: `images` is a list of names.

    Args:
        file: A Parquet file.
        only: Names of the columns to read; None: all.

    Raises:
        RunError: The file is broken.
    """
    with _opened(file) as parquet:
        leaves = (parquet.schema.column(index) for index in range(len(parquet.schema)))
        columns = [
            leaf.path
            for leaf in leaves
            if not (leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "STRING")
            and (only is None or leaf.path.split(".")[0] in only)
        ]
        for batch in _batches(file, parquet, batch_size=_TEXT_BATCH, columns=columns):
            yield from batch.to_pylist()


def rows_at_equal_distances(files: Sequence[Path], number: int) -> Iterator[dict[str, Any]]:
    """Yields complete rows at equal distances in the files of a split; one batch of images is in memory at a time.

    Raises:
        RunError: A file is broken.
    """
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
                            yield batch.slice(place - first, 1).to_pylist()[0]
                    first += len(batch)
                    if first > here[-1]:
                        break
        start += rows


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
