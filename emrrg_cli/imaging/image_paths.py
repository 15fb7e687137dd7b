"""Which files a user means by a few paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError


def find_images(paths: Iterable[str]) -> list[Path]:
    """Files that may be images: files as named, and all files below folders, hidden ones left out, sorted.

    A file that is given twice, also by another spelling or a link, is taken once. Two files of a folder that are links
    to the same file are two, because stores of large files keep equal images of different studies that way.

    What a file holds is not looked at here: one that is no image is reported when it is read. So is a folder below
    the named ones that cannot be read.

    Raises:
        UsageError: for a path that does not exist, or when there is no file at all.
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
    """All files, sorted, hidden ones left out. Links to folders elsewhere are followed, each of these once.

    Args:
        folder: where to look.
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
                # What lies below is found under its own name; what was followed before may lead back.
                if target.is_relative_to(root) or root.is_relative_to(target) or target in followed:
                    continue
                followed.add(target)
            kept.append(name)
        folders[:] = kept
        yield from (here / name for name in sorted(files) if not name.startswith("."))
