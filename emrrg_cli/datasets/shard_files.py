"""Finds the Parquet files of a dataset directory, and checks them against the manifest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emrrg_cli.datasets.manifest import MANIFEST, check_folder, read_manifest
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.vocabulary import SPLITS

_SHARD = re.compile(r"(train|validation|test)-(\d{5})-of-(\d{5})\.parquet")
_TAIL = 8  # bytes: the length of a Parquet file's footer (4, little-endian), then PAR1
_AGAIN = "Write the directory again with `emrrg preprocess`, or restore its files."


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """Returns the Parquet files of each split of a dataset directory, in order; checks that they are complete.

    Raises:
        UsageError: `folder` does not exist or is not a dataset directory.
        RunError: Files are missing.
    """
    check_folder(folder)
    found: dict[str, dict[int, Path]] = {}
    totals: dict[str, int] = {}
    for file in sorted((folder / "data").glob("*.parquet")):
        match = _SHARD.fullmatch(file.name)
        if match is None:
            raise UsageError(
                f"{file} is not named like a shard of a dataset directory",
                hint="Shards are named data/train-00000-of-00003.parquet; splits are train, validation and test.",
            )
        split, index, total = match[1], int(match[2]), int(match[3])
        found.setdefault(split, {})[index] = file
        if totals.setdefault(split, total) != total:
            raise RunError(f"{folder}: split {split} has shards of different runs: {file.name} does not fit the others")
    for split, total in totals.items():
        if missing := sorted(set(range(total)) - set(found[split])):
            raise RunError(f"{folder}: shard {missing[0]} of {total} of split {split} is missing", hint=_AGAIN)
    if not found:
        if (folder / MANIFEST).is_file():
            raise RunError(f"{folder} has lost its Parquet files (data/*.parquet)", hint=_AGAIN)
        raise UsageError(
            f"{folder} is not a dataset directory: it has no data/*.parquet",
            hint="`emrrg preprocess` makes one from raw data.",
        )
    shards: dict[str, list[Path]] = {split: list(found[split].values()) for split in SPLITS if split in found}
    if (folder / MANIFEST).is_file():
        _check_manifest(folder, shards, read_manifest(folder))
    return shards


def _check_manifest(folder: Path, shards: Mapping[str, list[Path]], manifest: Mapping[str, Any]) -> None:
    """Checks that the shards are those that the manifest lists.

    Raises:
        RunError: A shard is missing or has the content of another one.
    """
    listed = manifest.get("splits")
    if not isinstance(listed, Mapping):
        return
    for split, counts in listed.items():
        wanted = counts.get("shards") if isinstance(counts, Mapping) else None
        found = len(shards.get(split, ()))
        if isinstance(wanted, int) and wanted != found:
            raise RunError(
                f"{folder}: {MANIFEST} lists {_count(wanted)} of split {split}, the folder has {found}", hint=_AGAIN
            )
    _check_places(folder, shards, manifest.get("files"))
    # Older manifests have no `files`; there, swapped splits are detected by their numbers of studies.
    studies = {split: counts.get("studies") for split, counts in listed.items() if isinstance(counts, Mapping)}
    if "files" not in manifest and len(set(studies.values())) > 1:
        rows = {split: sum(map(_rows, files)) for split, files in shards.items()}
        for split, found in rows.items():
            other = next((name for name, count in studies.items() if name != split and count == found), None)
            if other and found != studies.get(split):
                raise RunError(
                    f"{folder}: split {split} has {found:,} studies, the number of split {other} in {MANIFEST}",
                    hint=_AGAIN,
                )


def _check_places(folder: Path, shards: Mapping[str, list[Path]], digests: Any) -> None:
    """Checks that no shard is in the place of another; an edited shard is accepted."""
    if not isinstance(digests, Mapping):
        return
    places = {digest: name for name, digest in digests.items()}
    for file in (file for files in shards.values() for file in files):
        name = f"data/{file.name}"
        place = places.get(shard_digest(file), name)
        if place != name:
            raise RunError(
                f"{folder}: {name} has the content that {place} should have, according to {MANIFEST}", hint=_AGAIN
            )


def _count(shards: int) -> str:
    return f"{shards} shard" if shards == 1 else f"{shards} shards"


def _rows(file: Path) -> int:
    try:
        with pq.ParquetFile(file) as parquet:
            return int(parquet.metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(f"{file} cannot be read: {reason}", hint=_AGAIN) from None


def shard_digest(file: Path) -> str:
    """Computes a digest of a Parquet file from its size and footer, without reading its data.

    The footer has the position and the statistics of all columns.

    Raises:
        RunError: The file cannot be read.
    """
    status = file.stat()
    return _digest(file, status.st_size, (status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=10_000)
def _digest(file: Path, size: int, version: tuple[int, int]) -> str:
    # A command opens a directory several times, and asks for its fingerprint; `version` changes with the file.
    return hashlib.blake2b(f"{size} ".encode() + read_footer(file), digest_size=16).hexdigest()


def read_footer(file: Path) -> bytes:
    """Reads the footer of a Parquet file.

    Raises:
        RunError: The file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL))
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(max(0, size - _TAIL - length))
            return stream.read(length)
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror or error}") from error
