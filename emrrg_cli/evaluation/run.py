"""Scoring a run on a split of a dataset directory."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emrrg_cli.console import progress_bar
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.decoding.reports import write_split
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.language import require_java, score
from emrrg_cli.files import append_jsonl, atomic_write_text, check_writable
from emrrg_cli.models.build import load_model
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.schema import FinetuneRecipe
from emrrg_cli.reporting.tables import DISCLAIMER
from emrrg_cli.runtime import inference_precision, llm_dtype, make_accelerator
from emrrg_cli.signals import interrupted_by
from emrrg_cli.silence_libraries import quiet_libraries


def run_evaluation(
    recipe: FinetuneRecipe,
    run_dir: Path,
    split: str,
    output: Path | None,
    *,
    overwrite: bool = False,
    expected_processes: int = 0,
) -> dict[str, Any] | None:
    """Writes a report for each study of a split and scores them; adapters are merged.

    Reports are put in safety batch by batch, in `predictions.jsonl.partial` (of each process `predictions-RANK...`),
    and are all in `predictions.jsonl` before they are scored.

    Args:
        recipe: the run's recipe with the changes of the evaluation made.
        output: receives `scores.json` and `predictions.jsonl`; None: `run_dir/evaluation/<split>`, or the first such
            name with a number that is free.

    Returns:
        What `scores.json` holds; None on all processes but the main one.

    Raises:
        UsageError: for a split that is not there, or an output that is taken.
        RunError: when the run or the data cannot be read, or the tokenizer needs a Java that is not there.
        Interrupted: after SIGINT or SIGTERM; what was written so far is kept.
    """
    if recipe.data.root is None:
        raise UsageError("no data: give --data DIR", hint="A dataset directory, as `emrrg preprocess` writes it.")
    require_java(recipe.evaluation.tokenizer)
    quiet_libraries()
    splits = open_dataset(recipe.data.root)
    if split not in splits:
        raise UsageError(f"{recipe.data.root}: no split {split!r}", hint=f"There are: {', '.join(splits)}.")
    target = _target(run_dir, split, output, overwrite)
    dataset = ReportDataset(splits[split], recipe.data, recipe.model.encoder.image_size)
    precision = inference_precision(recipe.train.precision, "cuda" if torch.cuda.is_available() else "cpu")
    accelerator = make_accelerator(precision, expected_processes)
    model = load_model(run_dir, recipe.model, llm_dtype(recipe.model.llm.dtype, precision))
    model.to(accelerator.device)

    references = reference_reports(model, dataset.reports, recipe)
    rank = f"-{accelerator.process_index}" if accelerator.num_processes > 1 else ""
    partial = target / f"predictions{rank}.jsonl.partial"
    partial.unlink(missing_ok=True)  # of an evaluation that is to be overwritten
    kept = 0

    def keep(indices: Sequence[int], reports: Sequence[str]) -> None:
        nonlocal kept
        for index, report in zip(indices, reports, strict=True):
            append_jsonl(partial, _prediction(dataset.study_ids[index], references[index], report))
        kept += len(reports)

    began = time.perf_counter()
    with (
        interrupted_by(signal.SIGINT, signal.SIGTERM, message=lambda: f"stopped; {kept} reports are in {partial}"),
        progress_bar("writing reports", len(dataset), enabled=accelerator.is_main_process) as advance,
    ):
        hypotheses = write_split(
            model, dataset, recipe.generation, accelerator, workers=recipe.data.workers, advance=advance, keep=keep
        )
    seconds = time.perf_counter() - began
    accelerator.end_training()  # what follows is the main process's alone
    if not accelerator.is_main_process:
        return None
    predictions = map(_prediction, dataset.study_ids, references, hypotheses)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
    (target / "scores.json").unlink(missing_ok=True)  # those of other predictions
    atomic_write_text(target / "predictions.jsonl", "".join(lines))
    for left in target.glob("predictions*.jsonl.partial"):
        left.unlink()
    result = {
        "note": DISCLAIMER,
        "model": str(run_dir),
        "data": recipe.data.root,
        "split": split,
        "studies": len(dataset),
        "studies_without_text": dataset.without_text,
        "scores": score(references, hypotheses, tokenizer=recipe.evaluation.tokenizer),
        "protocol": recipe.protocol,
        "settings": {
            "data": recipe.data.model_dump(include={"section", "cleaning", "max_report_tokens", "max_views", "limit"}),
            "generation": recipe.generation.model_dump(),
            "evaluation": recipe.evaluation.model_dump(),
        },
        "seconds": round(seconds, 3),
        "reports_per_second": round(len(dataset) / seconds, 4),
        "precision": precision,
        "output": str(target),
    }
    atomic_write_text(target / "scores.json", json.dumps(result, indent=2) + "\n")
    return result


def _prediction(study_id: str, reference: str, hypothesis: str) -> dict[str, str]:
    return {"study_id": study_id, "reference": reference, "hypothesis": hypothesis}


def reference_reports(model: ReportGenerator, reports: list[str], recipe: FinetuneRecipe) -> list[str]:
    """The reports to score against: whole, or cut to the training length as the released code does."""
    if recipe.evaluation.references == "whole":
        return reports
    limit = recipe.data.max_report_tokens
    return [model.decode(model.encode_report(report)[:limit]) for report in reports]


def describe_protocol(recipe: FinetuneRecipe) -> str:
    """One line that says what a score was made with; printed with every score."""
    generation = recipe.generation
    decoding = f"beams {generation.num_beams}, new tokens {generation.min_new_tokens}-{generation.max_new_tokens}"
    if generation.do_sample:
        decoding += f", sampled (temperature {generation.temperature}, top-p {generation.top_p})"
    targets = recipe.model.adapter.targets
    backbone = {"full": "trained whole", "none": "frozen"}.get(targets) if isinstance(targets, str) else None
    return (
        f"protocol {recipe.protocol}: section {recipe.data.section}, cleaning {recipe.data.cleaning}, "
        f"references {recipe.evaluation.references}, tokenizer {recipe.evaluation.tokenizer}, "
        f"backbone {backbone or 'frozen with LoRA on ' + ', '.join(targets)}; {decoding}, "
        f"repetition penalty {generation.repetition_penalty}, length penalty {generation.length_penalty}"
    )


def _target(run_dir: Path, split: str, output: Path | None, overwrite: bool) -> Path:
    check_writable(output or run_dir / "evaluation")
    if output is not None:
        if _taken(output) and not overwrite:
            raise UsageError(f"{output} already holds an evaluation", hint="Give --overwrite, or another --output.")
        return output
    base = run_dir / "evaluation" / split
    target, number = base, 2
    while _taken(target):
        target, number = base.with_name(f"{split}-{number}"), number + 1
    return target


def _taken(target: Path) -> bool:
    # By an evaluation, or by what one that was cut short has left.
    return (target / "scores.json").exists() or any(target.glob("predictions*.jsonl*"))
