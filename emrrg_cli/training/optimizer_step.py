"""The parts of an optimizer step: gradients over micro-batches, the weight update, and a check for finite values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.errors import RunError


def accumulate_gradients(model: Any, batches: Sequence[Any], items: float | Tensor, accelerator: Any) -> Tensor:
    """Accumulates the gradients of an optimizer step. Its loss is the mean over the items of the whole batch.

    Args:
        model: Prepared by `accelerator`; returns `StageOutput`.
        batches: The micro-batches of this process.
        items: Items of the whole batch, over all processes.

    Returns:
        The loss summed over the items of this process: a scalar on the device, without gradient.
    """
    loss_sum = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(batch.to(accelerator.device))
            # DistributedDataParallel averages gradients over processes, but the sum is needed.
            accelerator.backward(output.loss_sum * (accelerator.num_processes / items))
            loss_sum = loss_sum + output.loss_sum.detach().float()
    return loss_sum


def update_weights(model: Any, optimizer: Any, clip_norm: float | None, accelerator: Any) -> Tensor:
    """Clips the gradients, updates the weights and clears the gradients.

    Returns:
        The norm of the gradients before clipping. It is computed without `clip_norm` too, because only it shows a
        gradient that is not finite, which breaks the weights.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm: Tensor = accelerator.clip_grad_norm_(trainable, math.inf if clip_norm is None else clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class FiniteCheck:
    """Finds the first step with a loss or gradient that is not finite.

    Args:
        accelerator: `accelerate.Accelerator`.
        detects_blocks: Whether the run also checks the output of each encoder block (`train.detect_non_finite`).
    """

    def __init__(self, accelerator: Any, detects_blocks: bool) -> None:
        self._accelerator = accelerator
        self._detects_blocks = detects_blocks
        # The first bad step, 0 if there is none. It is kept on the GPU: reading it waits for the GPU.
        self._first_bad_step = torch.zeros((), device=accelerator.device)

    def add(self, step: int, loss_sum: Tensor, norm: Tensor) -> None:
        """Checks the loss and the gradient norm of a step, without waiting for the GPU."""
        finite = loss_sum.isfinite()
        if self._accelerator.scaler is None:  # a scaler skips such steps
            finite = finite & torch.as_tensor(norm).isfinite()
        self._first_bad_step = torch.where(finite | (self._first_bad_step > 0), self._first_bad_step, float(step))

    def require_finite(self) -> None:
        """Stops the run if the loss or gradient of a step was not finite.

        All processes call this before each save, so that no checkpoint has broken weights.

        Raises:
            RunError: The loss or gradient of a step is not finite.
        """
        bad_step = self._first_bad_step
        if self._accelerator.num_processes > 1:
            # The earliest step of all processes: after it, all processes have broken weights.
            bad_step = self._accelerator.gather(bad_step[None])
            bad_step = bad_step[bad_step > 0].min() if bool((bad_step > 0).any()) else bad_step.max()
        if step := int(bad_step):
            where = (
                "All encoder blocks gave finite values, so it began after them or in the backward pass."
                if self._detects_blocks
                else "To find the block and direction where it begins, use --resume with train.detect_non_finite=true."
            )
            raise RunError(
                f"the training loss or its gradient is not finite at step {step}; the last checkpoint, if any, is kept",
                hint=f"Lower train.lr, or train with train.precision=bf16 or fp32. {where}",
            )
