"""Finds the images of a raw data set; paths must stay inside its folder."""

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

_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # a Windows drive or a network share


def require_folder(root: Path) -> None:
    """Checks that the folder of a raw data set exists.

    Raises:
        UsageError: It does not exist or is not a folder.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder" if root.exists() else f"no such folder: {root}")


def locate(path: str, root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    """Returns the file that `path` names, resolved and inside `root`, or why there is no such file.

    A file whose name contains a backslash is found first. Otherwise backslashes separate the parts of a path, as on
    Windows.

    Args:
        path: The path in the data set; every `..` and symbolic link in it is resolved.
        root: Resolved folder of the data set.
        folders: Folders in which `path` is looked up, in order.
    """
    found = _locate(path, root, folders)
    if isinstance(found, Path) or "\\" not in path:
        return found
    if _DRIVE.match(path):
        return ImageProblem(path, OUTSIDE)
    other = _locate(path.replace("\\", "/"), root, folders)
    return replace(other, path=path) if isinstance(other, ImageProblem) else other


def _locate(path: str, root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    outside: ImageProblem | None = None
    present: Path | None = None
    # A plain path that does not exist needs no resolving; this check is much faster.
    plain = not os.path.isabs(path) and ".." not in path  # noqa: PTH117
    for folder in folders:
        if plain and not os.path.lexists(os.path.join(folder, path)):  # noqa: PTH118
            continue
        try:
            resolved = (folder / path).resolve()
            if not resolved.is_relative_to(root):
                by_link = Path(os.path.normpath(folder / path)).is_relative_to(root)
                outside = ImageProblem(path, OUTSIDE, f"a link leads to {resolved}" if by_link else "")
            elif resolved.is_file():
                return resolved
            elif resolved.exists():  # a folder: the decoder reports it, unless a later place has a file
                present = present or resolved
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL inside, a loop of links
            return ImageProblem(path, "cannot be opened", str(error))
    if present is not None:
        return present
    return outside or ImageProblem(path, MISSING)


def find_image(names: Sequence[str], root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    """Locates an image that has one of several names; a returned problem is that of the first name."""
    problem: ImageProblem | None = None
    for name in names:
        found = locate(name, root, folders)
        if isinstance(found, Path):
            return found
        problem = problem or found
    return problem or ImageProblem("", MISSING)
