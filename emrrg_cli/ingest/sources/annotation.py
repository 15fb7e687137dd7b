"""Reads annotation files in R2Gen's format row by row: `{"train": [...], "val": [...], "test": [...]}`.

The files of MIMIC-CXR and of the combined sets have hundreds of thousands of rows. Only one row and one block of text
are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError
from emrrg_cli.ingest.sources.json_stream import JsonDocument, open_json, start_value
from emrrg_cli.ingest.study import ImportLog
from emrrg_cli.vocabulary import SPLIT_NAMES, SPLITS, Split

SPLIT_KEYS: dict[str, Split] = {key: SPLIT_NAMES[key] for key in ("train", "val", "test")}

UNREADABLE = "row cannot be read"

_LAYOUT = 'An annotation file has the form {"train": [...], "val": [...], "test": [...]}.'


@dataclass(frozen=True)
class AnnotationRow:
    """One row. `other` holds the keys that only some data sets have, such as `study_id`, with values as text."""

    split: Split
    study_id: str
    patient_id: str | None
    report: str
    image_paths: tuple[str, ...]
    other: Mapping[str, str]


class Annotation:
    """An annotation file. The constructor checks the whole file; each iteration reads it again.

    A row has `id` (text or number), `report` (text), `image_path` (a path or a list of paths), and may have
    `subject_id`, the patient. A missing text or path is null, or NaN as data frames write it. Rows of another form are
    left out, unless no row of a split has this one.

    Args:
        path: The JSON file.

    Attributes:
        counts: Number of rows in each split.
        skipped: Place, such as `train[5]`, and problem of each row that is left out.

    Raises:
        UsageError: The file does not exist.
        RunError: The file, or no row of a split, has this format; the message names the line or the row.

    Source: R2Gen (Chen et al., EMNLP 2020).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.skipped: list[tuple[str, str]] = []
        keys = [key for key, _ in self._rows(count=True)]
        self._in_order = keys == sorted(keys, key=list(SPLIT_KEYS).index)
        if not any(self.counts.values()):
            raise RunError(f"{path}: no studies: train, val and test are empty")

    def __iter__(self) -> Iterator[AnnotationRow]:
        """Yields the rows of train, validation and test, each in the file's order."""
        for only in [None] if self._in_order else SPLIT_KEYS:
            for key, row in self._rows():
                if row is not None and only in (None, key):
                    yield row

    def first(self, limit: int | None, log: ImportLog) -> Iterator[AnnotationRow]:
        """Counts the rows that are left out in `log`, and yields the first `limit` rows of each split; None: all."""
        for place, problem in self.skipped:
            log.read += 1
            log.skip_study(UNREADABLE, place, detail=problem)
        read = dict.fromkeys(SPLITS, 0)
        for row in self:
            read[row.split] += 1
            if limit is None or read[row.split] <= limit:
                yield row

    def unique(self, limit: int | None, log: ImportLog) -> Iterator[AnnotationRow]:
        """Counts the rows of `first` as read, and yields them without those whose id was seen before.

        A repeated study would be trained on twice, or be in both train and test. It is counted in `log`.
        """
        splits: dict[str, Split] = {}
        for row in self.first(limit, log):
            log.read += 1
            if before := splits.get(row.study_id):
                log.skip_study("id seen before", row.study_id, detail=f"in {row.split}, kept from {before}")
            else:
                splits[row.study_id] = row.split
                yield row

    def count(self, limit: int | None = None) -> int:
        """Returns the number of rows that `first` counts or yields."""
        return len(self.skipped) + sum(rows if limit is None else min(rows, limit) for rows in self.counts.values())

    def _rows(self, *, count: bool = False) -> Iterator[tuple[str, AnnotationRow | None]]:
        """Yields each split's key without a row, then the key with each row; with `count`, only counts the rows."""
        keys: list[str] = []
        unknown: str | None = None
        with open_json(self.path) as document:
            if (start := document.next()) != ("start_map", None):
                raise RunError(
                    f"{self.path}: the top level is {_kind(start_value(start))}, not an object", hint=_LAYOUT
                )
            while (event := document.next())[0] == "map_key":
                key = event[1]
                keys.append(key)
                if key in SPLIT_KEYS and keys.count(key) > 1:
                    raise RunError(f"{self.path}: {key} occurs twice", hint=_LAYOUT)
                start = document.next()
                if key not in SPLIT_KEYS:
                    if start[0] == "start_array":
                        unknown = unknown or key
                    document.skip(start)
                    continue
                if start[0] != "start_array":
                    raise RunError(f"{self.path}: {key} is {_kind(start_value(start))}, not a list", hint=_LAYOUT)
                yield key, None
                for row in self._rows_of(key, document, count=count):
                    yield key, row
            document.end()
        if missing := [key for key in SPLIT_KEYS if key not in keys]:
            present = ", ".join(printable(key) for key in keys[:10]) or "none"
            raise RunError(
                f"{self.path}: no {' and no '.join(missing)}; keys found: {present}",
                hint=f"{_LAYOUT} A split that you do not have is an empty list.",
            )
        if unknown is not None:  # its studies would be lost silently
            raise RunError(f"{self.path}: unknown split {printable(unknown)!r}", hint=_LAYOUT)

    def _rows_of(self, key: str, document: JsonDocument, *, count: bool) -> Iterator[AnnotationRow]:
        """Yields the rows of a split; with `count`, only counts them and those that are left out."""
        split = SPLIT_KEYS[key]
        bad: list[tuple[str, RunError]] = []
        for index, row in enumerate(document.items()):
            place = f"{key}[{index}]"
            try:
                parsed = _parse_row(row, split, place)
            except RunError as error:
                bad.append((place, error))
                continue
            if count:
                self.counts[split] += 1
            else:
                yield parsed
        if count:
            if bad and not self.counts[split]:
                raise RunError(f"{self.path}: {bad[0][1].message}", hint=bad[0][1].hint)
            self.skipped += [(place, error.message.removeprefix(place).lstrip(": ")) for place, error in bad]


