"""Finds the images of a raw data set; paths must stay inside its folder.

A table or an annotation may come from anywhere, so its paths cannot name files elsewhere. Links in the folder are the
user's own and are followed: data are often links to another disk. Images are read only from folders, not from archives.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emrrg_cli.errors import UsageError
from emrrg_cli.ingest.sources.table import cell_list, cell_text
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


def listed_images(cell: Any, folders: Sequence[Path]) -> list[str]:
    """Returns the paths that a cell of a table lists, as `cell_list`; a cell that names a file is one path.

    Args:
        cell: The cell.
        folders: Folders in which paths are looked up.
    """
    paths, whole = cell_list(cell), "" if isinstance(cell, list) else cell_text(cell)
    return [whole] if len(paths) > 1 and whole and _is_there(whole, folders) else paths


def with_slashes(path: str, folders: Sequence[Path]) -> str:
    """Returns a path with `/` for each backslash, as Windows writes paths, unless the name of a file contains them."""
    return path if "\\" not in path or _is_there(path, folders) else path.replace("\\", "/")


def _is_there(path: str, folders: Sequence[Path]) -> bool:
    return any(os.path.lexists(os.path.join(folder, path)) for folder in folders)  # noqa: PTH118


def locate(path: str, root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    """Returns the file that `path` names (`with_slashes`), inside `root`, or why there is no such file.

    The returned path is resolved, except that of a link that leads out of `root`.

    Args:
        path: The path in the data set; with `..`, it must stay inside `root` after links are resolved.
        root: Resolved folder of the data set.
        folders: Folders in which `path` is looked up, in order.
    """
    plain = with_slashes(path, folders)
    if plain != path and _DRIVE.match(path):
        return ImageProblem(path, OUTSIDE)
    found = _locate(plain, root, folders)
    return replace(found, path=path) if isinstance(found, ImageProblem) else found


def _locate(path: str, root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    outside: ImageProblem | None = None
    present: Path | None = None
    # A plain path that does not exist needs no resolving; this check is much faster.
    plain = not os.path.isabs(path) and ".." not in path  # noqa: PTH117
    for folder in folders:
        if plain and not os.path.lexists(os.path.join(folder, path)):  # noqa: PTH118
            continue
        try:
            place = folder / path
            resolved = place.resolve()
            inside = resolved.is_relative_to(root)
            if not inside and (".." in place.parts or not place.is_relative_to(root)):
                outside = ImageProblem(path, OUTSIDE)
                continue
            found = resolved if inside else place
            if resolved.is_file():
                return found
            if resolved.exists():  # a folder: the decoder reports it, unless a later place has a file
                present = present or found
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL inside, a loop of links
            return ImageProblem(path, "cannot be opened", str(error))
    if present is not None:
        return present
    return outside or ImageProblem(path, MISSING)


def split_found(
    found: Iterable[tuple[Path | ImageProblem, str]],
) -> tuple[tuple[Path, ...], tuple[str, ...], tuple[ImageProblem, ...]]:
    """Splits the results of `locate` or `find_image`, each with a view, into images, their views, and problems."""
    pairs = list(found)
    return (
        tuple(image for image, _ in pairs if isinstance(image, Path)),
        tuple(view for image, view in pairs if isinstance(image, Path)),
        tuple(image for image, _ in pairs if isinstance(image, ImageProblem)),
    )


def find_image(names: Sequence[str], root: Path, folders: tuple[Path, ...]) -> Path | ImageProblem:
    """Locates an image that has one of several names; a returned problem is that of the first name."""
    problem: ImageProblem | None = None
    for name in names:
        found = locate(name, root, folders)
        if isinstance(found, Path):
            return found
        problem = problem or found
    return problem or ImageProblem("", MISSING)
