"""Reads prediction files: JSON lines, CSV, R2Gen's result JSON and ReXrank's JSON. Texts are not changed."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emrrg_cli.console import counted, printable
from emrrg_cli.datasets.report_text import unix_line_ends, whole_characters
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.score_inputs import check_ids
from emrrg_cli.files.atomic import atomic_write_text
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


@dataclass(frozen=True)
class Columns:
    """Names of the columns (or keys) of a file; None uses the first known name that the file contains."""

    study_id: str | None = None
    hypothesis: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Predictions:
    """Generated reports and their references, one entry per study; `origin` names the source, `remarks` describe it."""

    study_ids: Sequence[str]
    references: Sequence[str]
    hypotheses: Sequence[str]
    origin: str = ""
    remarks: Sequence[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.study_ids)


@dataclass(frozen=True)
class _Table:
    """Records of a file, the place of each record (such as "line 3"), and the layout of the file."""

    path: Path
    records: Sequence[Mapping[str, Any]]
    places: Sequence[str]
    layout: str


def read_predictions(path: Path, references: Path | None = None, columns: Columns | None = None) -> Predictions:
    """Reads generated reports and their references.

    Args:
        path: A `.jsonl`, `.csv`, `.tsv` or `.json` file. JSON files contain a list of records, R2Gen's
            `{id: ["text"]}`, or ReXrank's `{id: {"model_prediction": "text", ...}}`.
        references: File with the references, in any of these formats; None if `path` contains them.
        columns: Names of columns or keys that differ from the known names.

    Raises:
        UsageError: A file cannot be read, a column is missing, an id occurs twice, a cell is not a text, or the ids of
            the two files do not match.
    """
    columns = columns or Columns()
    table = _read(path, columns)
    hypotheses = _column(table, "hypothesis", columns.hypothesis, HYPOTHESIS_NAMES, columns.study_id)
    remarks = [f"{path.name}: {table.layout}"]
    if references is None:
        names = tuple(name for name in REFERENCE_NAMES if name != _chosen(table, columns.hypothesis))
        truth = _references(table, columns, names)
    else:
        other = _read(references, columns)
        remarks.append(f"{references.name}: {other.layout}")
        truth = _references(other, columns, (*REFERENCE_NAMES, *HYPOTHESIS_NAMES))
        check_ids(truth, hypotheses)
    for what, texts in (("hypothesis", hypotheses), ("reference", truth)):
        if empty := sum(not text.strip() for text in texts.values()):
            verb, they = ("is", "counts") if empty == 1 else ("are", "count")
            remarks.append(f"{counted(empty, what)} {verb} empty and {they} as wrong")
    ids = list(hypotheses)
    reports, generated = ([unix_line_ends(texts[i]) for i in ids] for texts in (truth, hypotheses))
    return Predictions(ids, reports, generated, path.name, remarks)


def write_rexrank(path: Path, predictions: Predictions) -> None:
    """Writes predictions in ReXrank's layout; the reference becomes the findings section.

    Raises:
        RunError: The file cannot be written.
    """
    rows = {
        study: {"model_prediction": text, "section_findings": truth, "section_impression": None, "reference": truth}
        for study, truth, text in zip(
            predictions.study_ids, predictions.references, predictions.hypotheses, strict=True
        )
    }
    atomic_write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


_REXRANK = "ReXrank's JSON"
_SECTIONS = ("section_findings", "section_impression", "findings", "impression")


def _read(path: Path, columns: Columns) -> _Table:
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".json") and not path.is_dir():
        raise UsageError(f"{path} has an unknown file type", hint="Use a .jsonl, .csv, .tsv or .json file.")
    text = _text(path)
    if kind == ".jsonl":
        return _read_lines(path, text)
    if kind == ".json":
        return _read_json(path, text)
    return _read_csv(path, text, [name for name in (columns.study_id, columns.hypothesis, columns.reference) if name])


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


def _read_csv(path: Path, text: str, names: Sequence[str]) -> _Table:
    csv.field_size_limit(_CELL)
    known = {*ID_NAMES, *HYPOTHESIS_NAMES, *REFERENCE_NAMES, *names}
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text, known)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise UsageError(f"{path} is not a CSV file: {error}") from error
    if not rows:
        raise UsageError(f"{path} is empty")
    head = [name.strip() for name in rows[0]]
    if len(head) == 1 and head[0].lower() not in known:
        # R2Gen's res.csv and gts.csv: one report per row, without header and ids.
        records = [{"text": row[0]} for row in rows]
        return _Table(path, records, [f"row {n}" for n in range(1, len(rows) + 1)], "CSV with one column and no header")
    if len(set(head)) != len(head):
        raise UsageError(f"{path}: two columns have the same name: {', '.join(map(printable, head))}")
    places = [f"row {number}" for number in range(2, len(rows) + 1)]
    for place, row in zip(places, rows[1:], strict=True):
        if len(row) != len(head):
            raise UsageError(
                f"{path}, {place}: {len(row)} cells, but the header has {len(head)}",
                hint="Put texts with commas or line breaks in double quotes.",
            )
    return _Table(path, [dict(zip(head, row, strict=True)) for row in rows[1:]], places, "CSV")


def _delimiter(text: str, known: set[str]) -> str:
    """Returns the first of comma, semicolon and tab that splits the first line into columns with a known name.

    If none does, returns a comma.
    """
    head = text.lstrip().partition("\n")[0]
    for delimiter in ",;\t":
        names = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
        if len(names) > 1 and any(name.lower() in known or name in known for name in names):
            return delimiter
    return ","


def _read_lines(path: Path, text: str) -> _Table:
    records, places = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        records.append(_object(_json(line, f"{path}:{number}"), f"{path}:{number}"))
        places.append(f"line {number}")
    return _Table(path, records, places, "JSON lines")


def _read_json(path: Path, text: str) -> _Table:
    content = _json(text, str(path), _unique_keys)
    if isinstance(content, list):
        places = [f"entry {number}" for number in range(1, len(content) + 1)]
        records = [_object(row, f"{path}, {place}") for place, row in zip(places, content, strict=True)]
        return _Table(path, records, places, "JSON list of records")
    _object(content, str(path))
    places = [f"id {name}" for name in content]
    if content and all(isinstance(row, Mapping) for row in content.values()):
        records = [{**row, _KEY: name} for name, row in content.items()]
        layout = _REXRANK if any("model_prediction" in row for row in content.values()) else "JSON by id"
        layout = _REXRANK if any("section_findings" in row for row in content.values()) else layout
        return _Table(path, records, places, layout)
    return _Table(path, [{_KEY: name, "text": _alone(row)} for name, row in content.items()], places, "R2Gen's JSON")


_KEY = "\0id"  # the id of a record that is the value of a JSON object


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
        raise UsageError(f"the key {twice!r} occurs twice", hint="List each study only once.")
    return made


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def _alone(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _named(table: _Table, names: Iterable[str]) -> str | None:
    """Returns the first of `names` that the records have, ignoring case."""
    there = {key.lower(): key for key in (table.records[0] if table.records else {})}
    return next((there[name] for name in names if name in there), None)


def _chosen(table: _Table, given: str | None) -> str | None:
    name = given or _named(table, HYPOTHESIS_NAMES)
    return name and name.lower()


def _ids(table: _Table, given: str | None) -> list[str]:
    if not table.records:
        raise UsageError(f"{table.path} contains no studies")
    first = table.records[0]
    name = _KEY if _KEY in first and given is None else given or _named(table, ID_NAMES)
    if name is None:
        return [f"row {number}" for number in range(1, len(table.records) + 1)]
    places: dict[str, str] = {}
    for place, row in zip(table.places, table.records, strict=True):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise UsageError(f"{table.path}, {place}: no id in {name!r}", hint=_heads(table))
        study = whole_characters(str(value).strip())
        if study in places:
            raise UsageError(
                f"{table.path}: the id {printable(study)} occurs twice ({places[study]} and {place})",
                hint="List each study only once, or name another column with --id-column.",
            )
        places[study] = place
    return list(places)


def _column(table: _Table, what: str, given: str | None, names: Sequence[str], id_column: str | None) -> dict[str, str]:
    ids = _ids(table, id_column)
    name = given if given is not None else _named(table, names)
    if name is None or (name not in table.records[0]):
        missing = f"there is no column {given!r}" if given is not None else f"no column with the {what} was found"
        raise UsageError(f"{table.path}: {missing}", hint=f"{_heads(table)} Name it with --{what}-column.")
    texts = {}
    for study, place, row in zip(ids, table.places, table.records, strict=True):
        value = _alone(row.get(name))
        if not isinstance(value, str) or value.strip().lower() == "nan":
            raise UsageError(
                f"{table.path}, {place}: the {what} is not a text but {_shown(value)}",
                hint='Write an empty report as an empty text ("").',
            )
        texts[study] = whole_characters(value)
    return texts


def _heads(table: _Table) -> str:
    return f"The columns are: {', '.join(printable(str(key)) for key in table.records[0] if key != _KEY)}."


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str) or (isinstance(value, float) and value != value):
        return "NaN (an empty cell)"
    return f"{type(value).__name__} ({printable(str(value))[:40]})"


def _references(table: _Table, columns: Columns, names: Sequence[str]) -> dict[str, str]:
    """Returns references by id: joined sections of a ReXrank file, or the given column, or the first of `names`."""
    sections = table.layout == _REXRANK and _named(table, _SECTIONS) and not _named(table, ("reference",))
    if columns.reference is not None or not sections:
        return _column(table, "reference", columns.reference, names, columns.study_id)
    ids = _ids(table, columns.study_id)
    return {name: whole_characters(_rexrank_reference(row)) for name, row in zip(ids, table.records, strict=True)}


def _rexrank_reference(row: Mapping[str, Any]) -> str:
    """Joins the sections as ReXrank's script does; a missing section becomes the word None."""

    def section(name: str) -> Any:
        value = row.get(f"section_{name}", row.get(name))
        return value if isinstance(value, str) else None

    return f"Findings: {section('findings')} Impression: {section('impression')}"
