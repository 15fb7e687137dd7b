"""Reads users' tables of images and reports (CSV, TSV, JSON lines) and the large CSV files of data sets."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.report_text import whole_characters
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.spreadsheets import plain_text
from emrrg_cli.ingest.sources.text_files import csv_rows, find_encoding, json_rows, read_lines, reading, tsv_rows

SUFFIXES = (".csv", ".tsv", ".jsonl")

# Values that spreadsheets and data frames write for an empty cell.
_EMPTY = {"nan", "na", "n/a", "null", "none", "<na>"}
_MOST_NAMES = 50  # of columns in a message
_LONGEST_EMPTY = max(map(len, _EMPTY))


@dataclass(frozen=True)
class Table:
    """A table. Each call of `rows` reads the file again, row by row.

    Attributes:
        columns: Names of the columns, in order.
        encoding: Text encoding of the file.
    """

    path: Path
    columns: tuple[str, ...]
    encoding: str

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Yields the last line number of each row and its cells by column; None for a row that does not fit the header.

        Raises:
            RunError: A line is not in the format of the file's extension.
        """
        for number, cells in _rows_of(self.path, self.encoding):
            if isinstance(cells, dict):
                yield number, cells
            elif len(cells) != len(self.columns):
                yield number, None
            else:
                yield number, dict(zip(self.columns, cells, strict=True))

    def check_columns(self, wanted: dict[str, str]) -> None:
        """Checks that each wanted column exists exactly once.

        Args:
            wanted: Column names by option.

        Raises:
            UsageError: A column is missing or repeated; the message lists the columns.
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
    """Opens a table; its file extension, which `.gz` may follow, gives the format.

    `find_encoding` and `csv_rows` describe how encoding and delimiter are found. The columns of JSON lines are the keys
    of all lines.

    Raises:
        UsageError: The file does not exist or has another extension.
        RunError: It cannot be read, is empty, or has the wrong format; the message names the line.
    """
    if not path.exists():
        raise UsageError(f"no such table: {path}")
    if _kind(path) not in SUFFIXES or not path.is_file():
        raise UsageError(f"{path} is not a table", hint=f"Tables end in {', '.join(SUFFIXES)}, or in those and .gz.")
    with reading(path):
        encoding = find_encoding(path)
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
    """Yields line number and row: an object of JSON lines, or a list of cells; with `header`, the header row too."""
    with reading(path):
        if _kind(path) == ".jsonl":
            yield from json_rows(path, read_lines(path, encoding))
            return
        rows = tsv_rows(path, encoding) if _kind(path) == ".tsv" else csv_rows(path, encoding)
        for number, cells in islice(rows, 0 if header else 1, None):
            yield number, [plain_text(cell) for cell in cells]


def cell_text(value: Any) -> str:
    """Returns a cell as stripped text; `nan`, `NA`, `null`, `None` and similar values are empty."""
    text = "" if value is None else str(value).strip()
    if not text or (len(text) <= _LONGEST_EMPTY and text.lower() in _EMPTY):
        return ""
    return whole_characters(text).replace("\0", "")


def cell_list(value: Any) -> list[str]:
    """Returns a cell as a list of texts without empty ones: a list as in JSON or Python, or text between `|` or `;`."""
    found = _listed(value)
    parts = cell_text(value).replace(";", "|").split("|") if found is None else found
    return [text for part in parts if (text := cell_text(part))]


def _listed(value: Any) -> list[Any] | None:
    """Returns the items of a list, also of one that is written as text."""
    if isinstance(value, list):
        return value
    text = cell_text(value)
    if text.startswith("[") and text.endswith("]"):
        for read in (json.loads, ast.literal_eval):  # pandas writes lists as Python does
            try:
                found = read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and not any(isinstance(part, list | dict | tuple | set) for part in found):
                return found
    return None


def whole_number(text: str) -> int | None:
    """Parses an id, also as in `s50414267`, or with the `.0` of data frames with gaps; None: not a whole number."""
    digits = text.removesuffix(".0").lstrip("ps")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 16 else None


class CsvFile:
    """A CSV file of a published data set, plain or gzipped (`.gz`). Each iteration reads it again, row by row.

    The encoding is found as in `read_table`.

    Args:
        path: The file.
        required: Columns that must exist.
        optional: Columns that are read as empty if they do not exist.

    Attributes:
        encoding: Text encoding of the file.

    Raises:
        RunError: The file cannot be read, is empty, or lacks a column.
    """

    def __init__(self, path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        self.path = path
        self._wanted = (*required, *optional)
        with reading(path):
            self.encoding = find_encoding(path)
            rows = csv_rows(path, self.encoding)
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
        """Yields the last line number of each row and its wanted cells, as `cell_text` reads them.

        The cells are None if the row is longer or shorter than the header.

        Raises:
            RunError: The file is cut short, or a line is not CSV.
        """
        with reading(self.path):
            rows = csv_rows(self.path, self.encoding)
            columns = next(rows)[1]
            places = [columns.index(column) if column in columns else None for column in self._wanted]
            for number, cells in rows:
                if len(cells) != len(columns):
                    yield number, None
                else:
                    yield number, tuple("" if place is None else cell_text(cells[place]) for place in places)


def _names(columns: Sequence[str]) -> str:
    # The first line of a file that is no table may have any length.
    more = f", and {len(columns) - _MOST_NAMES:,} more" if len(columns) > _MOST_NAMES else ""
    return (", ".join(f"{printable(column):.60}" for column in columns[:_MOST_NAMES]) or "none") + more
