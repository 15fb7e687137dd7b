"""The fourteen CheXpert labels of a study: present, absent, uncertain, or not mentioned."""

from __future__ import annotations

from collections.abc import Iterable

from emrrg_cli.datasets.directory import Column

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
    number = float(value) if isinstance(value, str | int | float) else 2.0
    if number not in (1.0, 0.0, -1.0):
        raise ValueError(f"{value!r} is not a label; labels are 1, 0, -1 or empty")
    return {1.0: "p", 0.0: "a", -1.0: "u"}[number]
