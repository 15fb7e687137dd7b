"""Atomic writes: a file or directory is written under a temporary name, synced to disk, then renamed.

After a crash at any moment, the old version or the new one is there, complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from emrrg_cli.errors import RunError
from emrrg_cli.files.output_paths import real_path, writable_path
from emrrg_cli.files.temporary import remove_leftovers, temporary_path
from emrrg_cli.files.write_errors import name_write_errors

T = TypeVar("T")
_READS = 10  # attempts to read a directory that another process keeps replacing


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8, `\\n` line ends); a reader finds the old text or the new one, never a part.

    Raises:
        RunError: The file cannot be written (no permission, disk full). The old file is unchanged.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file; a reader finds the old content or the new one, never a part. Creates missing directories.

    Raises:
        RunError: The file cannot be written (no permission, disk full). The old file is unchanged.
    """
    with atomic_file(path, len(data)) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """Write a file piece by piece; it takes its name at the end of the block. If the block fails, nothing changes.

    Args:
        size: Expected size in bytes, for the message on a full disk.

    Yields:
        A new file, open for writing. Missing directories are created.

    Raises:
        RunError: The file cannot be written (no permission, disk full). The old file is unchanged.
    """
    path = writable_path(path)
    with name_write_errors(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        temporary = temporary_path(path)
        try:
            # Mode 0666 less the umask, like any new file; files of `tempfile` are readable by their owner only.
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Build a directory that replaces `final` at the end of the block. If the block fails, `final` is unchanged.

    The steps, each synced to disk before the next:

    1. the block fills `final.tmp-*`
    2. `final` is renamed to `final.previous-emrrg`, if there is one
    3. `final.tmp-*` is renamed to `final`
    4. `final.previous-emrrg` is removed

    A crash before step 2 leaves the old directory in place, and a crash after step 3 leaves the new one. Between the
    two only `final.previous-emrrg` exists, and it is complete: the next writer renames it back (`recover_directory`),
    and a reader finds it (`whole_directory`) and changes nothing. Only one process may write to a name at a time; any
    number may read it.

    Yields:
        The temporary directory, empty.

    Raises:
        RunError: `final` is a file, or a step fails.
    """
    final = writable_path(final)
    recover_directory(final)
    if final.exists() and not final.is_dir():
        raise RunError(f"{final} is a file; a directory is to be written there", hint="Move it or choose another name.")
    with name_write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final)
        temporary = temporary_path(final)
        temporary.mkdir()
    try:
        yield temporary
        put_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_directory(built: Path, final: Path) -> None:
    """Do steps 2 to 4 of `atomic_directory` for a directory that was built elsewhere on the same file system.

    Raises:
        RunError: A step fails. `final` is unchanged.
    """
    final = writable_path(final)
    recover_directory(final)
    previous = _previous(final)
    with name_write_errors(final):
        _sync_tree(built)
        try:
            if final.exists():
                os.replace(final, previous)  # noqa: PTH105
                _sync_directory(final.parent)
            os.replace(built, final)  # noqa: PTH105
        except BaseException:
            recover_directory(final)
            raise
        _sync_directory(final.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover_directory(final: Path) -> None:
    """Undo an interrupted replacement of `final`. Afterwards `final` is the last complete directory, if there was one.

    Only the process that writes to `final` may call this: while it works, no other may move the previous directory.

    Raises:
        RunError: The previous directory cannot be renamed.
    """
    final = writable_path(final)
    previous = _previous(final)
    if not previous.is_dir():
        return
    if final.exists():
        shutil.rmtree(previous, ignore_errors=True)
        return
    with name_write_errors(final):
        os.replace(previous, final)  # noqa: PTH105
        _sync_directory(final.parent)


def whole_directory(final: Path) -> Path:
    """The path to read `final` from: during a replacement, that of the previous directory. Changes nothing."""
    previous = _previous(real_path(final))
    # A writer removes the previous one only after the new one is in place. So if neither was seen, the new one arrived
    # between the two checks.
    return previous if not final.exists() and previous.is_dir() else final


def read_directory(final: Path, read: Callable[[Path], T]) -> T:
    """Read one consistent version of a directory that another process may replace meanwhile. Changes nothing.

    Args:
        read: Called with the path to read from, and called again if the directory was replaced meanwhile.

    Returns:
        The result of `read`.

    Raises:
        RunError: The directory is replaced faster than `read` reads it.
    """
    for _ in range(_READS):
        place = whole_directory(final)
        version = _version(place)
        try:
            result = read(place)
        except Exception:
            if whole_directory(final) == place and _version(place) == version:
                raise
            continue
        if whole_directory(final) == place and _version(place) == version:
            return result
        del result
    raise RunError(f"{final} was replaced each of the {_READS} times that it was read", hint="Try again later.")


def _previous(final: Path) -> Path:
    # No other program uses this name, so a directory with it is removed.
    return final.with_name(f"{final.name}.previous-emrrg")


def _version(directory: Path) -> tuple[int, int, int] | None:
    """Identify a directory, to notice that another one takes its place. None if there is no directory."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _sync_tree(root: Path) -> None:
    """Sync all files and directories below `root` to disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory) / name
            if not path.is_symlink() and path.is_file():
                # Windows syncs only files opened for writing; other systems must also sync read-only files.
                with path.open("rb" if os.name == "posix" else "rb+") as file:
                    os.fsync(file.fileno())
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    """Sync the entries of a directory to disk, if the system can (Windows and some network shares cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
