"""Optimizer and learning rate schedule."""

from __future__ import annotations

import math
import sys

import torch
from torch import nn

from emrrg_cli.console import counted
from emrrg_cli.recipe.common import LoopSettings
from emrrg_cli.recipe.finetuning import TrainSettings


def build_optimizer(model: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """Builds AdamW for the trainable parameters; vectors (biases, norms, tokens) and `A_log` have no decay.

    The learning rate of a step is multiplied by `lr_scale` of each group.

    Raises:
        ValueError: No parameter is trainable.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or name.endswith(("bias", "A_log", ".D", "_token", "pos_embed"))
            scale = float(getattr(settings.lr_scale, part_of(name)))
            groups.setdefault((is_plain, scale), []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    options = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else settings.weight_decay, "lr_scale": key[1]}
        for key in sorted(groups)
    ]
    return torch.optim.AdamW(options, lr=settings.peak_lr, betas=tuple(settings.betas))  # type: ignore[arg-type]


def part_of(name: str) -> str:
    """Returns the part of the model, as named in `train.lr_scale`, from the name of a parameter."""
    if ".lora_" in name:
        return "adapters"
    if name.startswith(("encoder.", "pretrainer.encoder.")):
        return "encoder"
    if name.startswith(("llm.", "text_encoder.")) and ".cross." not in name:
        return "llm"
    return "new"


def schedule_length(steps_per_epoch: int, settings: LoopSettings) -> int:
    """Returns the optimizer steps of all epochs, at most `max_steps`."""
    return min(steps_per_epoch * settings.epochs, settings.max_steps or sys.maxsize)


def warmup_note(steps_per_epoch: int, settings: LoopSettings) -> str | None:
    """Returns a note if training ends before its warm-up does, so that it never has the learning rate of the recipe."""
    total, warmup = schedule_length(steps_per_epoch, settings), math.ceil(settings.warmup_epochs * steps_per_epoch)
    if warmup <= total:
        return None
    last = learning_rate(total - 1, steps_per_epoch, total, settings)
    return (
        f"train.warmup_epochs={settings.warmup_epochs:g} is {counted(warmup, 'step')}, but training has {total:,}: "
        f"the learning rate ends at {last:.2g} and does not reach {settings.peak_lr:.2g}"
    )


def self_critical_note(steps_per_epoch: int, settings: TrainSettings) -> str | None:
    """Returns a note if training ends before its self-critical part begins."""
    begin, total = settings.self_critical, schedule_length(steps_per_epoch, settings)
    if begin is None or begin.after_epochs * steps_per_epoch < total:
        return None
    return (
        f"train.self_critical begins after {counted(begin.after_epochs, 'epoch')}, and training ends after "
        f"{total / steps_per_epoch:g}: it has only cross-entropy. Set train.self_critical.after_epochs lower for both."
    )


def learning_rate(step: int, steps_per_epoch: int, total_steps: int, settings: LoopSettings) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0; a pure function, so resuming needs no state.

    Linear warm-up over `warmup_epochs`, then the schedule down to `min_lr` at `total_steps`. With `schedule_unit`
    `epoch`, the rate is constant within an epoch.
    """
    warmup = settings.warmup_epochs * steps_per_epoch
    if settings.schedule_unit == "epoch":
        epochs_done = step // steps_per_epoch
        position = float(epochs_done * steps_per_epoch)
        if epochs_done < settings.warmup_epochs:
            return settings.peak_lr * min(1.0, (epochs_done + 1) / settings.warmup_epochs)
    else:
        position = float(step)
        if step < warmup:
            return settings.peak_lr * min(1.0, (step + 1) / warmup)
    if settings.schedule == "constant":
        return settings.peak_lr
    progress = min(1.0, (position - warmup) / max(1.0, total_steps - warmup))
    return settings.min_lr + 0.5 * (settings.peak_lr - settings.min_lr) * (1 + math.cos(math.pi * progress))
