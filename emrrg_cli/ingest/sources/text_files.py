"""Tables as files: their encoding, their lines, and the cells of CSV and TSV. Everything is read piece by piece."""

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

# A line of Excel's that names the delimiter.
_SEPARATOR = re.compile(r'"?sep=(.|\\t)"?', re.IGNORECASE)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what may go wrong while a file is read into an error that names it.

    Raises:
        RunError: It cannot be read, or is a gzip file that is not whole.
    """
    try:
        yield
    except EOFError:
        raise RunError(f"{path} is cut short: the compressed data end too early", hint="Download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise RunError(f"{path} is not a whole gzip file: {error}", hint="Download it again.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None


def open_regular(path: Path) -> IO[bytes]:
    """A file, open for reading.

    Looked at first: opening a pipe would never return, and devices and system files may have no end.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or path.resolve().is_relative_to("/proc"):
        raise OSError(0, "not a regular file")
    return path.open("rb")


def _open_bytes(path: Path) -> IO[bytes]:
    file = open_regular(path)
    return cast(IO[bytes], gzip.open(file)) if path.suffix.lower() == ".gz" else file


def read_lines(path: Path, encoding: str, errors: str = "replace") -> Iterator[str]:
    """The lines of a text file, plain or gzipped (`.gz`), with their ends.

    Raises:
        RunError: A line is longer than any line of a table.
    """
    with _open_bytes(path) as file, io.TextIOWrapper(file, encoding, errors=errors, newline="") as lines:
        number = 0
        while line := lines.readline(_MAX_LINE):
            number += 1
            if len(line) >= _MAX_LINE:
                raise RunError(f"{path}:{number}: a line of more than {_MAX_LINE:,} characters")
            yield line


def find_encoding(path: Path) -> str:
    """The encoding of a text file, plain or gzipped (`.gz`).

    UTF-8, UTF-16 or UTF-32 by the byte order mark; UTF-16 without one by its zeros; UTF-8 if the whole file is UTF-8;
    otherwise Windows-1252.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open_bytes(path) as file:
        start = file.read(4096)
        for mark, encoding in _BYTE_ORDER_MARKS:
            if start.startswith(mark):
                return encoding
        # A character of ASCII is a byte and a zero. Other bytes of text are not zero.
        first, second = start[::2].count(0), start[1::2].count(0)
        if max(first, second) > len(start) // 4 and min(first, second) <= len(start) // 40:
            return "utf-16-be" if first > second else "utf-16-le"
        file.seek(0)
        try:
            while block := file.read(2**20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8"


def csv_rows(path: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the line that each row ends on and its cells, the header first; rows without content are left out.

    Commas, semicolons or tabs separate the cells, whichever the header has most of outside quotes, or what a line
    `sep=;` before it names.

    Raises:
        RunError: It is not CSV from some line on; names the line that starts the trouble.
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
    # Strict: a quote that is never closed would otherwise swallow the rest of the file.
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
            hint="A cell with a comma, a line break or a quote in it stands between quotes, its own quotes doubled.",
        ) from None


def _first_line(lines: Iterator[str]) -> tuple[int, str]:
    """How many lines without content come first, and the line after them."""
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
    """As `csv_rows`, for tab-separated values, which have no quoting: a row is a line.

    Quotes around a whole cell are taken off, as spreadsheets write them; any other quote is a character.
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
    """Yields the number of each line and its object; empty lines are left out.

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
