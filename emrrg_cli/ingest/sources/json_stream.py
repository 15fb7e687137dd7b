"""Large JSON files read piece by piece, by ijson; and what Python's reader takes beside the standard."""

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
_MAX_VALUE = 2**24  # bytes of one value; a broken file is given up there, not read to its end
_MAX_EXPLAINED = 2**29  # bytes of a broken file that is read whole, for the line of the error

Event = tuple[str, Any]

# What only Python's json writes, and halves of characters: text that ijson does not take, or takes otherwise.
_ODD = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|Infinity|NaN', re.DOTALL)
_ESCAPE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)


@contextlib.contextmanager
def open_json(path: Path) -> Iterator[JsonDocument]:
    """A JSON file, to be read from its start.

    NaN stands for null, as data frames write what is missing; half a character (a lone surrogate) for U+FFFD.

    Raises:
        UsageError: No such file.
        RunError: It cannot be read, or is not JSON; names the line. Raised inside the block too.
    """
    try:
        with open_regular(path) as file:
            try:
                yield JsonDocument(file)
            except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
                raise _explained(path, error) from None
    except FileNotFoundError:
        raise UsageError(f"no such annotation file: {path}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None


class JsonDocument:
    """The events of a file; made by `open_json`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._source = _Source(file)
        self._events: Iterator[Event] = iter(ijson.basic_parse(self._source, buf_size=_BLOCK))

    def next(self) -> Event:
        """The next event."""
        self._source.unread = 0
        return next(self._events)

    def skip(self, start: Event) -> None:
        """Skips the value that an event begins."""
        depth = _depth(start[0])
        while depth:
            depth += _depth(self.next()[0])

    def items(self) -> Iterator[Any]:
        """The items of a list, after its beginning; its end is read too."""
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
        """Makes sure that nothing follows."""
        for _ in self._events:
            pass


def start_value(event: Event) -> Any:
    """A value of the kind that an event begins."""
    return {"start_map": {}, "start_array": []}.get(event[0], event[1])


def _depth(event: str) -> int:
    return {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}.get(event, 0)


class _Source:
    """The bytes of a file as ijson takes them.

    Attributes:
        unread: Bytes that were read since this was set to 0.
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
        """A block without what is odd; a string or a word that may go on is kept for the next."""
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
    """The error with the place, which ijson does not know: the file is read once more, by Python's reader."""
    try:
        if path.stat().st_size <= _MAX_EXPLAINED:
            json.loads(path.read_bytes().decode("utf-8").removeprefix("\ufeff"))
    except json.JSONDecodeError as found:
        return RunError(f"{path}:{found.lineno}:{found.colno}: not valid JSON: {found.msg}")
    except UnicodeDecodeError as found:
        return RunError(f"{path}: not UTF-8 text (byte {found.start})")
    except RecursionError:
        return RunError(f"{path}: not an annotation file: nested too deeply")
    except ValueError as found:  # a number of thousands of digits
        return RunError(f"{path}: not valid JSON: {found}")
    return RunError(f"{path}: not valid JSON: {str(error).splitlines()[0]}")
