"""Predicts what a recipe needs, from meta tensors and a short trial.

Parameters are counted on meta tensors, which have no data. Time and activations are measured in real training steps of
a model with random weights, the recipe's widths and batch size, and a few encoder blocks and decoder layers. The cost
of one more block or layer is measured and multiplied by their number. If the recipe has a data set, the time to read
its images is measured with the training data loader.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from emrrg_cli.datasets.epochs import check_batch
from emrrg_cli.errors import RunError
from emrrg_cli.planning.advice import not_in_time, notes_on, proposals_for
from emrrg_cli.planning.llms import llm_config
from emrrg_cli.planning.loading import count_studies, seconds_per_study, writes_reports
from emrrg_cli.planning.result import Plan
from emrrg_cli.planning.sizes import (
    CUDA_CONTEXT,
    available_bytes,
    count_parameters,
    disk_bytes,
    disk_free,
    file_bytes,
    gradients,
    meta_model,
    report_bytes,
    reports_at_a_time,
    reports_per_study,
    weight_bytes,
)
from emrrg_cli.planning.trial import Step, measure
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.runtime import choose_precision, make_accelerator
from emrrg_cli.training.progress import resident_bytes
from emrrg_cli.training.schedule import schedule_length

# Ratio of a process's memory to the size of its tensors, because of heap fragmentation; measured in CPU training.
HOLES = 1.15


def plan(
    recipe: FinetuneRecipe,
    *,
    studies: int | None = None,
    views: int | None = None,
    processes: int = 1,
    report: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Predicts what training with a recipe needs; takes a few seconds to minutes.

    Args:
        recipe: The recipe.
        studies: Number of training studies, for the time of an epoch; None counts them in `data.root`, if it is set.
        views: Images per study; None uses the mean of `data.root`, or 1 if it is not set.
        processes: Number of processes that share `train.batch_size`.
        report: Called with a description of each measurement.

    Raises:
        UsageError: `data.root` is not a dataset directory, or the batch size is not valid for training.
        RunError: The LLM's configuration or the training split cannot be loaded, or even one block does not fit.
    """
    import emrrg_cli.training.finetune  # noqa: F401  (imported so that this process is as large as a training process)

    work = _work(recipe, studies, views, processes, report)
    loading = _loading(work, report)
    report("counting parameters")
    whole = meta_model(recipe.model, work.config)
    parameters, trainable = count_parameters(whole)
    step, program = _trial(work, parameters["LLM"], report)
    weights = weight_bytes(whole, recipe, work.precision)
    llm_weights = weights - 4 * (sum(parameters.values()) - parameters["LLM"])
    trained = sum(trainable.values())
    computing = step.seconds * work.share / work.micro + step.update
    steps, total = _steps(recipe, work.studies)
    memory = _memory(work, step, program=program, weights=weights, llm_weights=llm_weights, trained=trained)
    reports = reports_at_a_time(recipe.generation) if writes_reports(recipe) else 0
    reports_bytes = reports * report_bytes(whole, recipe, work.views, work.precision)
    cuda = work.device.type == "cuda"
    result = Plan(
        parameters=parameters,
        trainable=trainable,
        memory=memory | {"reports in validation": _beyond(memory, reports_bytes)},
        available=available_bytes(work.device),
        device=torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        precision=work.precision,
        micro_batch_size=work.micro,
        seconds_computing=computing,
        seconds_loading=loading,
        seconds_per_step=_together(computing, loading or 0.0, recipe.data.workers, work.device.type),
        steps_per_epoch=steps,
        epochs=recipe.train.epochs,
        total_steps=total,
        disk=disk_bytes(recipe, parameters, trained, llm_weights),
        disk_free=disk_free(recipe),
        reports_at_a_time=reports,
        reports_bytes=reports_bytes,
    )
    result.not_in_time, result.notes = not_in_time(result, recipe), notes_on(result, recipe)
    result.proposals = proposals_for(result, recipe, int(work.holes * step.checkpointed), work.share)
    return result


