"""JSON and JSON-lines files, and reads with a size limit."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rich.markup import escape

from emrrg_cli.console import err, printable
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.output_paths import writable_path
from emrrg_cli.files.write_errors import name_write_errors

_LARGEST_RECORD = 64 * 2**20  # bytes of a JSON file
_LARGEST_TABLE = 256 * 2**20  # bytes of a JSON-lines file that is read as a whole
_LARGEST_LINE = 16 * 2**20  # bytes of a line, in a JSON-lines file that is read line by line


def append_jsonl(path: Path, row: Mapping[str, Any]) -> int:
    """Append one row to a JSON-lines file, without buffering. An incomplete last line is removed first.

    Returns:
        The byte at which the row begins.

    Raises:
        RunError: The file cannot be written.
    """
    line = jsonl_line(row)
    path = writable_path(path)
    with name_write_errors(path, len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            before = _repair_end(file)
            begin = file.seek(0, os.SEEK_END) + len(before)
            file.write(before + line)
            return begin


def jsonl_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a JSON-lines file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file. A last line that a crash cut off is skipped, with a message on stderr.

    Raises:
        UsageError: The file cannot be read, or a line is not a JSON object. The message names the file and line.
    """
    try:
        lines = read_bounded(path, _LARGEST_TABLE).split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    rows = (_row(path, number, line, number == len(lines)) for number, line in enumerate(lines, start=1))
    return [row for row in rows if row is not None]


def iterate_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON-lines file of any size, one at a time, each with the byte at which it begins.

    Raises:
        UsageError: As `read_jsonl`, or a line is too long.
    """
    try:
        with open_regular(path) as file:
            begin = number = 0
            while line := file.readline(_LARGEST_LINE):
                number += 1
                if len(line) == _LARGEST_LINE:
                    raise UsageError(f"{path}:{number}: longer than {_LARGEST_LINE:,} bytes")
                row = _row(path, number, line, not line.endswith(b"\n"))
                if row is not None:
                    yield begin, row
                begin += len(line)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _row(path: Path, number: int, line: bytes, is_last: bool) -> dict[str, Any] | None:
    """The object in a line; None if the line is empty, or is the last one and incomplete."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if is_last:  # all complete lines end with a line break
            err.print(
                f"[yellow]{escape(str(path))}:{number}: the last line is incomplete and is skipped[/]", soft_wrap=True
            )
            return None
        raise UsageError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UsageError(f"{path}:{number}: expected an object, found {json_kind(row)}")
    return row


def json_kind(value: object) -> str:
    """What a value of a JSON file is, in words."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
        float: "a decimal number",
    }
    return kinds.get(type(value), "a number")


def read_record(file: Path, what: str, hint: str) -> dict[str, Any] | None:
    """Read the JSON object in a file; None if there is no file.

    Args:
        what: Description of the file, for the error message.
        hint: What the user can do when the file is broken.

    Raises:
        RunError: The file cannot be read, is not a regular file, is too large or holds something else.
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


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes. Never waits, also not on a pipe or a device.

    Raises:
        OSError: The file is not regular, too large or unreadable; `strerror` gives the reason.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)  # files of /proc have no size
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return data


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Never waits, also not on a pipe or a device.

    Raises:
        OSError: The file is not regular or unreadable; `strerror` gives the reason.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def _repair_end(file: Any) -> bytes:
    """Remove an incomplete last line of an open JSON-lines file. Returns the bytes to write before the next row."""
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
