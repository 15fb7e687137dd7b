"""Notes on a plan, and changes to the recipe that make it fit."""

from __future__ import annotations

import math
import os

from emrrg_cli.models.llm import can_quantize
from emrrg_cli.planning.loading import validates
from emrrg_cli.planning.result import Plan
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.training.schedule import warmup_note


def notes_on(result: Plan, recipe: FinetuneRecipe) -> list[str]:
    """Returns notes that explain the figures of a plan."""
    notes = []
    loading = result.seconds_loading
    if loading is None:
        notes.append("the time does not include reading images; set data.root=DIR to measure it")
    elif loading > result.seconds_computing and (
        more := math.ceil(recipe.data.workers * loading / result.seconds_computing)
    ) <= (os.cpu_count() or 1):
        notes.append(f"reading images is the bottleneck; data.workers={more} would be fast enough")
    elif loading > result.seconds_computing:
        notes.append("reading images is the bottleneck; preprocess them to a smaller size")
    if (settings := recipe.train.self_critical) is not None:
        notes.append(
            f"the memory includes self-critical training, the time does not: after {settings.after_epochs} epochs, "
            f"each step samples {settings.samples} reports of each study and trains on them, which takes longer"
        )
    if result.reports_at_a_time:
        samples = recipe.generation.consensus
        each = "a report" if samples is None else f"{samples} reports (generation.consensus)"
        notes.append(
            f"the time does not include validation, which writes {each} for each study: {result.reports_at_a_time:,} "
            f"reports at a time, {result.reports_bytes / 2**30:.2f} GiB for their keys and values"
        )
    if result.steps_per_epoch is not None and (warmup := warmup_note(result.steps_per_epoch, recipe.train)):
        notes.append(warmup)
    if recipe.model.llm.quantization != "none" and not can_quantize():
        notes.append(
            f"bitsandbytes is not installed, so the time was measured without {recipe.model.llm.quantization} weights"
        )
    return notes


def not_in_time(result: Plan, recipe: FinetuneRecipe) -> list[str]:
    """Returns what a run of the recipe does in addition to the steps whose time is predicted."""
    scores = recipe.train.self_critical
    further = {
        "reading images": result.seconds_loading is None,
        "validation": validates(recipe),
        "self-critical training": scores is not None and scores.after_epochs < recipe.train.epochs,
    }
    return [name for name, missing in further.items() if missing]


def proposals_for(result: Plan, recipe: FinetuneRecipe, checkpointed: int, share: int) -> list[str]:
    """Returns changes to the recipe that make the plan fit, as `key=value`; those with the least effect come first.

    Args:
        result: The plan.
        recipe: Its recipe.
        checkpointed: Bytes of activations with gradient checkpointing.
        share: Studies per optimizer step on one device.
    """
    if result.fits:
        return []
    proposals: list[str] = []
    budget = 0.95 * result.available
    if sum(result.disk.values()) > result.disk_free:
        proposals.append("output=DIR on a disk with more free space")
    fixed = result.peak - result.memory["activations"] - result.memory["reports in validation"]
    activations, micro = result.memory["activations"], result.micro_batch_size
    whole_llm = result.precision == "fp32" and recipe.model.llm.is_frozen and recipe.model.llm.dtype == "auto"
    if fixed + activations > budget and whole_llm:
        proposals.append("model.llm.dtype=bf16")
        fixed -= result.memory["LLM weights"] // 2
    while fixed + activations > budget and micro > 1:
        activations, micro = activations * (micro // 2) // micro, micro // 2
    if micro != result.micro_batch_size:
        proposals.append(f"train.micro_batch_size={micro} ({math.ceil(share / micro)} micro-batches per step)")
    if fixed + activations > budget and recipe.model.llm.is_frozen and recipe.model.llm.quantization == "none":
        proposals.append("model.llm.quantization=4bit (needs bitsandbytes)")
        fixed -= int(result.memory["LLM weights"] * 0.7)
    if fixed + activations > budget and not recipe.train.gradient_checkpointing:
        proposals.append("train.gradient_checkpointing=true")
        activations = min(activations, checkpointed * micro // result.micro_batch_size)
    if fixed + activations > budget:
        if recipe.model.adapter.targets == "full":
            proposals.append("model.adapter.targets=[X] (the encoder stays frozen)")
        proposals.append("a smaller LLM (model.llm.name), or a device with more memory")
    room = budget - fixed + result.memory["gradients"]
    if result.reports_bytes > room > 0:
        size = int(recipe.generation.batch_size * room / result.reports_bytes)
        fewer = recipe.generation.consensus is not None and size == 0
        proposals.append(f"generation.batch_size={max(1, size)}" + fewer * " and a smaller generation.consensus")
    return proposals