@dataclass(frozen=True)
class _Work:
    """The work of one device per optimizer step: `share` studies with `views` images, in micro-batches of `micro`."""

    recipe: FinetuneRecipe
    config: Any
    accelerator: Any
    precision: str
    studies: int | None
    views: int
    share: int
    micro: int

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def holes(self) -> float:
        return HOLES if self.device.type == "cpu" else 1.0


def _work(
    recipe: FinetuneRecipe, studies: int | None, views: int | None, processes: int, report: Callable[[str], None]
) -> _Work:
    precision = choose_precision(recipe.train.precision)
    accelerator = make_accelerator(precision, 0)
    config = llm_config(recipe.model)
    if recipe.data.root is not None and (studies is None or views is None):
        report("counting studies")
        counted, images = count_studies(recipe)
        studies, views = studies or counted, views or max(1, round(images))
    if studies is not None:
        studies = min(studies, recipe.data.limit or studies)
    check_batch(recipe.train.batch_size, processes, studies)
    views = views or 1
    share = recipe.train.batch_size // processes
    return _Work(
        recipe,
        config,
        accelerator,
        precision,
        studies,
        views=min(views, recipe.data.max_views or views),
        share=share,
        micro=min(recipe.train.micro_batch_size or share, share),
    )


def _loading(work: _Work, report: Callable[[str], None]) -> float | None:
    """Returns the seconds in which the studies of a step are read; None without a data set."""
    if work.recipe.data.root is None:
        return None
    report("measuring how fast images are read")
    return seconds_per_study(work.recipe, work.micro) * work.share


def _trial(work: _Work, llm_parameters: int, report: Callable[[str], None]) -> tuple[Step, int]:
    """Returns a measured step and the bytes of the program itself, which is fully loaded only after a step."""
    program, files = resident_bytes(), file_bytes()
    try:
        step = measure(
            work.recipe,
            work.config,
            work.accelerator,
            micro=work.micro,
            views=work.views,
            llm_parameters=llm_parameters,
            report=report,
        )
    except torch.cuda.OutOfMemoryError:
        raise RunError("even one encoder block and one decoder layer do not fit on this GPU") from None
    return step, program + file_bytes() - files if work.device.type == "cpu" else CUDA_CONTEXT


def _memory(work: _Work, step: Step, *, program: int, weights: int, llm_weights: int, trained: int) -> dict[str, int]:
    """Returns the bytes of each part on the device at the peak of a step."""
    train = work.recipe.train
    # fp32 logits and their gradient
    rows = work.micro * reports_per_study(work.recipe)
    logits = rows * (work.recipe.data.max_report_tokens + 2) * work.config.vocab_size * 4 * 2
    activations = int(work.holes * ((step.checkpointed if train.gradient_checkpointing else step.saved) + logits))
    accumulates = work.micro < work.share
    return {
        "program": program,
        "LLM weights": llm_weights,
        "other weights": weights - llm_weights,
        "optimizer": 8 * trained,
        "activations": activations,
        "gradients": gradients(4 * trained, activations, accumulates=accumulates, device_type=work.device.type),
    }


def _beyond(memory: dict[str, int], reports: int) -> int:
    """Returns what the keys and values of `reports` bytes add to the peak of a training step.

    Validation needs neither activations for a backward pass nor gradients.
    """
    return max(0, reports - memory["activations"] - memory["gradients"])


def _steps(recipe: FinetuneRecipe, studies: int | None) -> tuple[int | None, int | None]:
    """Returns the optimizer steps per epoch and of the whole schedule; None if the number of studies is not known."""
    if studies is None:
        return None, None
    steps = studies // recipe.train.batch_size
    return steps, schedule_length(steps, recipe.train)


def _together(computing: float, loading: float, workers: int, device_type: str) -> float:
    """Returns the seconds of a step, given its computing and loading time; 0 `workers` load in the same process."""
    if not workers:
        return computing + loading
    if device_type == "cuda":
        return max(computing, loading)
    # Arithmetic uses every core of a CPU, so loading data at the same time slows it down.
    cores = os.cpu_count() or 1
    return max(loading, computing + loading * min(workers, cores) / cores)
