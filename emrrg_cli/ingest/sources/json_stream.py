"""Reads large JSON files piece by piece with ijson; accepts NaN, Infinity and lone surrogates as Python's json does."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ijson
from ijson.common import ObjectBuilder

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources.text_files import open_regular

_BLOCK = 2**20  # bytes
_MAX_VALUE = 2**24  # bytes of one value; reading stops at a longer one
_MAX_EXPLAINED = 2**29  # bytes; a broken file up to this size is read again to find the line of the error

Event = tuple[str, Any]

# NaN and Infinity, which only Python's json writes, and lone surrogates: ijson rejects these or reads them differently.
_ODD = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|Infinity|NaN', re.DOTALL)
_ESCAPE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)


@contextlib.contextmanager
def open_json(path: Path) -> Iterator[JsonDocument]:
    """Opens a JSON file.

    NaN, which data frames write for missing values, is read as null, and a lone surrogate as U+FFFD.

    Raises:
        UsageError: The file does not exist.
        RunError: It cannot be read or is not JSON; the message names the line. Also raised inside the block.
    """
    try:
        with open_regular(path) as file:
            try:
                yield JsonDocument(file)
            # SystemError: ijson, for a number of more digits than Python reads.
            except (ijson.JSONError, UnicodeDecodeError, ValueError, SystemError) as error:
                raise _explained(path, error) from None
    except FileNotFoundError:
        raise UsageError(f"no such annotation file: {path}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None


class JsonDocument:
    """The JSON events of a file; `open_json` creates it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._source = _Source(file)
        self._events: Iterator[Event] = iter(ijson.basic_parse(self._source, buf_size=_BLOCK))

    def next(self) -> Event:
        """Returns the next event."""
        self._source.unread = 0
        return next(self._events)

    def skip(self, start: Event) -> None:
        """Skips the value that starts with this event."""
        depth = _depth(start[0])
        while depth:
            depth += _depth(self.next()[0])

    def items(self) -> Iterator[Any]:
        """Yields the items of a list whose start was read, and reads its end."""
        while (event := self.next())[0] != "end_array":
            builder = ObjectBuilder()
            builder.event(*event)
            depth = _depth(event[0])
            while depth:
                event = next(self._events)
                depth += _depth(event[0])
                builder.event(*event)
            yield builder.value

    def end(self) -> None:
        """Checks that nothing follows."""
        for _ in self._events:
            pass


def start_value(event: Event) -> Any:
    """Returns a value of the type that starts with this event."""
    return {"start_map": {}, "start_array": []}.get(event[0], event[1])


def _depth(event: str) -> int:
    return {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}.get(event, 0)


class _Source:
    """The bytes of a file in the form that ijson accepts.

    Attributes:
        unread: Bytes read since this was last set to 0.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.unread = 0
        self._file, self._held = file, b""
        start = file.read(3)
        if start != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        self._odd = _is_odd(file)

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        while True:
            block = self._file.read(size)
            self.unread += len(block)
            if self.unread > _MAX_VALUE + 2 * _BLOCK:
                raise ValueError("a value has no end")
            if not self._odd:
                return block
            if (text := self._repaired(block)) or not block:
                return text

    def _repaired(self, block: bytes) -> bytes:
        """Returns a block with the odd text replaced; keeps an unfinished string or word for the next block."""
        text = self._held + block
        done, end = [], 0
        for token in _TOKEN.finditer(text):
            done += [text[end : token.start()], _plain(token[0])]
            end = token.end()
        rest = text[end:]
        quote = rest.find(b'"')
        keep = len(rest) if not block else quote if quote >= 0 else max(0, len(rest) - len("Infinity"))
        self._held = rest[keep:]
        return b"".join([*done, rest[:keep]])


def _is_odd(file: IO[bytes]) -> bool:
    start, tail = file.tell(), b""
    odd = False
    while not odd and (block := file.read(_BLOCK)):
        odd = _ODD.search(tail + block) is not None
        tail = block[-8:]
    file.seek(start)
    return odd


def _plain(token: bytes) -> bytes:
    if token == b"NaN":
        return b"null"
    if token == b"Infinity":
        return b"1e999"
    return _ESCAPE.sub(lambda match: b"\\ufffd" if match[1] else match[0], token) if b"\\u" in token else token


def _explained(path: Path, error: Exception) -> RunError:
    """Returns the error with its line, which ijson does not know: Python's json reads the file again."""
    try:
        if path.stat().st_size <= _MAX_EXPLAINED:
            json.loads(path.read_bytes().decode("utf-8").removeprefix("\ufeff"))
    except json.JSONDecodeError as found:
        return RunError(f"{path}:{found.lineno}:{found.colno}: not valid JSON: {found.msg}")
    except UnicodeDecodeError as found:
        return RunError(f"{path}: not UTF-8 text (byte {found.start})")
    except RecursionError:
        return RunError(f"{path}: not an annotation file: nested too deeply")
    except ValueError:
        return RunError(f"{path}: not valid JSON: a number of thousands of digits")
    return RunError(f"{path}: not valid JSON: {str(error).splitlines()[0]}")
