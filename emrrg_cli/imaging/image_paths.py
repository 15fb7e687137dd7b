"""Finds the image files that a few paths name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError


def find_images(paths: Iterable[str]) -> list[Path]:
    """Returns files that may be images: named files, and all files below named folders, sorted, without hidden ones.

    A file that is named twice, also by another spelling or a link, counts once. Two links in a folder to the same file
    count twice, because stores of large files keep equal images of different studies that way.

    Files are not opened here. A file that is not an image, or a folder that cannot be read, is reported when it is
    read.

    Raises:
        UsageError: for a path that does not exist, or if there is no file.
    """
    real_folder = cache(os.path.realpath)
    found: list[Path] = []
    seen: set[str] = set()
    unreadable: list[Path] = []  # the reader reports them

    def add(file: Path, *others: str) -> None:
        places = {os.path.join(real_folder(file.parent), file.name), *others}  # noqa: PTH118
        if seen.isdisjoint(places):
            found.append(file)
        seen.update(places)

    for name in paths:
        path = Path(name)
        try:
            is_folder, exists = path.is_dir(), path.exists() or path.is_symlink()
        except OSError as error:  # such as a name that is too long
            raise UsageError(f"{printable(name)}: {error.strerror or error}") from None
        if is_folder:
            for file in (*files_below(path, lambda error: unreadable.append(Path(error.filename))), *unreadable):
                add(file)
        elif exists:
            add(path, os.path.realpath(path))
        else:
            raise UsageError(f"{printable(name)}: no such file or folder")
    if not found:
        raise UsageError(f"no files in {printable(', '.join(paths))}")
    return found


def files_below(folder: Path, unreadable: Callable[[OSError], None]) -> Iterator[Path]:
    """Yields all files, sorted, without hidden ones. Links to other folders are followed, each folder once.

    Args:
        folder: the folder to search.
        unreadable: called for a folder that cannot be listed.
    """
    root = folder.resolve()
    followed: set[Path] = set()
    for directory, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(directory)
        kept = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            if (here / name).is_symlink():
                target = (here / name).resolve()
                # A target inside `folder` is found under its own name; following a target twice may never end.
                if target.is_relative_to(root) or root.is_relative_to(target) or target in followed:
                    continue
                followed.add(target)
            kept.append(name)
        folders[:] = kept
        yield from (here / name for name in sorted(files) if not name.startswith("."))
