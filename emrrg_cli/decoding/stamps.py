"""Stamps of files in records, by which a later run notices that a file was replaced under its name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from emrrg_cli.decoding.studies import Film, path_name

Stamp = list[int | str]


def stamp_of(film: Film, *, content: bool) -> Stamp | None:
    """Returns the size and the time of change in nanoseconds, and with `content` half of the SHA-256 of a file.

    Returns None for an image that is not a file, or a file that cannot be read.
    """
    if not isinstance(film, Path):
        return None
    try:
        status = film.stat()
        stamp: Stamp = [status.st_size, status.st_mtime_ns]
        if content:
            with film.open("rb") as file:
                stamp.append(hashlib.file_digest(file, "sha256").hexdigest()[:32])
    except OSError:
        return None
    return stamp


def any_changed(films: Iterable[Film], stamps: Mapping[str, Any]) -> bool:
    """Whether one of the files is not as its stamp says; files without a stamp are not compared."""
    return any(name in stamps and _is_changed(film, stamps[name]) for film in films if (name := path_name(film)))


def _is_changed(film: Film, before: Stamp | None) -> bool:
    now = stamp_of(film, content=False)
    if now is None or before is None:
        return now is not None  # a file that is gone now keeps its report
    if now == before[:2]:
        return False
    # A copy of the folder has other times, but the same content.
    return len(before) < 3 or now[0] != before[0] or stamp_of(film, content=True) != [*now, before[2]]
