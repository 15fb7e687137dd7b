"""Annotation files in R2Gen's form, read row by row: `{"train": [...], "val": [...], "test": [...]}`.

Those of MIMIC-CXR and of the combined sets hold hundreds of thousands of rows; one row and a block of text are in
memory at a time.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.vocabulary import SPLITS, Split

SPLIT_KEYS: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}

_BLOCK = 2**20  # bytes
_MAX_VALUE = 2**24  # characters of one row; a broken file is given up there, not read to its end
_SPACE = " \t\r\n"
_LAYOUT = 'An annotation file reads {"train": [...], "val": [...], "test": [...]}.'


@dataclass(frozen=True)
class AnnotationRow:
    """One row. `other` are the keys that only some data sets have, such as `study_id`, as text."""

    split: Split
    study_id: str
    patient_id: str | None
    report: str
    image_paths: tuple[str, ...]
    other: Mapping[str, str]


class Annotation:
    """An annotation file, checked from end to end; iterating it reads it again.

    A row has `id` (text or number), `report` (text or null), `image_path` (a path or a list of paths), and may have
    `subject_id`, the patient.

    Args:
        path: The JSON file.

    Attributes:
        counts: Rows of each split.

    Raises:
        UsageError: No such file.
        RunError: It is not what it should be; names the line or the row.

    Source: R2Gen (Chen et al., EMNLP 2020).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        keys = [key for key, _ in self._rows(count=True)]
        self._in_order = keys == sorted(keys, key=list(SPLIT_KEYS).index)
        if not any(self.counts.values()):
            raise RunError(f"{path}: no studies: train, val and test are empty")

    def __iter__(self) -> Iterator[AnnotationRow]:
        """Yields train, validation, test, each in the file's order."""
        for only in [None] if self._in_order else SPLIT_KEYS:
            for key, row in self._rows():
                if row is not None and only in (None, key):
                    yield row

    def first(self, limit: int | None) -> Iterator[AnnotationRow]:
        """As iteration, but only the first `limit` rows of each split; None: all."""
        read = dict.fromkeys(SPLITS, 0)
        for row in self:
            read[row.split] += 1
            if limit is None or read[row.split] <= limit:
                yield row

    def count(self, limit: int | None = None) -> int:
        """How many rows `first` yields."""
        return sum(rows if limit is None else min(rows, limit) for rows in self.counts.values())

    def _rows(self, *, count: bool = False) -> Iterator[tuple[str, AnnotationRow | None]]:
        """Yields the key of each split as it begins, without a row, then its rows; with `count`, the keys alone."""
        with _open(self.path) as file:
            text = _Text(self.path, file)
            if text.peek() != "{":
                kind = "a list" if text.peek() == "[" else _kind(text.value())
                raise RunError(f"{self.path}: the top level is {kind}, not an object", hint=_LAYOUT)
            keys: list[str] = []
            unknown: str | None = None
            for _ in text.members("}"):
                key = text.key()
                keys.append(key)
                if key in SPLIT_KEYS and keys.count(key) > 1:
                    raise RunError(f"{self.path}: {key} stands there twice", hint=_LAYOUT)
                if key not in SPLIT_KEYS:
                    if text.peek() == "[":
                        unknown = unknown or key
                    text.value()
                    continue
                if text.peek() != "[":
                    raise RunError(f"{self.path}: {key} is {_kind(text.value())}, not a list", hint=_LAYOUT)
                split = SPLIT_KEYS[key]
                yield key, None
                for index, _ in enumerate(text.members("]")):
                    row = _parse_row(text.value(), split, f"{self.path}: {key}[{index}]")
                    if count:
                        self.counts[split] += 1
                    else:
                        yield key, row
            text.end()
        if missing := [key for key in SPLIT_KEYS if key not in keys]:
            present = ", ".join(printable(key) for key in keys[:10]) or "none"
            raise RunError(
                f"{self.path}: no {' and no '.join(missing)}; keys found: {present}",
                hint=f"{_LAYOUT} A split that you do not have is an empty list.",
            )
        if unknown is not None:  # a list under another key would be studies lost without a word
            raise RunError(f"{self.path}: unknown split {printable(unknown)!r}", hint=_LAYOUT)


