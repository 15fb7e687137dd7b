"""Tables: those that people keep beside their images (CSV, TSV, JSON lines), and the large CSV files of data sets."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError, UsageError

SUFFIXES = (".csv", ".tsv", ".jsonl")

# What spreadsheets and data frames write where there is nothing.
_EMPTY = {"nan", "na", "n/a", "null", "none", "<na>"}
_LONGEST_EMPTY = max(map(len, _EMPTY))

_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_MAX_CELL = 10_000_000


@dataclass(frozen=True)
class Table:
    """A table, read row by row each time its rows are asked for.

    Attributes:
        columns: Their names, in order.
        encoding: That it is read by.
    """

    path: Path
    columns: tuple[str, ...]
    encoding: str

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Yields the line that a row ends on and its cells by column, None for a row that does not fit the header.

        Raises:
            RunError: From some line on it is not what its name says.
        """
        for number, cells in _rows_of(self.path, self.encoding):
            if isinstance(cells, dict):
                yield number, cells
            elif len(cells) != len(self.columns):
                yield number, None
            else:
                yield number, dict(zip(self.columns, cells, strict=True))

    def check_columns(self, wanted: dict[str, str]) -> None:
        """Makes sure that columns are there, once each.

        Args:
            wanted: Option and the name it gave.

        Raises:
            UsageError: One is not; names those there are.
        """
        there = _names(self.columns)
        for option, column in wanted.items():
            if column not in self.columns:
                raise UsageError(
                    f"{self.path} has no column {column!r} ({option}); its columns: {there}",
                    hint=f"Name the column with {option}.",
                )
            if self.columns.count(column) > 1:
                raise UsageError(f"{self.path} has several columns named {column!r}; its columns: {there}")


def read_table(path: Path) -> Table:
    """Opens a table by the ending of its name, which `.gz` may follow.

    UTF-8 is expected, with or without a byte order mark, and UTF-16 with one; anything else is read as Windows-1252.
    Commas, semicolons or tabs separate the cells of a `.csv`, whichever the header has most of. The columns of JSON
    lines are all those that some line has.

    Raises:
        UsageError: It does not exist, or its name ends in something else.
        RunError: It cannot be read, is empty, or is not what its name says; names the line.
    """
    if not path.exists():
        raise UsageError(f"no such table: {path}")
    if _kind(path) not in SUFFIXES or not path.is_file():
        raise UsageError(f"{path} is not a table", hint=f"Tables end in {', '.join(SUFFIXES)}, or in those and .gz.")
    with _reading(path):
        encoding = _encoding(path)
        rows = _rows_of(path, encoding, header=True)
        columns: dict[str, None] | list[str]
        if _kind(path) == ".jsonl":
            columns, empty = {}, True
            for _, row in rows:
                columns |= dict.fromkeys(row)
                empty = False
        else:
            columns, empty = list(next(rows, (0, []))[1]), next(rows, None) is None
    if not columns:
        raise RunError(f"{path} is empty")
    if empty:
        raise RunError(f"{path} has no rows")
    return Table(path, tuple(columns), encoding)


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def _rows_of(path: Path, encoding: str, *, header: bool = False) -> Iterator[tuple[int, Any]]:
    """Line and row: an object of JSON lines, or a list of cells, of which the header is the first if asked for."""
    with _reading(path), _open_bytes(path) as file, _as_text(file, encoding) as lines:
        if _kind(path) == ".jsonl":
            yield from _json_rows(path, lines)
            return
        first = lines.readline()
        lines.seek(0)
        delimiter = "\t" if _kind(path) == ".tsv" else max(",;\t", key=first.count)
        yield from islice(_csv_rows(path, lines, delimiter), 0 if header else 1, None)


def cell_text(value: Any) -> str:
    """A cell as text without white space at its ends; `nan`, `NA`, `null`, `None` and the like are empty."""
    text = "" if value is None else str(value).strip()
    if not text or (len(text) <= _LONGEST_EMPTY and text.lower() in _EMPTY):
        return ""
    if text.isascii():
        return text.replace("\0", "")
    # JSON can spell half a character (a lone surrogate), which no UTF-8 file holds.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")


def cell_list(value: Any) -> list[str]:
    """A cell as a list of texts: a JSON list, or text divided by `|` or `;`; empty ones are left out."""
    parts = value if isinstance(value, list) else cell_text(value).replace(";", "|").split("|")
    return [text for part in parts if (text := cell_text(part))]


class CsvFile:
    """A CSV file of a published data set, plain or gzipped (`.gz`), read row by row each time it is iterated.

    The encoding is found as in `read_table`.

    Args:
        path: The file.
        required: Columns that must be there.
        optional: Columns that are read as empty where they are not.

    Attributes:
        encoding: That it is read by.

    Raises:
        RunError: It cannot be read, is empty, or lacks a column.
    """

    def __init__(self, path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        self.path = path
        self._wanted = (*required, *optional)
        with _reading(path):
            self.encoding = _encoding(path)
            rows = self._rows()
            columns = next(rows, (0, []))[1]
            if not columns:
                raise RunError(f"{path} is empty")
            for column in required:
                if columns.count(column) != 1:
                    problem = "several columns named" if column in columns else "no column"
                    raise RunError(f"{path} has {problem} {column!r}; its columns: {_names(columns)}")
            if next(rows, None) is None:
                raise RunError(f"{path} has no rows")

    def __iter__(self) -> Iterator[tuple[int, tuple[str, ...] | None]]:
        """Yields the line a row ends on and its wanted cells, as `cell_text` reads them.

        None stands for the cells of a row that is longer or shorter than the header.

        Raises:
            RunError: The file is cut short, or is not CSV from some line on.
        """
        with _reading(self.path):
            rows = self._rows()
            columns = next(rows)[1]
            places = [columns.index(column) if column in columns else None for column in self._wanted]
            for number, cells in rows:
                if len(cells) != len(columns):
                    yield number, None
                else:
                    yield number, tuple("" if place is None else cell_text(cells[place]) for place in places)

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        with _open_bytes(self.path) as file, _as_text(file, self.encoding) as lines:
            yield from _csv_rows(self.path, lines, ",")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what may go wrong while a file is read into an error that names it."""
    try:
        yield
    except EOFError:
        raise RunError(f"{path} is cut short: the compressed data end too early", hint="Download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise RunError(f"{path} is not a whole gzip file: {error}", hint="Download it again.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None


def _open_bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _as_text(file: IO[bytes], encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding, errors="replace", newline="")


def _names(columns: Sequence[str]) -> str:
    return ", ".join(printable(column) for column in columns) or "none"


def _encoding(path: Path) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open_bytes(path) as file:
        start = file.read(4)
        for mark, encoding in _BYTE_ORDER_MARKS:
            if start.startswith(mark):
                return encoding
        file.seek(0)
        try:
            while block := file.read(2**20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8"


def _csv_rows(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the line that each row ends on and its cells, the header first; rows without content are left out."""
    csv.field_size_limit(_MAX_CELL)
    # Strict: a quote that is never closed would otherwise swallow the rest of the file.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield reader.line_num, [name.strip() for name in next(reader, [])]
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise RunError(
            f"{path}:{reader.line_num}: not valid CSV: {error}",
            hint="A cell with a comma, a line break or a quote in it stands between quotes, its own quotes doubled.",
        ) from None


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
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
