"""Writes a report for each study of a split. Reports are saved after every batch; later evaluations reuse them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from emrrg_cli.console import counted, progress_bar
from emrrg_cli.datasets.report_dataset import Example, ReportDataset
from emrrg_cli.datasets.shard_files import find_shards
from emrrg_cli.decoding.reports import write_split
from emrrg_cli.decoding.writer import WrittenReport
from emrrg_cli.errors import EmrrgError
from emrrg_cli.evaluation.predictions import PREDICTIONS, Predictions, prediction_row, save_predictions
from emrrg_cli.files.atomic import atomic_write_bytes, whole_directory
from emrrg_cli.files.output_paths import directory_guard
from emrrg_cli.files.records import append_jsonl, jsonl_line, read_jsonl, read_record
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.signals import interrupted_by
from emrrg_cli.versions import installed_versions

MADE_WITH = "made_with.json"
SAMPLES = "samples.jsonl"

_STOPPED = "stopped; {} saved in {}; a new evaluation starts at the first study"


def data_settings(recipe: FinetuneRecipe) -> dict[str, Any]:
    """Returns the data settings that affect the reports."""
    named = {"section", "cleaning", "max_report_tokens", "max_views", "limit"}
    if recipe.data.context:
        named |= {"context", "context_words"}
    return recipe.data.model_dump(mode="json", include=named)


def made_with(recipe: FinetuneRecipe, run_dir: Path, split: str, precision: str) -> dict[str, Any]:
    """Returns a record of everything that affects the reports of a split; equal records mean equal reports."""
    data = whole_directory(Path(recipe.data.root or ""))
    return {
        "emrrg": installed_versions(["emrrg"])["emrrg"],
        "model": {str(file.relative_to(run_dir)): _stamp(file) for file in sorted((run_dir / "model").rglob("*"))},
        "data": {str(file): _stamp(file) for file in find_shards(data).get(split, [])},
        "split": split,
        "settings": _report_settings(recipe),
        "precision": precision,
    }


def _report_settings(recipe: FinetuneRecipe) -> dict[str, Any]:
    return {
        "data": data_settings(recipe),
        "generation": recipe.generation.model_dump(mode="json", exclude={"batch_size"}),
        "references": recipe.evaluation.references,
        "samples": recipe.evaluation.samples,
        "findings_threshold": recipe.model.findings_threshold,
    }


def _with_defaults(record: Any) -> Any:
    # Reports of a version that did not have a setting are those of its default.
    default = _report_settings(FinetuneRecipe(stage="finetune"))
    try:
        generation = default["generation"] | record["settings"]["generation"]
        return record | {"settings": default | record["settings"] | {"generation": generation}}
    except (KeyError, TypeError):  # not a record of this program
        return None


def kept_predictions(
    folder: Path, record: dict[str, Any], study_ids: Sequence[str], name: str = PREDICTIONS
) -> Predictions | None:
    """Returns the reports that an earlier evaluation saved in `folder`.

    Returns None if its record is different, or the file has not one report for each of these studies, in their order.
    """
    try:
        kept = read_record(folder / MADE_WITH, "the record of an evaluation", "Give --overwrite.")
        if kept is None or _with_defaults(kept.get("made_with")) != record:
            return None
        rows = read_jsonl(folder / name)
    except EmrrgError:  # missing or damaged
        return None
    columns: list[list[Any]] = [[row.get(key) for row in rows] for key in prediction_row("", "", "")]
    ids, references, hypotheses = columns
    if ids != list(study_ids) or not all(isinstance(text, str) for text in [*references, *hypotheses]):
        return None  # changed or cut off after it was written
    return Predictions(ids, references, hypotheses)


def write_predictions(
    model: ReportGenerator,
    dataset: ReportDataset,
    references: Sequence[str],
    recipe: FinetuneRecipe,
    accelerator: Any,
    *,
    folder: Path,
    name: str = PREDICTIONS,
    films: Dataset[Example] | None = None,
) -> Predictions:
    """Generates reports and saves them in `name`; each process appends its own to a `.partial` file every batch.

    Args:
        films: For a control, the dataset with its films replaced by others; None uses the study's own films.

    Raises:
        RunError: The folder was deleted while reports were being written.
        Interrupted: After SIGINT or SIGTERM; the reports written so far are kept.
    """
    study_ids, stem = dataset.study_ids, name.removesuffix(".jsonl")
    rank = f"-{accelerator.process_index}" if accelerator.num_processes > 1 else ""
    partial = folder / f"{stem}{rank}.jsonl.partial"
    partial.unlink(missing_ok=True)  # left by an earlier evaluation
    folder.mkdir(parents=True, exist_ok=True)
    require_folder, kept = directory_guard(folder), 0
    sampled: dict[int, dict[str, Any]] | None = {} if recipe.evaluation.samples and name == PREDICTIONS else None

    def keep(reports: Sequence[WrittenReport]) -> None:
        nonlocal kept
        require_folder()
        for one in reports:
            row = prediction_row(study_ids[one.key], references[one.key], one.text)
            append_jsonl(partial, row)
            if sampled is not None:
                sampled[one.key] = row | {"samples": one.samples}
        kept += len(reports)

    with (
        interrupted_by(message=lambda: _STOPPED.format(counted(kept, "report"), partial)),
        progress_bar("writing reports", len(dataset), enabled=accelerator.is_main_process) as advance,
    ):
        hypotheses = write_split(
            model,
            dataset if films is None else films,  # type: ignore[arg-type]
            recipe.generation,
            accelerator,
            workers=recipe.data.workers,
            advance=advance,
            keep=keep,
        )
    require_folder()
    made = Predictions(study_ids, references, hypotheses, patients=dataset.patient_ids)
    if sampled is not None:
        _save_samples(folder / SAMPLES, sampled, accelerator)
    if accelerator.is_main_process:
        save_predictions(folder / name, made)
        for left in folder.glob(f"{stem}*.jsonl.partial"):
            left.unlink(missing_ok=True)
    return made


def _save_samples(file: Path, sampled: dict[int, dict[str, Any]], accelerator: Any) -> None:
    # One line for each study, with how often each text was sampled.
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        sampled = dict(gather_object(list(sampled.items())))
    if accelerator.is_main_process:
        atomic_write_bytes(file, b"".join(jsonl_line(sampled[index]) for index in sorted(sampled)))


class OtherFilms(Dataset[Example]):
    """A dataset whose films are replaced by those of other studies or by blank ones; reports and contexts stay.

    Args:
        dataset: The original dataset.
        order: For each study, the index of the study whose films it gets; None uses blank (black) films.
    """

    def __init__(self, dataset: ReportDataset, order: Sequence[int] | None) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        own = index if self.order is None else self.order[index]
        shown = self.dataset[own]
        pixels = torch.zeros_like(shown.pixels) if self.order is None else shown.pixels
        report, context = self.dataset.reports[index], self.dataset.contexts[index]
        return replace(shown, index=index, pixels=pixels, report=report, context=context)


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size if file.is_file() else 0, status.st_mtime_ns if file.is_file() else 0]
