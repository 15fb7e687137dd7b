"""Reads the files of tables piece by piece: encoding, lines, and the cells of CSV, TSV and JSON lines."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from emrrg_cli.errors import RunError

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # starts with the mark of UTF-16, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAX_LINE = 20_000_000  # characters
_MAX_CELL = 10_000_000
_MAX_HEADER_LINES = 100

_MIXED = "cp1252"

# A first line by which Excel names the delimiter.
_SEPARATOR = re.compile(r'"?sep=(.|\\t)"?', re.IGNORECASE)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors of reading a file into a `RunError` that names the file.

    Raises:
        RunError: The file cannot be read, or is an incomplete gzip file.
    """
    try:
        yield
    except EOFError:
        raise RunError(f"{path} is cut short: the compressed data are incomplete", hint="Download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise RunError(f"{path} is not a whole gzip file: {error}", hint="Download it again.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None


def open_regular(path: Path) -> IO[bytes]:
    """Opens a regular file for reading.

    Other files are refused: opening a pipe may never return, and devices and system files may have no end.

    Raises:
        OSError: The file cannot be opened or is not a regular file.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or path.resolve().is_relative_to("/proc"):
        raise OSError(0, "not a regular file")
    return path.open("rb")


def _open_bytes(path: Path) -> IO[bytes]:
    file = open_regular(path)
    return cast(IO[bytes], gzip.open(file)) if path.suffix.lower() == ".gz" else file


def _from_windows(error: UnicodeError) -> tuple[str, int]:
    """Reads the bytes that are not UTF-8 as Windows-1252; an editor may have changed one line of a file of UTF-8."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(_MIXED, _from_windows)


def decoded(data: bytes) -> str:
    """Decodes UTF-8; bytes that are not UTF-8 are read as Windows-1252."""
    return data.decode("utf-8-sig", _MIXED)


def encoding_remarks(path: Path, encoding: str) -> list[str]:
    """Returns a remark if some bytes of a file of this encoding (`find_encoding`) were not UTF-8."""
    return [f"{path.name} is not all UTF-8: the other bytes were read as Windows-1252."] if encoding == _MIXED else []


def read_lines(path: Path, encoding: str, errors: str = "replace") -> Iterator[str]:
    """Yields the lines of a text file, plain or gzipped (`.gz`), with their line ends.

    Raises:
        RunError: A line has more than `_MAX_LINE` characters.
    """
    if encoding == _MIXED:
        encoding, errors = "utf-8", _MIXED
    with _open_bytes(path) as file, io.TextIOWrapper(file, encoding, errors=errors, newline="") as lines:
        number = 0
        while line := lines.readline(_MAX_LINE):
            number += 1
            if len(line) >= _MAX_LINE:
                raise RunError(f"{path}:{number}: a line of more than {_MAX_LINE:,} characters")
            yield line


def find_encoding(path: Path) -> str:
    """Finds the encoding of a text file, plain or gzipped (`.gz`).

    A byte order mark decides between UTF-8, UTF-16 and UTF-32; without one, zero bytes mean UTF-16. A file that is
    valid UTF-8 as a whole is UTF-8; in any other file, the bytes that are not UTF-8 are Windows-1252.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open_bytes(path) as file:
        start = file.read(4096)
        for mark, encoding in _BYTE_ORDER_MARKS:
            if start.startswith(mark):
                return encoding
        # In UTF-16 an ASCII character has one zero byte. Text in other encodings has no zero bytes.
        first, second = start[::2].count(0), start[1::2].count(0)
        if max(first, second) > len(start) // 4 and min(first, second) <= len(start) // 40:
            return "utf-16-be" if first > second else "utf-16-le"
        file.seek(0)
        try:
            while block := file.read(2**20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return _MIXED
    return "utf-8"


def csv_rows(path: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the last line number and the cells of each row, the header first, without empty rows.

    The delimiter is the comma, semicolon or tab that occurs most often in the header outside quotes, or the one that a
    line such as `sep=;` before the header names.

    Raises:
        RunError: A row is not CSV; the message names its first line.
    """
    csv.field_size_limit(_MAX_CELL)
    lines = read_lines(path, encoding)
    skipped, header = _first_line(lines)
    delimiter = None
    if match := _SEPARATOR.fullmatch(header.rstrip("\r\n ")):
        delimiter = "\t" if match[1] == "\\t" else match[1]
        more, header = _first_line(lines)
        skipped += 1 + more
    start = [header]
    while "".join(start).count('"') % 2 and len(start) < _MAX_HEADER_LINES and (line := next(lines, "")):
        start.append(line)
    # Without `strict`, a quote that is never closed would take the rest of the file as one cell.
    reader = csv.reader(chain(start, lines), delimiter=delimiter or _delimiter("".join(start)), strict=True)
    before, is_header = skipped, True
    try:
        for cells in reader:
            before = skipped + reader.line_num
            if any(cell.strip() for cell in cells):
                yield before, [cell.strip() for cell in cells] if is_header else cells
                is_header = False
    except csv.Error as error:
        raise RunError(
            f"{path}:{before + 1}: not valid CSV: {error}",
            hint="Put quotes around a cell that contains a comma, a line break or a quote, and double its quotes.",
        ) from None


def _first_line(lines: Iterator[str]) -> tuple[int, str]:
    """Returns the number of empty lines at the start, and the line after them."""
    skipped = 0
    for line in lines:
        if line.strip():
            return skipped, line
        skipped += 1
    return skipped, ""


def _delimiter(header: str) -> str:
    outside = "".join(header.split('"')[::2])
    return max(",;\t", key=outside.count)


def tsv_rows(path: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """Yields rows like `csv_rows`, for tab-separated values, which have no quoting: each line is a row.

    Quotes around a whole cell, as spreadsheets write them, are removed; any other quote is an ordinary character.
    """
    is_header = True
    for number, line in enumerate(read_lines(path, encoding), start=1):
        if is_header and _SEPARATOR.fullmatch(line.rstrip("\r\n ")):
            continue
        cells = [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]
        if any(cell.strip() for cell in cells):
            yield number, [cell.strip() for cell in cells] if is_header else cells
            is_header = False


def _unquoted(cell: str) -> str:
    inner = cell.strip(" ")[1:-1]
    whole = cell.strip(" ").startswith('"') and cell.strip(" ").endswith('"') and len(cell.strip(" ")) > 1
    return inner.replace('""', '"') if whole and '"' not in inner.replace('""', "") else cell


def json_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and the object of each line, without empty lines.

    Raises:
        RunError: A line is not an object.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise RunError(f"{path}:{number}: nested too deeply") from None
        except ValueError as error:
            raise RunError(f"{path}:{number}: not valid JSON: {error}", hint="Each line is an object.") from None
        if not isinstance(row, dict):
            raise RunError(f"{path}:{number}: not a JSON object", hint="Each line is an object.")
        yield number, row
