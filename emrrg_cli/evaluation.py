"""Scoring a run on a split of a dataset directory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from emrrg_cli.console import progress_bar
from emrrg_cli.data.batches import ReportDataset
from emrrg_cli.data.dataset_dir import open_dataset
from emrrg_cli.errors import UsageError
from emrrg_cli.files import atomic_write_text
from emrrg_cli.generation import write_split
from emrrg_cli.metrics.nlg import score
from emrrg_cli.models.build import load_model
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.quiet import quiet_libraries
from emrrg_cli.recipe.schema import FinetuneRecipe
from emrrg_cli.training.environment import inference_precision, llm_dtype, make_accelerator
from emrrg_cli.training.run_dir import check_writable


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

    Args:
        recipe: the run's recipe with the changes of the evaluation made.
        output: receives `scores.json` and `predictions.jsonl`; None: `run_dir/evaluation/<split>`, or the first such
            name with a number that is free.

    Returns:
        What `scores.json` holds; None on all processes but the main one.

    Raises:
        UsageError: for a split that is not there, or an output that is taken.
        RunError: when the run or the data cannot be read.
    """
    if recipe.data.root is None:
        raise UsageError("no data: give --data DIR", hint="A dataset directory, as `emrrg preprocess` writes it.")
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

    began = time.perf_counter()
    with progress_bar("writing reports", len(dataset), enabled=accelerator.is_main_process) as advance:
        hypotheses = write_split(
            model, dataset, recipe.generation, accelerator, workers=recipe.data.workers, advance=advance
        )
    seconds = time.perf_counter() - began
    accelerator.end_training()  # what follows is the main process's alone
    if not accelerator.is_main_process:
        return None
    references = reference_reports(model, dataset.reports, recipe)
    result = {
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
    rows = zip(dataset.study_ids, references, hypotheses, strict=True)
    predictions = [{"study_id": i, "reference": r, "hypothesis": h} for i, r, h in rows]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
    atomic_write_text(target / "predictions.jsonl", "".join(lines))
    atomic_write_text(target / "scores.json", json.dumps(result, indent=2) + "\n")
    return result


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
        if (output / "scores.json").exists() and not overwrite:
            raise UsageError(f"{output} already holds an evaluation", hint="Give --overwrite, or another --output.")
        return output
    base = run_dir / "evaluation" / split
    target, number = base, 2
    while (target / "scores.json").exists():
        target, number = base.with_name(f"{split}-{number}"), number + 1
    return target
