"""Evaluates a prediction file. Does not import torch, so it starts fast."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.directory import find_split, open_dataset
from emrrg_cli.datasets.report_text import clean_report, cleaning_for, select_section
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.assess import Assessment, Options, assess
from emrrg_cli.evaluation.language import require_java
from emrrg_cli.evaluation.outputs import DATA, OWN_FILES, write_assessment
from emrrg_cli.evaluation.predictions import PREDICTIONS, Predictions, save_predictions
from emrrg_cli.files.locks import locked
from emrrg_cli.files.output_paths import check_writable, refuse_links
from emrrg_cli.reporting.tables import DISCLAIMER
from emrrg_cli.vocabulary import SECTIONS

_TEXTS = ("findings", "impression", "report")


def evaluate_file(
    predictions: Predictions, output: Path | None, options: Options, *, overwrite: bool = False
) -> dict[str, Any]:
    """Scores predictions of any origin without changing their texts.

    Args:
        predictions: Generated reports and references.
        output: Directory for `scores.json` and the page; None writes nothing.
        options: Options of the assessment.
        overwrite: Replace an earlier evaluation in `output`.

    Raises:
        UsageError: There is nothing to score, or `output` already holds an evaluation.
    """
    require_java(options.tokenizer)
    if output is None:
        return _file_result(predictions, None, options)[0]
    check_writable(output)
    refuse_links(output, OWN_FILES)
    with locked(output):
        if (output / DATA).exists() and not overwrite:
            raise UsageError(f"{output} already holds an evaluation", hint="Give --overwrite, or another --output.")
        result, found = _file_result(predictions, output, options)
        save_predictions(output / PREDICTIONS, predictions)  # `emrrg compare` reads them
        return write_assessment(output, result, predictions, found)


def _file_result(predictions: Predictions, output: Path | None, options: Options) -> tuple[dict[str, Any], Assessment]:
    """Returns the content of `scores.json`, and the assessment that it is from."""
    found = assess(predictions, options)
    line = f"protocol file: texts unchanged, tokenizer {options.tokenizer}"
    result = {
        "note": DISCLAIMER,
        "predictions": predictions.origin,
        "studies": len(predictions),
        **found.record,
        "protocol": "file",
        "protocol_line": "; ".join([line, *predictions.remarks]),
        "output": None if output is None else str(output),
    }
    return result, found


def training_reports(root: Path, predictions: Predictions) -> tuple[list[str], str]:
    """Returns the training reports of a dataset directory in the form of the references, and a sentence on that form.

    If studies of the directory are among the predictions, the section and cleaning that give their references are used.
    Otherwise the reports are whole, and cleaned if the references contain no capital letters, as in R2Gen's files.

    Raises:
        UsageError: The directory has no training split, or none of its reports has text.
    """
    splits = open_dataset(root)
    find_split(splits, "train", root)
    truth = dict(zip(predictions.study_ids, predictions.references, strict=True))
    known = [row for split in splits.values() for row in _rows(split, truth)]
    cleaned = not any(any(letter.isupper() for letter in text) for text in predictions.references)
    section, cleaning = "report", "auto" if cleaned else "none"
    forms = [(one, rule) for one in SECTIONS for rule in ("auto", "none")]
    equal = {
        form: sum(_report(row, *form).split() == truth[row["study_id"]].split() for row in known) for form in forms
    }
    best = max(forms, key=lambda form: equal[form])
    if equal[best]:
        section, cleaning = best
    reports = [text for row in _rows(splits["train"]) if (text := _report(row, section, cleaning)).strip()]
    if not reports:
        raise UsageError(f"{root}: no study of the training split has a {section}")
    found = f"that of {equal[best]:,} of {len(known):,} references" if equal[best] else "not known from the references"
    return reports, f"training reports: section {section}, cleaning {cleaning} ({found})"


def _rows(split: Any, among: Container[str] | None = None) -> Iterator[dict[str, Any]]:
    ids = split["study_id"]
    places = [place for place, study in enumerate(ids) if among is None or study in among]
    yield from split.select(places).select_columns(["study_id", "source", *_TEXTS])


def _report(row: Mapping[str, Any], section: str, cleaning: str) -> str:
    return clean_report(select_section(row, section), cleaning_for(row["source"] or "", cleaning))
