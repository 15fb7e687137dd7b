"""Layouts of prediction files: JSON lines, CSV, R2Gen's result JSON and ReXrank's JSON. Texts are not changed."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.report_text import unix_line_ends
from emrrg_cli.errors import UsageError
from emrrg_cli.files.records import json_kind
from emrrg_cli.files.spreadsheets import plain_text
from emrrg_cli.ingest.sources.text_files import find_encoding

# Names of columns and keys in published files. The first name that the file contains is used.
ID_NAMES = ("study_id", "id", "uid", "study", "image_id", "dicom_id", "filename", "image")
HYPOTHESIS_NAMES = (
    "hypothesis", "model_prediction", "prediction", "predicted", "pred", "generated", "generated_report", "hyp",
    "output", "report", "findings", "impression", "text",
)  # fmt: skip
REFERENCE_NAMES = (
    "reference", "ground_truth", "groundtruth", "gt", "ref", "reference_report", "target", "label", "report",
    "findings", "impression", "text",
)  # fmt: skip

_MAX_BYTES = 2 * 2**30
_CELL = 2**24  # characters
_DELIMITERS = ",;\t"

KEY = "\0id"  # the id of a record that is the value of a JSON object
REXRANK = "ReXrank's JSON"


@dataclass(frozen=True)
class Table:
    """Records of a file, the place of each record (such as "line 3"), and the layout of the file."""

    path: Path
    records: Sequence[Mapping[str, Any]]
    places: Sequence[str]
    layout: str

    def named(self, names: Iterable[str]) -> str | None:
        """Returns the first of `names` that the first record has, ignoring case and objects (findings by name)."""
        first = self.records[0] if self.records else {}
        there = {key.lower(): key for key, value in first.items() if not isinstance(value, Mapping)}
        return next((there[name] for name in names if name in there), None)

    def heads(self) -> str:
        """Returns a sentence that lists the columns."""
        return f"The columns are: {', '.join(printable(str(key)) for key in self.records[0] if key != KEY)}."


def read_table(path: Path, columns: Sequence[str] = ()) -> Table:
    """Reads a file of texts.

    Args:
        columns: names of columns that the user gave.

    Raises:
        UsageError: The file cannot be read, has an unknown type, or is not in its format.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".json") and path.is_file():
        raise UsageError(f"{path} has an unknown file type", hint="Use a .jsonl, .csv, .tsv or .json file.")
    text = _text(path)
    if not text.strip():
        raise UsageError(f"{path} is empty")
    if kind == ".jsonl":
        return _read_lines(path, text)
    if kind == ".json":
        return _read_json(path, text)
    return _read_csv(path, text, columns)


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", hint="Give a file of predictions (.jsonl, .csv or .json).")
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 30} GB, so it is not a file of reports")
        data, encoding = path.read_bytes(), find_encoding(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig" if encoding == "cp1252" else encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})",
            hint=f"Convert it first: iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}",
        ) from error


def _read_csv(path: Path, text: str, names: Sequence[str]) -> Table:
    csv.field_size_limit(_CELL)
    known = {*ID_NAMES, *HYPOTHESIS_NAMES, *REFERENCE_NAMES, *names}
    text = unix_line_ends(text)
    if text[:6].lower() in {f"sep={mark}\n" for mark in _DELIMITERS}:  # Excel's line that names the delimiter
        delimiter, text = text[4], text[6:]
    else:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text, known)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [[plain_text(cell) for cell in row] for row in reader if row]
    except csv.Error as error:
        reason = "a double quote is not closed" if "unexpected end of data" in str(error) else str(error)
        raise UsageError(
            f"{path} is not a CSV file: {reason}", hint='Inside a quoted text, write each double quote twice ("").'
        ) from error
    if not rows:
        raise UsageError(f"{path} is empty")
    head = [name.strip() for name in rows[0]]
    if len(head) == 1 and head[0].lower() not in known:
        # R2Gen's res.csv and gts.csv: one report per row, without header and ids; pandas may have written the header 0.
        rows = rows[1:] if head == ["0"] else rows
        records = [{"text": row[0]} for row in rows]
        return Table(path, records, [f"row {n}" for n in range(1, len(rows) + 1)], "CSV with one column and no header")
    if len(set(head)) != len(head):
        raise UsageError(f"{path}: two columns have the same name: {', '.join(map(printable, head))}")
    places = [f"row {number}" for number in range(2, len(rows) + 1)]
    for place, row in zip(places, rows[1:], strict=True):
        if len(row) != len(head):
            raise UsageError(
                f"{path}, {place}: {len(row)} cells, but the header has {len(head)}",
                hint="Put texts with commas or line breaks in double quotes.",
            )
    return Table(path, [dict(zip(head, row, strict=True)) for row in rows[1:]], places, "CSV")


def _delimiter(text: str, known: set[str]) -> str:
    """Returns the first of comma, semicolon and tab that splits the first line into columns with a known name.

    If none does, returns a comma.
    """
    head = text.lstrip().partition("\n")[0]
    for delimiter in _DELIMITERS:
        names = [name.strip(' "') for name in head.split(delimiter)]
        if len(names) > 1 and any(name.lower() in known or name in known for name in names):
            return delimiter
    return ","


def _read_lines(path: Path, text: str) -> Table:
    records, places = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        records.append(_object(_json(line, f"{path}:{number}", _unique_keys), f"{path}:{number}"))
        places.append(f"line {number}")
    return Table(path, records, places, "JSON lines")


def _read_json(path: Path, text: str) -> Table:
    content = _json(text, str(path), _unique_keys)
    if isinstance(content, list):
        places = [f"entry {number}" for number in range(1, len(content) + 1)]
        records = [_object(row, f"{path}, {place}") for place, row in zip(places, content, strict=True)]
        return Table(path, records, places, "JSON list of records")
    _object(content, str(path))
    places = [f"id {name}" for name in content]
    objects = sum(isinstance(row, Mapping) for row in content.values())
    if 0 < objects < len(content):
        few = 2 * objects < len(content)
        name = next(name for name, row in content.items() if isinstance(row, Mapping) == few)
        raise UsageError(
            f"{path}: the entries differ: {objects} of {len(content)} are objects; the entry {printable(name)!r} is "
            f"{'one' if few else 'none'}"
        )
    if objects:
        records = [{**row, KEY: name} for name, row in content.items()]
        layout = REXRANK if any("model_prediction" in row for row in content.values()) else "JSON by id"
        layout = REXRANK if any("section_findings" in row for row in content.values()) else layout
        return Table(path, records, places, layout)
    return Table(path, [{KEY: name, "text": row} for name, row in content.items()], places, "R2Gen's JSON")


def _json(text: str, where: str, pairs: Any = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "it is nested too deeply"
        raise UsageError(f"{where}: not JSON: {reason}") from None
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UsageError(f"the key {twice!r} occurs twice", hint="Write each key only once.")
    return made


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected an object, found {json_kind(value)}")
    return value
