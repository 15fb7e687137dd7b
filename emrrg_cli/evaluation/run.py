"""Evaluates a run on a split of a dataset directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from emrrg_cli.datasets.directory import find_split, open_dataset
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.assess import Options, assess
from emrrg_cli.evaluation.image_controls import FilmControls
from emrrg_cli.evaluation.language import require_java
from emrrg_cli.evaluation.outputs import DATA, OWN_FILES, write_assessment
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.evaluation.protocol import describe_protocol, reference_reports
from emrrg_cli.evaluation.split_reports import (
    MADE_WITH,
    begin_predictions,
    end_predictions,
    kept_predictions,
    made_with,
    was_stopped,
    write_predictions,
)
from emrrg_cli.files.locks import locked
from emrrg_cli.files.output_paths import check_writable, refuse_links
from emrrg_cli.files.records import read_record
from emrrg_cli.labeling import OBSERVATIONS
from emrrg_cli.models.build import load_model
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.reporting.tables import DISCLAIMER
from emrrg_cli.runtime import fit_threads, inference_precision, llm_dtype, make_accelerator
from emrrg_cli.silence_libraries import silence_libraries


@dataclass(frozen=True)
class RunOptions:
    """Options for the evaluation of a run.

    Attributes:
        overwrite: Replace an earlier evaluation.
        image_controls: Also write reports for blank films and for films of other studies, and find the nearest
            training studies.
        reference_labels: Take the labels of the references from the data set.
        train: Dataset directory with the training reports; None uses the directory of the evaluated split.
        assess: Options for scoring.
    """

    overwrite: bool = False
    image_controls: bool = False
    reference_labels: bool = False
    train: Path | None = None
    assess: Options = field(default_factory=Options)


def run_evaluation(
    recipe: FinetuneRecipe,
    run_dir: Path,
    split: str,
    output: Path | None,
    *,
    expected_processes: int = 0,
    options: RunOptions | None = None,
) -> dict[str, Any] | None:
    """Writes a report for each study of a split with merged adapters, and scores the reports.

    Reports are saved after every batch. All of them are in `predictions.jsonl` before scoring starts. Reports of an
    earlier evaluation with the same model, data and settings are reused, also if it was stopped.

    Args:
        recipe: The run's recipe, including changes made for the evaluation.
        run_dir: The run directory.
        split: Name of the split.
        output: Directory for `scores.json` and `predictions.jsonl`; None uses `run_dir/evaluation/<split>`, with a
            number appended if that directory holds another evaluation.
        expected_processes: Number of processes that the launcher should have started; 0 skips the check.
        options: Further options.

    Returns:
        The content of `scores.json` on the main process, None on the others.

    Raises:
        UsageError: The split does not exist, or `output` already holds an evaluation.
        RunError: The run or the data cannot be read, or the tokenizer needs Java and Java is not installed.
        Interrupted: After SIGINT or SIGTERM; the reports written so far are kept.
    """
    options = options or RunOptions()
    if recipe.data.root is None:
        raise UsageError("no data: give --data DIR", hint="DIR is a dataset directory written by `emrrg preprocess`.")
    if recipe.evaluation.samples and recipe.generation.consensus is None:
        hint = "Give generation.consensus=48 generation.num_beams=1 generation.do_sample=true."
        raise UsageError("evaluation.samples needs generation.consensus: without it no reports are sampled", hint=hint)
    require_java(recipe.evaluation.tokenizer)
    silence_libraries()
    splits = open_dataset(recipe.data.root)
    split = find_split(splits, split, recipe.data.root)
    if output is None:
        refuse_links(run_dir)
    else:
        refuse_links(output, OWN_FILES)
    check_writable(output or run_dir / "evaluation")
    precision = inference_precision(recipe.train.precision, "cuda" if torch.cuda.is_available() else "cpu")
    record = made_with(recipe, run_dir, split, precision)
    dataset = ReportDataset(splits[split], recipe.data, recipe.model.encoder.image_size)

    def usable(folder: Path) -> bool:
        return was_stopped(folder, record) or kept_predictions(folder, record, dataset.study_ids) is not None

    target = _target(run_dir, split, output, options.overwrite, usable)
    # With several processes, only the main one locks the output.
    with locked(target) if _is_main() else nullcontext():
        return _evaluate(recipe, run_dir, splits, dataset, record, target, expected_processes, options)


def _evaluate(
    recipe: FinetuneRecipe,
    run_dir: Path,
    splits: Any,
    dataset: ReportDataset,
    record: dict[str, Any],
    target: Path,
    expected_processes: int,
    options: RunOptions,
) -> dict[str, Any] | None:
    split, precision = record["split"], record["precision"]
    train = _train_dataset(splits, recipe, options)
    labels = reference_labels(dataset) if options.reference_labels else None  # fails before long work
    predictions = kept_predictions(target, record, dataset.study_ids)
    others: dict[str, list[str]] = {}
    reused = predictions is not None
    if predictions is None or options.image_controls:
        written = _write(recipe, run_dir, target, dataset, record, expected_processes, train, options.image_controls)
        if written is None:
            return None
        predictions, others = written
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        accelerator = make_accelerator(precision, expected_processes)
        accelerator.end_training()  # the launcher expects all processes to synchronize
        if not accelerator.is_main_process:
            return None
    how = replace(
        options.assess,
        train_reports=None if train is None else train.reports,
        others=others,
        reference_labels=labels,
        tokenizer=recipe.evaluation.tokenizer,
    )
    predictions = replace(predictions, patients=dataset.patient_ids)  # saved reports are read without them
    found = assess(predictions, how)
    kept = read_record(target / MADE_WITH, "the record of an evaluation", "Give --overwrite.") or {}
    seconds = float(kept.get("seconds", 0.0))
    result = {
        "note": DISCLAIMER,
        "model": str(run_dir),
        "data": recipe.data.root,
        "split": split,
        "studies": len(dataset),
        "studies_without_text": dataset.without_text,
        **found.record,
        "image": _image_sentence(found.record["image"], recipe),
        "protocol": recipe.protocol,
        "protocol_line": describe_protocol(recipe),
        "settings": recipe.model_dump(mode="json"),
        "seconds": round(seconds, 3),
        "reports_per_second": round(kept.get("written", len(dataset)) / seconds, 4) if seconds else None,
        "precision": precision,
        "predictions_reused": reused,
        "output": str(target),
    }
    return write_assessment(target, result, predictions, found, films=dataset)


def _write(
    recipe: FinetuneRecipe,
    run_dir: Path,
    target: Path,
    dataset: ReportDataset,
    record: dict[str, Any],
    expected_processes: int,
    train: ReportDataset | None,
    image_controls: bool,
) -> tuple[Predictions, dict[str, list[str]]] | None:
    """Writes the reports of the split and of the image controls; returns them on the main process, otherwise None."""
    accelerator = make_accelerator(record["precision"], expected_processes)
    model = load_model(run_dir, recipe.model, llm_dtype(recipe.model.llm.dtype, record["precision"]))
    model.to(accelerator.device)
    fit_threads(model, writing=True)
    references = reference_reports(model, dataset.reports, recipe)
    predictions = kept_predictions(target, record, dataset.study_ids)
    if predictions is None:
        if accelerator.is_main_process:
            begin_predictions(target, record)
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        predictions, written = write_predictions(model, dataset, references, recipe, accelerator, folder=target)
        if accelerator.is_main_process:
            end_predictions(target, record, time.perf_counter() - began, written)
    others = {}
    if image_controls:
        films = FilmControls(model, dataset, references, recipe, accelerator)
        others = films.reports(target, record, train)
    accelerator.end_training()  # only the main process continues
    return (predictions, others) if accelerator.is_main_process else None


def reference_labels(dataset: ReportDataset) -> list[dict[str, str | None]]:
    """Returns the labels of the references from the data set.

    Raises:
        UsageError: The data set has no labels, or its labels are not CheXpert's.
    """
    names = {"labels": "positive", "labels_uncertain": "uncertain", "labels_absent": "negative"}
    if missing := [name for name in names if name not in dataset.split.column_names]:
        raise UsageError(
            f"the data set has no column {missing[0]}: --reference-labels cannot be used",
            hint="`emrrg preprocess chexpert_plus` writes these columns.",
        )
    rows: list[dict[str, str | None]] = []
    table = dataset.split.select_columns(list(names)).select(dataset.rows)
    for record in table:
        row: dict[str, str | None] = dict.fromkeys(OBSERVATIONS)
        for column, value in names.items():
            row |= dict.fromkeys(record[column] or [], value)
        if unknown := sorted(set(row) - set(OBSERVATIONS)):
            raise UsageError(f"the data set's labels are not CheXpert's: {', '.join(unknown[:3])}")
        rows.append(row)
    return rows


def _train_dataset(splits: Any, recipe: FinetuneRecipe, options: RunOptions) -> ReportDataset | None:
    if options.train is not None:
        splits = open_dataset(options.train)
    if "train" not in splits:
        return None
    return ReportDataset(splits["train"], _without_limit(recipe), recipe.model.encoder.image_size)


def _without_limit(recipe: FinetuneRecipe) -> Any:
    return recipe.data.model_copy(update={"limit": None})


def _image_sentence(sentence: str, recipe: FinetuneRecipe) -> str:
    if not recipe.data.context:
        return sentence
    lost = f"Shuffled reports lose their context ({', '.join(recipe.data.context)}) as well as their films"
    return f"{sentence} {lost}; --image-controls changes only the films."


def _is_main() -> bool:
    """Whether this is the main process; works before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def _target(
    run_dir: Path,
    split: str,
    output: Path | None,
    overwrite: bool,
    usable: Callable[[Path], bool] = lambda folder: False,
) -> Path:
    """Returns the output directory: one that is free, or one whose reports can be used."""
    if output is not None:
        if not overwrite and ((output / DATA).exists() or (_taken(output) and not usable(output))):
            what = "an evaluation" if (output / DATA).exists() else "reports of another model, data or settings"
            raise UsageError(f"{output} already holds {what}", hint="Give --overwrite, or another --output.")
        return output
    base = run_dir / "evaluation" / split
    target, number = base, 2
    while _taken(target) and not usable(target):
        target, number = base.with_name(f"{split}-{number}"), number + 1
    return target


def _taken(target: Path) -> bool:
    # A complete evaluation, or files of an interrupted one.
    return (target / DATA).exists() or any(target.glob("predictions*.jsonl*"))
