"""Files that are whole or not there: written under a temporary name, brought to the disk, then renamed.

Temporary names are `NAME.tmp-HOST-PID-RANDOM`, beside the final name and so on the same file system. Those that a
dead process of this host left behind are removed by the next write to the same name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.markup import escape

from emrrg_cli.console import err, printable
from emrrg_cli.errors import RunError, UsageError

T = TypeVar("T")

_READS = 10  # of a directory that is replaced again and again
_LARGEST_RECORD = 64 * 2**20  # bytes of a JSON file
_LARGEST_TABLE = 256 * 2**20  # bytes of a JSON-lines file


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
    path = _writable_path(path)
    with _told(path, len(data)):
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
    final = _writable_path(final)
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
    final = _writable_path(final)
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
    final = _writable_path(final)
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
    path = _writable_path(path)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            line = _mend(file) + line
            file.write(line)


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file that has at most `limit` bytes. Does not wait, whatever is there.

    Raises:
        OSError: No regular file, too large a file, or one that cannot be read; `strerror` says so.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(limit + 1)  # files of /proc have no size
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return data


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. A last line that a crash cut off is left out, with a message on stderr.

    Raises:
        UsageError: No such file, or a line that is no JSON object; the message names it.
    """
    try:
        lines = read_bounded(path, _LARGEST_TABLE).split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
    """The path behind links, for readers and for places that the user names."""
    return Path(os.path.realpath(path))


def _writable_path(path: Path) -> Path:
    """The path behind links, after making sure that it is one to write to.

    Raises:
        RunError: A link leads out of its directory, or what is there is neither a regular file nor a directory.
    """
    real = _real(path)
    hint = "Remove it, or choose another --output."
    if path.is_symlink() and real.parent != _real(path.parent):
        raise RunError(f"{path} is a link to {printable(str(real))}: nothing is written through such links", hint=hint)
    with _told(path), contextlib.suppress(FileNotFoundError):
        if not (stat.S_ISREG(mode := real.stat().st_mode) or stat.S_ISDIR(mode)):
            raise RunError(f"{path} is not a regular file, so it is not replaced", hint=hint)
    return real


def refuse_links(directory: Path) -> None:
    """Makes sure that nothing in an output directory leads out of it, before anything is written there.

    Raises:
        RunError: A link in it points elsewhere, or something in it is neither a file nor a directory (a device, ...).
    """
    root = _real(directory)
    for folder, directories, names in os.walk(root):
        for name in (*directories, *names):
            entry = Path(folder) / name
            if entry.is_symlink():
                if not _real(entry).is_relative_to(root):
                    raise RunError(
                        f"{printable(str(entry))} is a link to {printable(os.readlink(entry))}: "  # noqa: PTH115
                        "nothing is written into a directory with such links",
                        hint="Put the file itself in its place, or choose another --output.",
                    )
            elif name in names and not stat.S_ISREG(entry.lstat().st_mode):
                raise RunError(
                    f"{printable(str(entry))} is not a regular file: nothing is written into its directory",
                    hint="Remove it, or choose another --output.",
                )


def directory_guard(directory: Path) -> Callable[[], None]:
    """A function that makes sure that an output directory is still the one it is now, called before each write.

    Without it, the first write after somebody removed the directory would make a new one without the earlier files.

    Raises (the function):
        RunError: The directory was removed, or another one is in its place.
    """
    status = directory.stat()

    def check() -> None:
        try:
            now = directory.stat()
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
            raise RunError(
                f"{directory} was {'removed' if now is None else 'replaced'} while the program wrote to it",
                hint="What was in it is lost. Start again, with another --output if something cleans this place up.",
            )

    return check


def is_leftover(entry: Path) -> bool:
    """Whether a directory entry is a lock or a temporary file of this program: no content of its own."""
    return entry.name == ".lock" or re.search(r"\.tmp-.+-\d+-[0-9a-f]{8}$", entry.name) is not None


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
    if pid == os.getpid() or os.name != "posix":  # on Windows, os.kill(pid, 0) terminates the process
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
        RunError: It cannot be read, is no regular file, is too large or holds something else.
    """
    try:
        record = json.loads(read_bounded(file, _LARGEST_RECORD).decode("utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = printable(error.strerror or "") if isinstance(error, OSError) else printable(str(error))
        raise RunError(f"{file}, {what}, cannot be read: {reason}", hint=hint) from error
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
def _told(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a system error into one that says which file could not be written, on a full disk also the space."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        hint = _space(next(above for above in path.absolute().parents if above.exists()), needed) if full else None
        raise RunError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error


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
def writing(place: Path, needed: int | None = None) -> Iterator[None]:
    """Reports tensors that could not be written: torch and safetensors have errors of their own for a full disk.

    Args:
        place: The file or directory that is written in the block.
        needed: About the bytes that it will take, where that is known: a disk without them is refused at once.

    Raises:
        RunError: Names the place, the space it needs and the space that is left.
    """
    from safetensors import SafetensorError

    nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
    if needed is not None and needed > shutil.disk_usage(nearest).free:
        raise RunError(f"cannot write {place}: the disk is full", hint=_space(nearest, needed))
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "inline_container" in reason:  # torch.save checks what it wrote, and not why it is cut off
            reason = "the file is cut off, most often because the disk is full"
        raise RunError(f"cannot write {place}: {reason}", hint=_space(nearest, needed)) from error


def _space(place: Path, needed: int | None) -> str:
    free = shutil.disk_usage(place).free / 2**20
    asked = "" if needed is None else f"It needs about {needed / 2**20:,.1f} MiB; "
    return f"{asked}{free:,.1f} MiB are free there."
