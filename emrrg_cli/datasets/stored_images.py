"""Reads the images of a study in a dataset directory: their bytes, or a file of the directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError

_HINT = "Write the directory again with `emrrg preprocess`."


def remember_folder(split: Any, folder: Path) -> None:
    """Records the dataset directory in a split, for images that are files; `select` and pickle keep it."""
    split.info.homepage = str(folder.resolve())


def stored_image(image: Mapping[str, Any] | None, split: Any, where: str) -> bytes | Path:
    """Returns the bytes of an image, or its file.

    Args:
        image: `{"bytes": ..., "path": ...}`.
        split: A `datasets.Dataset` from `open_dataset`.
        where: Name of the study for messages, such as `study a`.

    Raises:
        RunError: There is no image, it is empty, or its file is outside the dataset directory.
    """
    content = image.get("bytes") if image else None
    if content:
        return bytes(content)
    path = image.get("path") if image else None
    if content is not None or not path:
        raise RunError(f"{where}: the image is {'empty' if image else 'null'}", hint=_HINT)
    if not split.info.homepage:  # created in memory, not read from a directory
        return Path(path)
    folder = Path(split.info.homepage)
    try:
        file: Path = (folder / str(path)).resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, a loop of links
        file = Path("/")
    if not file.is_relative_to(folder):
        raise RunError(f"{where}: the image path {printable(str(path))} leads out of the dataset directory", hint=_HINT)
    return file
