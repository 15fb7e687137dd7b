"""Files that are whole or not there: written under a temporary name, brought to the disk, then renamed.

Temporary names are `NAME.tmp-HOST-PID-RANDOM`, beside the final name and so on the same file system. Those that a
dead process of this host left behind are removed by the next write to the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.markup import escape

from emrrg_cli.console import err, printable
from emrrg_cli.errors import RunError, UsageError

T = TypeVar("T")

_READS = 10  # of a directory that is replaced again and again


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8, `\\n` line ends); a reader finds the old text or the new one, never a part.

    Raises:
        RunError: It cannot be written (no permission, disk full); the old file is as it was.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file; a reader finds the old content or the new one, never a part. Missing directories are made.

    Raises:
        RunError: It cannot be written (no permission, disk full); the old file is as it was.
    """
    path = _real(path)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = _temporary(path)
        try:
            # Mode 0666 less the umask, like any new file; what `tempfile` makes is readable by its owner only.
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Build a directory that replaces `final` at the end of the block, or leaves it alone if the block fails.

    The order, each step on the disk before the next:

    1. the block fills `final.tmp-*`
    2. `final` is renamed to `final.previous-emrrg`, if there is one
    3. `final.tmp-*` is renamed to `final`
    4. `final.previous-emrrg` is removed

    A crash before 2 leaves the old directory in place, one after 3 the new one. Between the two there is only
    `final.previous-emrrg`, which is whole: the next writer puts it back (`recover_directory`), a reader finds it
    (`whole_directory`) and changes nothing. One process writes to a name at a time, any number may read.

    Yields:
        The temporary directory, empty.

    Raises:
        RunError: `final` is a file, or a step cannot be carried out.
    """
    final = _real(final)
    recover_directory(final)
    if final.exists() and not final.is_dir():
        raise RunError(f"{final} is a file; a directory is to be written there", hint="Move it or choose another name.")
    with _told(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        temporary = _temporary(final)
        temporary.mkdir()
    try:
        yield temporary
        put_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_directory(built: Path, final: Path) -> None:
    """Steps 2 to 4 of `atomic_directory`, for a directory that was built elsewhere on the same file system.

    Raises:
        RunError: A step cannot be carried out; `final` is as it was.
    """
    final = _real(final)
    recover_directory(final)
    previous = _previous(final)
    with _told(final):
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
    """Undo a replacement of `final` that was cut off half-way: afterwards it is the last whole directory, if any was.

    For the one process that writes to `final`: while that is at work, the previous directory is not another's to move.

    Raises:
        RunError: It cannot be renamed.
    """
    final = _real(final)
    previous = _previous(final)
    if not previous.is_dir():
        return
    if final.exists():
        shutil.rmtree(previous, ignore_errors=True)
        return
    with _told(final):
        os.replace(previous, final)  # noqa: PTH105
        _sync_directory(final.parent)


def whole_directory(final: Path) -> Path:
    """Where a reader finds `final`: there, or where it was put while it is being replaced. Changes nothing."""
    previous = _previous(_real(final))
    # The new one comes before the previous one goes: if neither was there, it came in between.
    return previous if not final.exists() and previous.is_dir() else final


def read_directory(final: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a directory, from one version of it, while another process may replace it. Removes nothing.

    Args:
        read: Given the place to read from; called again when the directory was replaced meanwhile.

    Raises:
        RunError: It is replaced faster than it is read.
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


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold an output directory (or file) for this process: a second command that writes to the same place is refused.

    The lock is a file `.NAME.lock` beside the output, or in it where only the directory itself can be written. The
    system releases it when the process ends, however it ends, so that a lock file that was left behind blocks nobody.
    Two names of one place, a link and its target, have one lock.

    Args:
        output: What will be written. It need not exist, and is not created; the directory above it is.

    Raises:
        RunError: Another process holds it, or the lock cannot be written.
        UsageError: The place cannot be written to.
    """
    from filelock import FileLock, Timeout

    real = _real(output)
    beside = os.access(real.parent, os.W_OK | os.X_OK) or not real.is_dir()
    place = real.with_name(f".{real.name}.lock") if beside else real / ".lock"
    check_writable(place.parent)
    lock = FileLock(place, timeout=0)
    with _told(place), contextlib.suppress(NotImplementedError):  # a file system without locks
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            place.write_text(f"process {os.getpid()} on {_host()}", encoding="utf-8")
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
                place.unlink()  # before the release: a process that waits for the old file notices that it is gone
            lock.release()


