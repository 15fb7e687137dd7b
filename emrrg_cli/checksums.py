"""SHA-256 of the files of a directory, written beside them and checked when they are read.

`checksums.json` maps names of files, relative to its directory, to their SHA-256 in hexadecimal. Directories that are
written as a whole (a checkpoint, `model/`) hold one each; the one at the top of a run holds what stays the same during
training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emrrg_cli.console import err
from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.records import read_record

CHECKSUMS = "checksums.json"
# People edit recipe.yaml, for example after they moved the data.
_NOT_LISTED = (CHECKSUMS, "recipe.yaml")
_HINT = "Put the file back from a copy."


def write_checksums(directory: Path, names: Iterable[str] | None = None) -> None:
    """Writes `checksums.json` for files of a directory.

    Args:
        names: Files and directories in it; missing ones are ignored. None: everything in it.

    Raises:
        RunError: It cannot be written.
    """
    starts = directory.iterdir() if names is None else (directory / name for name in names)
    files = sorted(
        file
        for start in starts
        for file in ([start] if start.is_file() else start.rglob("*"))
        if file.is_file() and file.name not in _NOT_LISTED
    )
    if not files:
        return
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        found = list(pool.map(_sha256, files))
    sums = {file.relative_to(directory).as_posix(): one for file, one in zip(files, found, strict=True)}
    atomic_write_text(directory / CHECKSUMS, json.dumps(sums, indent=1) + "\n")


def check_directory(directory: Path) -> bool:
    """Checks that every file in `checksums.json` exists and is unchanged.

    Returns:
        False if the directory has no checksums, because an earlier version wrote it.

    Raises:
        RunError: A file is missing or differs, or the list cannot be read.
    """
    sums = _read(directory)
    if sums is None:
        return False
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda name: _check(directory / name, sums[name]), sums):
            pass
    return True


def check_run(run_dir: Path, trained: Path) -> None:
    """Checks that the files of a run are unchanged; prints which directories cannot be checked.

    Args:
        trained: Its `model/`, which has its own list, or `run_dir` itself.

    Raises:
        RunError: A file is missing or differs, or a list cannot be read.
    """
    listed = {place: check_directory(place) for place in (run_dir, trained)}
    if not any(listed.values()):
        warn_unchecked(run_dir)
        return
    for place in listed:
        # A converted checkpoint has one list for all files.
        covered = listed[place] or any(name.startswith("model/") for name in _read(run_dir) or ())
        if not covered:
            err.print(
                f"{place / CHECKSUMS} is missing: damage to the other files there would not be noticed",
                markup=False,
                soft_wrap=True,
            )


def warn_unchecked(place: Path) -> None:
    """Warns that the files of a directory cannot be checked."""
    err.print(
        f"{place} has no checksums (an earlier version wrote it): damage would not be noticed",
        markup=False,
        soft_wrap=True,
    )


def check_file(file: Path) -> bool:
    """Checks that a file is unchanged, by the nearest `checksums.json` above it that lists it.

    Returns:
        False if none lists it.

    Raises:
        RunError: It differs.
    """
    for directory in list(file.absolute().parents)[:3]:
        expected = (_read(directory) or {}).get(file.absolute().relative_to(directory).as_posix())
        if expected is not None:
            _check(file, expected)
            return True
    return False


def _read(directory: Path) -> dict[str, str] | None:
    record = read_record(directory / CHECKSUMS, "the checksums of the files beside it", _HINT)
    if record is None:
        return None
    for name, value in record.items():
        if not isinstance(value, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise RunError(f"{directory / CHECKSUMS}: not a list of checksums", hint=_HINT)
    return record


# Files that this process has checked: path, inode, size, time of the last change, SHA-256. Loading a run checks a
# directory and then each of its files, which must not be hashed twice.
_checked: set[tuple[str, int, int, int, str]] = set()


def _check(file: Path, expected: str) -> None:
    if not file.is_file():
        raise RunError(f"{file} is missing, though it was written with the others", hint=_HINT)
    status = file.stat()
    key = (str(file.absolute()), status.st_ino, status.st_size, status.st_mtime_ns, expected)
    if key in _checked:
        return
    if _sha256(file) != expected:
        raise RunError(f"{file} is damaged: its SHA-256 is not the recorded one", hint=_HINT)
    _checked.add(key)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
