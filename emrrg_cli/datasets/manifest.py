"""Knows dataset directories by their files, and reads their manifest: the record of `emrrg preprocess`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import whole_directory

MANIFEST = "manifest.json"

_MAX_BYTES = 64 * 2**20


def is_dataset_dir(root: str | Path) -> bool:
    """Whether a folder is a dataset directory and not a folder of images; false if it cannot be read."""
    try:
        folder = whole_directory(Path(root))
        return (folder / MANIFEST).is_file() or any((folder / "data").glob("*.parquet"))
    except (OSError, ValueError):  # the name is too long or not a path, or the folder is not readable
        return False


def read_manifest(root: str | Path) -> dict[str, Any]:
    """Reads the manifest of a dataset directory.

    Raises:
        UsageError: The directory does not exist or has no manifest.
        RunError: The manifest is not valid JSON.
    """
    folder = whole_directory(Path(root))
    check_folder(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} has no {MANIFEST}", hint="`emrrg preprocess` writes it.")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        manifest = json.loads(content)
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise RunError(f"{path} is not a manifest")
    return manifest


def check_folder(folder: Path) -> None:
    """Checks that a folder exists.

    Raises:
        UsageError: It does not exist or is a file.
    """
    if not folder.exists():
        raise UsageError(f"no such dataset directory: {folder}", hint="Make one with `emrrg preprocess`.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a dataset directory", hint="Make one with `emrrg preprocess`.")