def _lock_holder(place: Path) -> str:
    """Who holds a lock, in brackets; empty where the file does not tell."""
    try:
        with place.open("rb") as file:
            text = printable(file.read(200).decode("utf-8", "replace"))
    except OSError:
        return ""
    return f" ({text})" if text.startswith("process ") else ""


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSON-lines file and hand it to the system at once. A cut last line is removed first.

    Raises:
        RunError: It cannot be written.
    """
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            line = _mend(file) + line
            file.write(line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. A last line that a crash cut off is left out, and this is said on stderr.

    Raises:
        UsageError: No such file, or a line that is no JSON object; the message names it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # every whole line ends in a line break
                err.print(f"[yellow]{escape(str(path))}:{number}: the last line was cut off and is left out[/]")
                continue
            raise UsageError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _mend(file: Any) -> bytes:
    """Bring the end of an open JSON-lines file in order: the bytes to write before the next row."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start and b"\n" not in tail:
        step = min(start, 4096)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    last = tail.rpartition(b"\n")[2]
    if not last:
        return b""
    try:
        json.loads(last)
    except ValueError:
        file.truncate(end - len(last))
        return b""
    return b"\n"


def _real(path: Path) -> Path:
    """The path behind links: renaming onto a link would replace the link, not what it stands for."""
    return Path(os.path.realpath(path))


def _previous(final: Path) -> Path:
    # A name that nobody else gives: what bears it is removed.
    return final.with_name(f"{final.name}.previous-emrrg")


def _version(directory: Path) -> tuple[int, int, int] | None:
    """What tells a directory from one that takes its place later; None where there is none."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _host() -> str:
    return socket.gethostname().replace("/", "_") or "localhost"


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files and directories for `path` whose process, on this host, is gone."""
    start = f"{path.name}.tmp-{_host()}-"
    for entry in path.parent.iterdir():
        pid, dash, _ = entry.name.removeprefix(start).partition("-")
        if not (entry.name.startswith(start) and dash and pid.isdecimal()) or _alive(int(pid)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid() or os.name != "posix":  # elsewhere signal 0 is no question: it would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, OSError):
        return True
    return True


def read_record(file: Path, what: str, hint: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Args:
        what: What the file is, for the message.
        hint: What to do when it is broken.

    Raises:
        RunError: It cannot be read, or holds something else.
    """
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise RunError(f"{file}, {what}, cannot be read: {error}", hint=hint) from error
    return record


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory) / name
            if not path.is_symlink() and path.is_file():
                # Windows syncs only what is open for writing; elsewhere a read-only copy must do.
                with path.open("rb" if os.name == "posix" else "rb+") as file:
                    os.fsync(file.fileno())
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    """Bring a directory's entries to the disk, where the system can (not on Windows, not on every network share)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn a system error into one that says which file could not be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(directory: Path) -> None:
    """Makes sure, before hours of work, that the directory is or can be made and written to. Makes nothing.

    Raises:
        UsageError: when it, or one above it, is a file or may not be written.
    """
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"{directory} cannot be written: {nearest} is a file", hint="Give another --output.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{directory} cannot be written: no permission in {nearest}", hint="Give another --output.")


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Says in words that tensors could not be written: torch and safetensors have errors of their own for a full disk.

    Raises:
        RunError: with the space that is left there.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(nearest).free / 2**20
        raise RunError(f"cannot write {place}: {reason}", hint=f"{free:,.1f} MiB are free there.") from error
