"""Computes the fingerprint of the content of a dataset directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emrrg_cli.datasets.manifest import MANIFEST, read_manifest
from emrrg_cli.datasets.shard_files import find_shards, read_footer
from emrrg_cli.files.atomic import whole_directory


def dataset_fingerprint(root: str | Path) -> str:
    """Returns the fingerprint of a dataset directory without reading its images.

    `emrrg preprocess` writes a fingerprint of all rows to the manifest. Without a manifest, it is computed from the
    sizes and footers of the Parquet files; a footer has the position and the statistics of every column.

    Raises:
        UsageError: `root` does not exist or is not a dataset directory.
        RunError: The manifest or a Parquet file cannot be read.
    """
    folder = whole_directory(Path(root))
    shards = find_shards(folder)
    if (folder / MANIFEST).is_file() and (written := read_manifest(folder).get("fingerprint")):
        return str(written)
    digest = hashlib.blake2b(digest_size=16)
    for split, files in shards.items():
        for file in files:
            digest.update(f"{split} {file.stat().st_size} ".encode() + read_footer(file))
    return digest.hexdigest()