class _Text:
    """The text of a JSON file, a block at a time, with the place that has been reached."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at = "", 0
        self._bytes = 0
        self._line, self._column = 1, 1  # of the first character of `_text`
        self._ended = False
        while not self._text and self._more():
            pass
        self._at = int(self._text.startswith("\ufeff"))  # a byte order mark

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            text, at = self._text, self._at
            while at < len(text) and text[at] in _SPACE:
                at += 1
            self._at = at
            if at < len(text) or not self._more():
                return text[at : at + 1]

    def members(self, closing: str) -> Iterator[None]:
        """Steps through an object or a list, from its opening bracket: yields before each member, to be read then."""
        self._at += 1
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            yield
            char = self.peek()
            if char not in (",", closing):
                raise self.invalid("Expecting ',' delimiter")
            self._at += 1
            if char == closing:
                return

    def key(self) -> str:
        """A key and the colon after it."""
        if self.peek() != '"':
            raise self.invalid("Expecting property name enclosed in double quotes")
        key = self.value()
        if self.peek() != ":":
            raise self.invalid("Expecting ':' delimiter")
        self._at += 1
        return str(key)

    def value(self) -> Any:
        """The next value, of any kind."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                length, whole = end - self._at, end < len(self._text)
                # A number at the end of the block may go on in the next.
                if whole or not self._more(length):
                    self._at += length
                    return value
            except json.JSONDecodeError as error:
                into = error.pos - self._at
                if not self._more(len(self._text) - self._at):
                    raise self.invalid(error.msg, self._at + into) from None
            except RecursionError:
                raise RunError(f"{self._path}: not an annotation file: nested too deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise RunError(f"{self._path}: not valid JSON: {error}") from None

    def end(self) -> None:
        """Makes sure that nothing follows."""
        if self.peek():
            raise self.invalid("Extra data")

    def invalid(self, message: str, at: int | None = None) -> RunError:
        """The error for the current place, or for another in the block."""
        line, column = self._place(self._at if at is None else at)
        return RunError(f"{self._path}:{line}:{column}: not valid JSON: {message}")

    def _place(self, at: int) -> tuple[int, int]:
        before = self._text[:at]
        lines = before.count("\n")
        return self._line + lines, (at - before.rfind("\n") if lines else self._column + at)

    def _more(self, held: int = 0) -> bool:
        """Forgets what was read and reads on, at least as much as is `held` back; False at the end."""
        if self._ended or held > _MAX_VALUE:
            return False
        try:
            data = self._file.read(max(_BLOCK, held))
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(data)
            raise RunError(f"{self._path}: not UTF-8 text (byte {self._bytes - pending + error.start})") from None
        except OSError as error:
            raise RunError(f"{self._path}: cannot be read: {error.strerror or error}") from None
        self._bytes += len(data)
        self._ended = not data
        self._line, self._column = self._place(self._at)
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(data)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UsageError(f"no such annotation file: {path}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_row(row: Any, split: Split, where: str) -> AnnotationRow:
    """Checks one row; `where` names it in errors."""
    if not isinstance(row, Mapping):
        raise RunError(f"{where} is {_kind(row)}, not an object")
    if missing := [key for key in ("id", "report", "image_path") if key not in row]:
        raise RunError(f"{where} has no {missing[0]!r}", hint="A row has id, report and image_path.")
    study_id = _text_or_number(row["id"], f"{where}: id")
    if not study_id:
        raise RunError(f"{where}: id is empty")
    report = row["report"]
    if report is not None and not isinstance(report, str):
        raise RunError(f"{where}: report is {_kind(report)}, not text")
    paths = row["image_path"]
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list):
        raise RunError(f"{where}: image_path is {_kind(paths)}, not a path or a list of paths")
    for index, path in enumerate(paths):
        if not isinstance(path, str):
            raise RunError(f"{where}: image_path[{index}] is {_kind(path)}, not text")
    patient = row.get("subject_id")
    plain = {key: value for key, value in row.items() if isinstance(value, str | int) and not isinstance(value, bool)}
    known = ("id", "report", "image_path", "split", "subject_id")
    return AnnotationRow(
        split=split,
        study_id=study_id,
        patient_id=None if patient is None else _text_or_number(patient, f"{where}: subject_id"),
        report=_whole_characters(report or ""),
        image_paths=tuple(paths),
        other={key: _whole_characters(str(value)) for key, value in plain.items() if key not in known},
    )


def _text_or_number(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RunError(f"{where} is {_kind(value)}, not text or a whole number")
    return _whole_characters(str(value))


def _whole_characters(text: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no UTF-8 file holds; it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
