"""Computes the fingerprint of the content of a dataset directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.manifest import MANIFEST, read_manifest
from emrrg_cli.datasets.shard_files import find_shards, read_footer, shard_digest
from emrrg_cli.files.atomic import whole_directory


def dataset_fingerprint(root: str | Path) -> str:
    """Returns the fingerprint of a dataset directory without reading its images.

    `emrrg preprocess` writes a fingerprint of all rows to the manifest. Without a manifest, or if a file is no longer
    the one that the manifest lists, it is computed from the sizes and footers of the Parquet files; a footer has the
    position and the statistics of every column.

    Raises:
        UsageError: `root` does not exist or is not a dataset directory.
        RunError: The manifest or a Parquet file cannot be read.
    """
    folder = whole_directory(Path(root))
    shards = find_shards(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    if (written := manifest.get("fingerprint")) and not _edited(shards, manifest.get("files")):
        return str(written)
    digest = hashlib.blake2b(digest_size=16)
    for split, files in shards.items():
        for file in files:
            digest.update(f"{split} {file.stat().st_size} ".encode() + read_footer(file))
    return digest.hexdigest()


def _edited(shards: Mapping[str, list[Path]], digests: Any) -> bool:
    """Whether a file differs from the manifest's record; older manifests have none."""
    if not isinstance(digests, Mapping):
        return False
    return any(digests.get(f"data/{file.name}") != shard_digest(file) for files in shards.values() for file in files)
