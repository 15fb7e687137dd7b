"""Which files a user means by a few paths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from emrrg_cli.data.study import printable
from emrrg_cli.errors import UsageError


def find_images(paths: Iterable[str]) -> list[Path]:
    """Files that may be images: files as named, and all files below folders, hidden ones left out, sorted.

    What a file holds is not looked at here: one that is no image is reported when it is read. So is a folder below
    the named ones that cannot be read.

    Raises:
        UsageError: for a path that does not exist, or when there is no file at all.
    """
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name)
        try:
            is_folder, exists = path.is_dir(), path.exists() or path.is_symlink()
        except OSError as error:  # such as a name that is too long
            raise UsageError(f"{printable(name)}: {error.strerror or error}") from None
        if is_folder:
            found |= dict.fromkeys(_files_below(path))
        elif exists:
            found[path] = None
        else:
            raise UsageError(f"{printable(name)}: no such file or folder")
    if not found:
        raise UsageError(f"no files in {printable(', '.join(paths))}")
    return list(found)


def _files_below(folder: Path) -> Iterator[Path]:
    """Files, sorted, hidden ones left out; and folders that cannot be listed, for the reader to say so."""
    unreadable: list[Path] = []
    for directory, folders, files in os.walk(folder, onerror=lambda error: unreadable.append(Path(error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(directory) / name for name in sorted(files) if not name.startswith("."))
    yield from unreadable
