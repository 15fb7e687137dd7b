"""The fourteen CheXpert labels of a study: present, absent, uncertain, or not mentioned."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable

from emrrg_cli.console import printable
from emrrg_cli.datasets.directory import Column
from emrrg_cli.errors import RunError

# Irvin et al., CheXpert (AAAI 2019); in the order of MIMIC-CXR-JPG's tables.
LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip

COLUMNS = {
    "labels": Column("texts", "CheXpert labels that are present"),
    "labels_uncertain": Column("texts", "CheXpert labels that are uncertain"),
    "labels_absent": Column("texts", "CheXpert labels that are absent; the report does not mention the others"),
}

NOT_MENTIONED = "." * len(LABELS)


class LabelRows:
    """The labels of a file by study or image. Rows that cannot be read are counted; their studies have no labels."""

    def __init__(self) -> None:
        self._codes: dict[Hashable, str] = {}
        self._bad = 0
        self._first = ""

    def add(self, key: Hashable, values: Iterable[object], where: str) -> None:
        """Adds the labels of a row, unless the key has labels already."""
        try:
            code = encode_labels(values)
        except ValueError as error:
            self.skip(where, str(error))
        else:
            self._codes.setdefault(key, sys.intern(code))

    def skip(self, where: str, problem: str) -> None:
        """Counts a row that cannot be read."""
        self._bad += 1
        self._first = self._first or f"{where}: {printable(problem)}"

    def get(self, key: Hashable) -> str | None:
        """Returns the encoded labels of a study or image."""
        return self._codes.get(key)

    def remarks(self, name: str) -> list[str]:
        """Returns sentences about the file.

        Raises:
            RunError: No row of the file can be read.
        """
        if self._bad and not self._codes:
            raise RunError(f"no labels can be read; first: {self._first}")
        bad = f"Rows of {name} whose labels cannot be read: {self._bad:,}, first: {self._first}."
        return [f"Labels: {name}.", *([bad] if self._bad else [])]


def encode_labels(values: Iterable[object]) -> str:
    """Encodes labels as one letter each, in the order of `LABELS`: `p`resent, `a`bsent, `u`ncertain, `.` not mentioned.

    Args:
        values: 1, 0, -1 or nothing (None, NaN, "") for each label, as numbers or text.

    Raises:
        ValueError: A value is none of these.
    """
    return "".join(map(_letter, values))


def label_columns(code: str) -> dict[str, list[str]]:
    """Decodes the labels of a study to the values of `COLUMNS`."""
    letters = {"labels": "p", "labels_uncertain": "u", "labels_absent": "a"}
    return {
        column: [label for label, own in zip(LABELS, code, strict=True) if own == letter]
        for column, letter in letters.items()
    }


def _letter(value: object) -> str:
    if value is None or value == "" or value != value:
        return "."
    try:
        return {1.0: "p", 0.0: "a", -1.0: "u"}[float(value)]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, KeyError):
        raise ValueError(f"{value!r:.60} is not a label; labels are 1, 0, -1 or empty") from None
