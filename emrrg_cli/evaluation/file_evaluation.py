"""Evaluates a prediction file. Does not import torch, so it starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_text import clean_report, cleaning_for, select_section
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.assess import Options, assess
from emrrg_cli.evaluation.language import require_java
from emrrg_cli.evaluation.outputs import DATA, OWN_FILES, write_assessment
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.files.locks import locked
from emrrg_cli.files.output_paths import check_writable, refuse_links
from emrrg_cli.reporting.tables import DISCLAIMER


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
    if output is not None:
        check_writable(output)
        refuse_links(output, OWN_FILES)
        if (output / DATA).exists() and not overwrite:
            raise UsageError(f"{output} already holds an evaluation", hint="Give --overwrite, or another --output.")
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
    if output is None:
        return result
    with locked(output):
        return write_assessment(output, result, predictions, found)


def training_reports(root: Path, predictions: Predictions) -> list[str]:
    """Returns the training reports of a dataset directory.

    They are cleaned if the references contain no capital letters, as in R2Gen's files.

    Raises:
        UsageError: The directory has no training split.
    """
    splits = open_dataset(root)
    if "train" not in splits:
        raise UsageError(f"{root} has no training split", hint=f"The splits are: {', '.join(splits)}.")
    cleaned = not any(any(letter.isupper() for letter in text) for text in predictions.references)
    reports = []
    for row in splits["train"].select_columns(["findings", "impression", "report", "source"]):
        if (text := select_section(row, "report")).strip():
            reports.append(clean_report(text, cleaning_for(row["source"] or "", "auto") if cleaned else "none"))
    return reports
