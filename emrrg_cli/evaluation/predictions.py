"""Pairs the generated reports of a file with their references. Texts are not changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emrrg_cli.console import counted, printable
from emrrg_cli.datasets.report_text import unix_line_ends, whole_characters
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.prediction_layouts import (
    HYPOTHESIS_NAMES,
    ID_NAMES,
    KEY,
    REFERENCE_NAMES,
    REXRANK,
    Table,
    read_table,
)
from emrrg_cli.evaluation.score_inputs import check_ids
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.records import json_kind

PREDICTIONS = "predictions.jsonl"
PATIENT = "patient_id"
_SECTIONS = ("section_findings", "section_impression", "findings", "impression")


@dataclass(frozen=True)
class Columns:
    """Names of the columns (or keys) of a file; None uses the first known name that the file contains."""

    study_id: str | None = None
    hypothesis: str | None = None
    reference: str | None = None

    def given(self) -> list[str]:
        """Returns the names that are given."""
        return [name for name in (self.study_id, self.hypothesis, self.reference) if name is not None]


@dataclass(frozen=True)
class Predictions:
    """Generated reports and their references, one entry per study.

    Attributes:
        patients: Patient of each study, None if unknown; empty: none is known.
        origin: Name of the source.
        remarks: Sentences about it.
    """

    study_ids: Sequence[str]
    references: Sequence[str]
    hypotheses: Sequence[str]
    origin: str = ""
    remarks: Sequence[str] = field(default_factory=list)
    patients: Sequence[str | None] = ()

    def __len__(self) -> int:
        return len(self.study_ids)

    def at(self, places: Sequence[int]) -> Predictions:
        """Returns the studies at these places."""
        ids, references, hypotheses = (
            [side[i] for i in places] for side in (self.study_ids, self.references, self.hypotheses)
        )
        patients = [self.patients[i] for i in places] if self.patients else ()
        return Predictions(ids, references, hypotheses, self.origin, self.remarks, patients)


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
    table = read_table(path, columns.given())
    used = _name(table, "hypothesis", columns.hypothesis, HYPOTHESIS_NAMES)
    hypotheses = _texts(table, "hypothesis", used, columns.study_id)
    remarks = [f"{path.name}: {table.layout}, hypotheses from {_called(used)}"]
    if references is not None and not (references.exists() and path.samefile(references)):
        other = read_table(references, columns.given())
        layout, names = f"{references.name}: {other.layout}, ", [*REFERENCE_NAMES, *HYPOTHESIS_NAMES]
    else:
        other, layout, names = table, "", [name for name in REFERENCE_NAMES if name != used.lower()]
        if columns.reference is not None and columns.reference == used:
            raise UsageError(
                f"{path}: hypotheses and references are the same column, {used!r}",
                hint=f"{table.heads()} Name two of them, or give another file with --references.",
            )
    # With two files, the name of the id column may be that of only one.
    named = columns.study_id if other is table or not other.records or columns.study_id in other.records[0] else None
    truth, source = _references(other, columns, names, named)
    remarks.append(f"{layout}references from {source}")
    if other is not table:
        check_ids(truth, hypotheses)
    for what, texts in (("hypothesis", hypotheses), ("reference", truth)):
        if not any(text.strip() for text in texts.values()) and what == "reference":
            raise UsageError(f"{other.path}: every reference is empty, so there is nothing to compare with")
        if empty := sum(not text.strip() for text in texts.values()):
            verb, they = ("is", "counts") if empty == 1 else ("are", "count")
            remarks.append(f"{counted(empty, what)} {verb} empty and {they} as wrong")
    ids = list(hypotheses)
    reports, generated = ([unix_line_ends(texts[i]) for i in ids] for texts in (truth, hypotheses))
    if reports == generated:
        remarks.append("each hypothesis equals its reference")
    return Predictions(ids, reports, generated, path.name, remarks, _patients(table))


def save_predictions(file: Path, made: Predictions) -> None:
    """Writes JSON lines, one for each study.

    Raises:
        RunError: The file cannot be written.
    """
    patients = made.patients or [None] * len(made)
    rows = zip(made.study_ids, made.references, made.hypotheses, patients, strict=True)
    atomic_write_text(file, "".join(json.dumps(prediction_row(*row), ensure_ascii=False) + "\n" for row in rows))


def prediction_row(study_id: str, reference: str, hypothesis: str, patient: str | None = None) -> dict[str, str]:
    """Returns the record of a study in a file of predictions."""
    row = {"study_id": study_id, "reference": reference, "hypothesis": hypothesis}
    return row if patient is None else row | {PATIENT: patient}


def _patients(table: Table) -> list[str | None]:
    values = [row.get(PATIENT) for row in table.records]
    found = [str(value).strip() or None if isinstance(value, str | int) else None for value in values]
    return found if any(found) else []


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


def _alone(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _called(name: str) -> str:
    return "its texts" if name == "text" else repr(name)


def _ids(table: Table, given: str | None) -> list[str]:
    if not table.records:
        raise UsageError(f"{table.path} contains no studies")
    first = table.records[0]
    name = KEY if KEY in first and given is None else given or table.named(ID_NAMES)
    if name is None:
        return [f"row {number}" for number in range(1, len(table.records) + 1)]
    places: dict[str, str] = {}
    for place, row in zip(table.places, table.records, strict=True):
        value = row.get(name)
        whole = isinstance(value, str | int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not str(value).strip():
            missing = f"no id in {name!r}"
            other = f"the id in {name!r} must be a text or a whole number, not {_shown(value)}"
            empty = value is None or not str(value).strip()
            raise UsageError(f"{table.path}, {place}: {missing if empty else other}", hint=table.heads())
        study = whole_characters(str(value).strip())
        if study in places:
            raise UsageError(
                f"{table.path}: the id {printable(study)} occurs twice ({places[study]} and {place})",
                hint="List each study only once, or name another column with --id-column.",
            )
        places[study] = place
    # Data frames write whole numbers of a column with gaps as 1.0. If only some ids end in .0, it may belong to them.
    floats = all(re.fullmatch(r"[0-9]+\.0", study) for study in places)
    return [study.removesuffix(".0") if floats else study for study in places]


def _name(table: Table, what: str, given: str | None, names: Sequence[str]) -> str:
    """Returns the name of the column with the hypotheses or references."""
    if not table.records:
        raise UsageError(f"{table.path} contains no studies")
    name = given if given is not None else table.named(names)
    if name is None or name not in table.records[0]:
        missing = f"there is no column {given!r}" if given is not None else f"no column with the {what} was found"
        file = ", or give the file of the references with --references" if what == "reference" else ""
        raise UsageError(f"{table.path}: {missing}", hint=f"{table.heads()} Name it with --{what}-column{file}.")
    return name


def _texts(table: Table, what: str, name: str, id_column: str | None) -> dict[str, str]:
    texts = {}
    for study, place, row in zip(_ids(table, id_column), table.places, table.records, strict=True):
        value = _alone(row.get(name))
        if name not in row:
            raise UsageError(f"{table.path}, {place}: {name!r} is missing", hint='Write an empty report as "".')
        if not isinstance(value, str) or value.strip().lower() == "nan":
            hint = (
                "Join them into one text."
                if isinstance(value, list)
                else 'Write an empty report as an empty text ("").'
            )
            raise UsageError(f"{table.path}, {place}: the {what} is not a text but {_shown(value)}", hint=hint)
        texts[study] = whole_characters(value)
    return texts


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str) or (isinstance(value, float) and value != value):
        return "NaN (an empty cell)"
    return f"{json_kind(value)} ({printable(json.dumps(value))[:40]})"


def _references(
    table: Table, columns: Columns, names: Sequence[str], id_column: str | None
) -> tuple[dict[str, str], str]:
    """Returns references by id and where they are from.

    They are the given column, or the joined sections of a ReXrank file, or the first column of `names`.
    """
    sections = table.layout == REXRANK and table.named(_SECTIONS) and not table.named(("reference",))
    if columns.reference is not None or not sections:
        used = _name(table, "reference", columns.reference, names)
        return _texts(table, "reference", used, id_column), _called(used)
    joined = {
        name: whole_characters(_rexrank_reference(row))
        for name, row in zip(_ids(table, id_column), table.records, strict=True)
    }
    return joined, 'both sections, joined as ReXrank does ("Findings: ... Impression: ...")'


def _rexrank_reference(row: Mapping[str, Any]) -> str:
    """Joins the sections as ReXrank's script does, which writes None for a missing one; empty if both are missing."""

    def section(name: str) -> str | None:
        value = row.get(f"section_{name}", row.get(name))
        return value if isinstance(value, str) and value.strip().lower() not in ("", "nan") else None

    findings, impression = section("findings"), section("impression")
    return "" if findings is None and impression is None else f"Findings: {findings} Impression: {impression}"
