"""What tells the content of a dataset directory from another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emrrg_cli.datasets.directory import MANIFEST, find_shards, read_manifest
from emrrg_cli.errors import RunError
from emrrg_cli.files import whole_directory

_TAIL = 8  # bytes: the length of a Parquet file's footer (4, little-endian), then PAR1


def dataset_fingerprint(root: str | Path) -> str:
    """The fingerprint of a dataset directory, without reading its images.

    `emrrg preprocess` writes one of all rows into the manifest. A directory without a manifest is known by the sizes
    and footers of its Parquet files, which hold the place and the statistics of every column.

    Raises:
        UsageError: No such directory, or not a dataset directory.
        RunError: The manifest or a Parquet file cannot be read.
    """
    folder = whole_directory(Path(root))
    shards = find_shards(folder)
    if (folder / MANIFEST).is_file() and (written := read_manifest(folder).get("fingerprint")):
        return str(written)
    digest = hashlib.blake2b(digest_size=16)
    for split, files in shards.items():
        for file in files:
            digest.update(f"{split} {file.stat().st_size} ".encode() + _footer(file))
    return digest.hexdigest()


def _footer(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL))
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(max(0, size - _TAIL - length))
            return stream.read(length)
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror or error}") from error
