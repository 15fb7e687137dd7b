"""The checkpoints of a training run, under any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emrrg_cli.errors import RunError
from emrrg_cli.training.average import WeightAverage
from emrrg_cli.training.checkpoint import (
    Progress,
    load_average,
    load_checkpoint,
    require_checkpoint,
    rng_state,
    save_checkpoint,
    save_progress,
)

_SLOW_S = 1.0
_SHARE = 0.05  # largest share of the time that slow checkpoints at the ends of epochs may take


class RunCheckpoints:
    """Saves and loads the state of a run. All processes call the methods; the main process writes.

    Args:
        run_dir: Directory of `checkpoints/`.
        module: The model, not wrapped by `DistributedDataParallel`.
        optimizer: Prepared by `accelerator`.
        accelerator: `accelerate.Accelerator`.
        average: The average of the weights, if the run keeps one.
        require_run_dir: Called before each checkpoint; raises `RunError` if the run directory was removed.
    """

    def __init__(
        self,
        run_dir: Path,
        module: Any,
        optimizer: Any,
        accelerator: Any,
        average: WeightAverage | None,
        require_run_dir: Callable[[], None],
    ) -> None:
        self._run_dir, self._module, self._optimizer = run_dir, module, optimizer
        self._accelerator, self._average, self._require_run_dir = accelerator, average, require_run_dir
        self._took_s, self._ended_at = 0.0, float("-inf")  # seconds for the last checkpoint, and its time

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint with the random states of all processes."""
        began = time.monotonic()
        states = [rng_state()]
        if self._accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            states = gather_object(states)
        if self._accelerator.is_main_process:
            self._require_run_dir()
            save_checkpoint(
                self._run_dir / "checkpoints",
                self._module,
                self._optimizer.optimizer,
                self._accelerator.scaler,
                progress,
                states,
                None if self._average is None else self._average.tensors(),
            )
        self._accelerator.wait_for_everyone()
        self._ended_at = time.monotonic()
        self._took_s = self._ended_at - began

    def affordable(self) -> bool:
        """Whether checkpoints take at most 5 % of the time if one is written now; always true if the last was fast.

        All processes give the same answer.
        """
        waited = time.monotonic() - self._ended_at
        affordable = self._took_s < _SLOW_S or waited >= self._took_s / _SHARE
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            affordable = broadcast_object_list([affordable])[0]
        return affordable

    def save_progress(self, progress: Progress) -> None:
        """Updates the progress in the last checkpoint, after a validation."""
        if self._accelerator.is_main_process:
            save_progress(self._run_dir / "checkpoints", progress)
        self._accelerator.wait_for_everyone()

    def load(self, steps_per_epoch: int) -> Progress | None:
        """Loads the last checkpoint into model, optimizer and average.

        Returns:
            The progress of the run; None if the run was stopped before its first checkpoint.

        Raises:
            RunError: The checkpoint does not fit the run.
        """
        checkpoint = require_checkpoint(self._run_dir)
        if checkpoint is None:
            return None
        progress = load_checkpoint(
            checkpoint,
            self._module,
            self._optimizer.optimizer,
            self._accelerator.scaler,
            self._accelerator.process_index,
        )
        steps = progress.epoch * steps_per_epoch + progress.step_in_epoch
        if progress.step != steps or progress.step_in_epoch >= steps_per_epoch:
            raise RunError(
                f"{checkpoint / 'progress.json'}: step {progress.step} is not step {progress.step_in_epoch} of "
                f"epoch {progress.epoch}, with {steps_per_epoch} steps in an epoch",
                hint="Put the checkpoint back from a copy of the run, or start a new run with another --output.",
            )
        if self._average is not None:
            self._average.load(load_average(checkpoint))
        return progress
