"""Image paths of a raw data set, kept inside its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from emrrg_cli.errors import UsageError
from emrrg_cli.ingest.study import ImageProblem

OUTSIDE = "path outside the data folder"
MISSING = "missing image"

_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # of Windows, or the name of a server


def require_folder(root: Path) -> None:
    """Makes sure that the folder of a raw data set is there.

    Raises:
        UsageError: It is not, or is no folder.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder" if root.exists() else f"no such folder: {root}")


def locate(path: str, root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    """The file `path` names, resolved and inside `root`, or why there is none.

    A name that really holds a backslash is found first; otherwise backslashes divide the parts of a path, as in files
    that were written on Windows.

    Args:
        path: As the data set writes it; every `..` and symbolic link in it is followed.
        root: Resolved folder of the data set.
        folders: Where `path` is looked up, first match first.
    """
    found = _locate(path, root, folders)
    if isinstance(found, Path) or "\\" not in path:
        return found
    if _DRIVE.match(path):
        return ImageProblem(path, OUTSIDE)
    other = _locate(path.replace("\\", "/"), root, folders)
    return replace(other, path=path) if isinstance(other, ImageProblem) else other


def _locate(path: str, root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    outside = False
    present: Path | None = None
    # A path without an entry has no link to follow, unless it leads out of the folder. This check is much faster.
    plain = not os.path.isabs(path) and ".." not in path  # noqa: PTH117
    for folder in folders:
        if plain and not os.path.lexists(os.path.join(folder, path)):  # noqa: PTH118
            continue
        try:
            resolved = (folder / path).resolve()
            if not resolved.is_relative_to(root):
                outside = True
            elif resolved.is_file():
                return resolved
            elif resolved.exists():  # a folder: the decoder reports it, unless a later place has a file
                present = present or resolved
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL inside, a circle of links
            return ImageProblem(path, "cannot be opened", str(error))
    if present is not None:
        return present
    return ImageProblem(path, OUTSIDE) if outside else ImageProblem(path, MISSING)


def find_image(names: Sequence[str], root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    """As `locate`, for an image that has one of several names; the problem is that of the first name."""
    problem: ImageProblem | None = None
    for name in names:
        found = locate(name, root, folders)
        if isinstance(found, Path):
            return found
        problem = problem or found
    return problem or ImageProblem("", MISSING)
