"""A lock on an output directory or file: one process writes to a place at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError
from emrrg_cli.files.output_paths import check_writable, real_path
from emrrg_cli.files.temporary import host_name
from emrrg_cli.files.write_errors import name_write_errors


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock an output directory (or file) for this process, so that a second command cannot write to the same place.

    The lock is a file `.NAME.lock` beside the output, or `.lock` inside it if only the output itself is writable. The
    system releases the lock when the process ends, also after a crash: a lock file that is left behind blocks nobody.
    A link and its target share one lock.

    Args:
        output: The directory or file to be written. It need not exist and is not created; its parent is.

    Raises:
        RunError: Another process holds the lock, or the lock file cannot be written.
        UsageError: A directory above the output is a file.
    """
    from filelock import FileLock, Timeout

    real = real_path(output)
    beside = os.access(real.parent, os.W_OK | os.X_OK) or not real.is_dir()
    place = real.with_name(f".{real.name}.lock") if beside else real / ".lock"
    check_writable(place.parent)
    lock = FileLock(place, timeout=0)
    with name_write_errors(place), contextlib.suppress(NotImplementedError):  # a file system without locks
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()  # gives a clear error; the error of the lock would look like a lock in use
        try:
            lock.acquire()
            place.write_text(f"process {os.getpid()} on {host_name()}", encoding="utf-8")
        except Timeout:
            raise RunError(
                f"another process is writing to {output}{_lock_holder(place)}",
                hint="Wait until it ends, or choose another --output.",
            ) from None
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows does not remove an open file
                place.unlink()  # before the release, so that no other process can hold this file
            lock.release()


def _lock_holder(place: Path) -> str:
    """The process that holds a lock, in brackets; empty if the lock file does not name one."""
    try:
        with place.open("rb") as file:
            text = printable(file.read(200).decode("utf-8", "replace"))
    except OSError:
        return ""
    return f" ({text})" if text.startswith("process ") else ""
