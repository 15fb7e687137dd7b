"""Writes a report for each study of a split. Reports are saved after every batch.

Later evaluations reuse the reports of a whole split, and continue after those of a stopped evaluation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from emrrg_cli.console import counted, err, progress_bar
from emrrg_cli.datasets.report_dataset import Example, ReportDataset
from emrrg_cli.datasets.shard_files import find_shards
from emrrg_cli.decoding.reports import write_split
from emrrg_cli.decoding.writer import WrittenReport
from emrrg_cli.errors import EmrrgError, RunError, UsageError
from emrrg_cli.evaluation.outputs import DATA
from emrrg_cli.evaluation.predictions import PREDICTIONS, Predictions, prediction_row, save_predictions
from emrrg_cli.files.atomic import atomic_write_bytes, atomic_write_text, whole_directory
from emrrg_cli.files.output_paths import directory_guard
from emrrg_cli.files.records import append_jsonl, jsonl_line, read_jsonl, read_record
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.signals import interrupted_by
from emrrg_cli.versions import installed_versions

MADE_WITH = "made_with.json"
WRITING_WITH = "writing_with.json"  # until all reports are written
SAMPLES = "samples.jsonl"

_STOPPED = "stopped; {} saved in {}/; run the same command again to continue"


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
    # A version without a setting wrote reports as with its default.
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
    if not _is_made_with(record, folder / MADE_WITH):
        return None
    try:
        rows = read_jsonl(folder / name)
    except EmrrgError:  # missing or damaged
        return None
    columns: list[list[Any]] = [[row.get(key) for row in rows] for key in prediction_row("", "", "")]
    ids, references, hypotheses = columns
    if ids != list(study_ids) or not all(isinstance(text, str) for text in [*references, *hypotheses]):
        return None  # changed or cut off after it was written
    return Predictions(ids, references, hypotheses)


def was_stopped(folder: Path, record: dict[str, Any]) -> bool:
    """Whether an evaluation with this record was stopped in `folder`, so that it can be continued."""
    return _is_made_with(record, folder / WRITING_WITH)


def begin_predictions(folder: Path, record: dict[str, Any]) -> None:
    """Removes what other evaluations left in `folder`, unless this one was stopped there, and saves its record."""
    for stale in (folder / name for name in (DATA, MADE_WITH, SAMPLES)):
        stale.unlink(missing_ok=True)  # these files belong to earlier predictions
    if not was_stopped(folder, record):
        for stale in (*folder.glob("predictions_*.jsonl"), *folder.glob("predictions*.jsonl.partial")):
            stale.unlink(missing_ok=True)
        atomic_write_text(folder / WRITING_WITH, json.dumps({"made_with": record}, indent=2) + "\n")


def end_predictions(folder: Path, record: dict[str, Any], seconds: float, written: int) -> None:
    """Saves the record of finished predictions, and in how many seconds how many of them were written."""
    kept = {"made_with": record, "seconds": seconds, "written": written}
    atomic_write_text(folder / MADE_WITH, json.dumps(kept, indent=2) + "\n")
    (folder / WRITING_WITH).unlink(missing_ok=True)


def _is_made_with(record: dict[str, Any], file: Path) -> bool:
    try:
        kept = read_record(file, "the record of an evaluation", "Give --overwrite.")
    except EmrrgError:  # damaged
        return False
    return kept is not None and _with_defaults(kept.get("made_with")) == record


def _written_before(folder: Path, name: str, study_ids: Sequence[str], references: Sequence[str]) -> dict[int, Any]:
    """Returns the rows that a stopped evaluation saved, by index; it may have had another number of processes."""
    places = {study: index for index, study in enumerate(study_ids)}
    rows: dict[int, Any] = {}
    for file in _partial_files(folder, name):
        try:
            saved = read_jsonl(file)
        except UsageError as error:
            raise RunError(str(error), hint="Remove this file: its reports will be written again.") from error
        for row in saved:
            index = places.get(str(row.get("study_id")), -1)
            if index >= 0 and (row.get("reference"), type(row.get("hypothesis"))) == (references[index], str):
                rows[index] = row
    return rows


def _rows_kept(
    folder: Path, name: str, study_ids: Sequence[str], references: Sequence[str], accelerator: Any
) -> dict[int, Any]:
    """Returns `_written_before` of the main process, on every process: the others may use another disk."""
    rows = _written_before(folder, name, study_ids, references) if accelerator.is_main_process else {}
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        [rows] = broadcast_object_list([rows])
    if rows and accelerator.is_main_process:
        left = len(study_ids) - len(rows)
        err.print(f"{counted(len(rows), 'report')} of the stopped evaluation are kept; {left} are left")
    return rows


def _partial_file(folder: Path, name: str, accelerator: Any) -> Path:
    rank = f"-{accelerator.process_index}" if accelerator.num_processes > 1 else ""
    return folder / f"{name.removesuffix('.jsonl')}{rank}.jsonl.partial"


def _partial_files(folder: Path, name: str) -> list[Path]:
    stem = re.escape(name.removesuffix(".jsonl"))
    files = sorted(folder.glob("*.jsonl.partial"))
    return [file for file in files if re.fullmatch(rf"{stem}(-\d+)?\.jsonl\.partial", file.name)]


def _saved_row(one: WrittenReport, study_id: str, reference: str, with_samples: bool) -> dict[str, Any]:
    row: dict[str, Any] = {**prediction_row(study_id, reference, one.text)}
    return row | {"samples": one.samples} if with_samples else row


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
) -> tuple[Predictions, int]:
    """Generates reports and saves them in `name`; returns all of them, and how many were written now.

    Each process appends its own to a `.partial` file every batch. Studies whose reports are in such files of a stopped
    evaluation keep them.

    Args:
        films: For a control, the dataset with its films replaced by others; None uses the study's own films.

    Raises:
        RunError: The folder was deleted while reports were being written, or those of a stopped evaluation are damaged.
        Interrupted: After SIGINT or SIGTERM; the reports written so far are kept.
    """
    study_ids, partial = dataset.study_ids, _partial_file(folder, name, accelerator)
    rows = _rows_kept(folder, name, study_ids, references, accelerator)
    rest = [index for index in range(len(dataset)) if index not in rows]
    folder.mkdir(parents=True, exist_ok=True)
    require_folder, with_samples = directory_guard(folder), recipe.evaluation.samples and name == PREDICTIONS

    def keep(reports: Sequence[WrittenReport]) -> None:
        require_folder()
        for one in reports:
            row = _saved_row(one, study_ids[one.key], references[one.key], with_samples)
            append_jsonl(partial, row)
            rows[one.key] = row

    with (
        interrupted_by(message=lambda: _STOPPED.format(counted(len(rows), "report"), folder)),
        progress_bar("writing reports", len(rest), enabled=accelerator.is_main_process) as advance,
    ):
        written = write_split(
            model,
            dataset if films is None else films,  # type: ignore[arg-type]
            recipe.generation,
            accelerator,
            indices=rest,
            workers=recipe.data.workers,
            advance=advance,
            keep=keep,
        )
    require_folder()
    if with_samples:
        _save_samples(folder / SAMPLES, rows, accelerator)
    texts = {index: row["hypothesis"] for index, row in rows.items()} | dict(zip(rest, written, strict=True))
    made = Predictions(study_ids, references, [texts[index] for index in sorted(texts)], patients=dataset.patient_ids)
    if accelerator.is_main_process:
        save_predictions(folder / name, made)
        for left in _partial_files(folder, name):
            left.unlink(missing_ok=True)
    return made, len(rest)


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