def _parse_row(row: Any, split: Split, where: str) -> AnnotationRow:
    """Checks one row; `where` names it in errors."""
    if not isinstance(row, Mapping):
        raise RunError(f"{where} is {_kind(row)}, not an object")
    row = {key: _whole(value) for key, value in row.items()}
    if missing := [key for key in ("id", "report", "image_path") if key not in row]:
        raise RunError(f"{where} has no {missing[0]!r}", hint="A row has id, report and image_path.")
    study_id = _text_or_number(row["id"], f"{where}: id")
    if not study_id:
        raise RunError(f"{where}: id is empty")
    report = row["report"]
    if report is not None and not isinstance(report, str):
        raise RunError(f"{where}: report is {_kind(report)}, not text")
    paths = [] if row["image_path"] is None else row["image_path"]
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list):
        raise RunError(f"{where}: image_path is {_kind(paths)}, not a path or a list of paths")
    for index, path in enumerate(paths):
        if path is not None and not isinstance(path, str):
            raise RunError(f"{where}: image_path[{index}] is {_kind(path)}, not text")
    patient = row.get("subject_id")
    plain = {key: value for key, value in row.items() if isinstance(value, str | int) and not isinstance(value, bool)}
    known = ("id", "report", "image_path", "split", "subject_id")
    return AnnotationRow(
        split=split,
        study_id=study_id,
        patient_id=None if patient is None else _text_or_number(patient, f"{where}: subject_id"),
        report=report or "",
        image_paths=tuple(path for path in paths if path is not None),
        other={key: str(value) for key, value in plain.items() if key not in known},
    )


def _whole(value: Any) -> Any:
    """Returns a number such as 10000032.0, as data frames write the numbers of a column with gaps, as an `int`."""
    # The limit keeps 1E999999 from becoming a number of a million digits.
    return int(value) if isinstance(value, Decimal) and abs(value) < 10**16 and value % 1 == 0 else value


def _text_or_number(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RunError(f"{where} is {_kind(value)}, not text or a whole number")
    return str(value)


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    types = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return types.get(type(value), "a number")
