"""The training loop of all three stages, on Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.console import counted
from emrrg_cli.datasets.epochs import DrawsEpoch, EpochOrder, Epochs, epoch_length
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.errors import Interrupted, UsageError
from emrrg_cli.files.output_paths import directory_guard
from emrrg_cli.models.arm.nonfinite_watch import watch
from emrrg_cli.recipe.common import LoopSettings
from emrrg_cli.runtime import slowdown_advice
from emrrg_cli.training.average import WeightAverage
from emrrg_cli.training.checkpoint import Progress, refuse_lost_checkpoint
from emrrg_cli.training.history import History
from emrrg_cli.training.optimizer_step import FiniteCheck, accumulate_gradients, update_weights
from emrrg_cli.training.progress import TrainingDisplay
from emrrg_cli.training.run_checkpoints import RunCheckpoints
from emrrg_cli.training.run_dir import first_checkpoint_interval
from emrrg_cli.training.schedule import build_optimizer, learning_rate, schedule_length, warmup_note
from emrrg_cli.training.selection import better_value
from emrrg_cli.training.stage import PreparesStep, ShowsExamples, Stage
from emrrg_cli.training.stop_request import SharedStop, StopRequest, catch_stop_signals
from emrrg_cli.training.summary import Summary

_ADVISE_AFTER_S = 60.0


def train(
    stage: Stage,
    dataset: Dataset[Any],
    collate: Callable[[Sequence[Any]], Any],
    settings: LoopSettings,
    run_dir: Path,
    accelerator: Any,
    *,
    workers: int = 0,
    resume: bool = False,
) -> Summary:
    """Trains a stage until its schedule ends, its validations stop improving, or a stop signal arrives.

    The loss of an optimizer step is the mean over the items of the whole batch (report tokens in stage 3). It does not
    depend on the number of processes or micro-batches. All random choices depend on the seed and the position in the
    data, so a resumed run continues exactly.

    Args:
        collate: Joins examples of `dataset` into a batch with a method `to(device)`.
        run_dir: Receives `history.jsonl` and `checkpoints/`.
        accelerator: `accelerate.Accelerator`. The model is not prepared yet.
        workers: Number of processes that load data.
        resume: Continue from the last checkpoint in `run_dir`, or from the start if there is none.

    Returns:
        How the run ended.

    Raises:
        RunError: The loss is not finite (or, with `detect_non_finite`, the output of an encoder block), or the
            checkpoint does not fit the run.
        UsageError: The batch size does not fit the data or the number of processes.
        Interrupted: A stop signal arrived. The checkpoint is written.
    """
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UsageError(
            f"training under {accelerator.distributed_type.value} is not supported yet",
            hint="Use one process per GPU: --num-processes, torchrun, or accelerate without FSDP and DeepSpeed.",
        )
    loop = _Loop(stage, dataset, collate, settings, run_dir, accelerator, workers)
    if resume:
        loop.resume()
    with catch_stop_signals() as stop, watch(stage.model) if settings.detect_non_finite else nullcontext():
        return loop.run(stop)


class _Loop:
    """A training run: its model, optimizer and progress."""

    def __init__(
        self,
        stage: Stage,
        dataset: Dataset[Any],
        collate: Callable[[Sequence[Any]], Any],
        settings: LoopSettings,
        run_dir: Path,
        accelerator: Any,
        workers: int,
    ) -> None:
        self.stage, self.dataset, self.collate, self.settings = stage, dataset, collate, settings
        self.run_dir, self.accelerator, self.workers = run_dir, accelerator, workers
        draws = dataset if isinstance(dataset, DrawsEpoch) else None
        self.order = EpochOrder(
            epoch_length(dataset),
            settings.batch_size,
            settings.micro_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            settings.seed,
            None if draws is None else draws.draw_epoch,
        )
        self.total_steps = schedule_length(self.order.steps_per_epoch, settings)
        optimizer = build_optimizer(stage.model, settings)
        self.module = stage.model  # not wrapped by DistributedDataParallel
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.average = None if settings.ema is None else WeightAverage(self.module, settings.ema)
        self.progress = Progress()
        run_dir.mkdir(parents=True, exist_ok=True)
        self.require_run_dir = guard = directory_guard(run_dir)
        self.history = History(run_dir, self.order.steps_per_epoch, accelerator, guard)
        self.checkpoints = RunCheckpoints(run_dir, self.module, self.optimizer, accelerator, self.average, guard)
        self.shared_stop = SharedStop()
        self.finite = FiniteCheck(accelerator, settings.detect_non_finite)
        self.last_loss = float("nan")
        self.advised = False

    def run(self, stop: StopRequest) -> Summary:
        """Trains to the end of the run. Each step updates the weights, saves and validates, if these are due."""
        progress = self.progress
        self._start(stop)
        with TrainingDisplay(
            self.total_steps,
            progress.step,
            enabled=self.accelerator.is_main_process,
            after_batch=self._stop_validation_if_asked,
        ) as display:
            self.display = display
            if note := warmup_note(self.order.steps_per_epoch, self.settings):
                display.message(note)
            if progress.validation_due:
                self._validate()
            elif progress.step and (reason := self._reason_to_end()):
                display.message(f"this run is already finished: {counted(progress.step, 'step')}, {reason}")
            for step_batches in self._steps():
                signal_number = self._optimizer_step(step_batches, stop.number)
                self._advise()
                progress.validation_due = self._validation_due()
                # Before the validation: it takes long, and the checkpoint must exist even if it fails.
                if self._checkpoint_due() or progress.validation_due or signal_number or self._reason_to_end():
                    self._save()
                if signal_number:
                    raise self._interrupted(signal_number)
                if progress.validation_due:
                    self._validate()
                if self._reason_to_end():
                    break
        return self._finish(display.samples_per_second)

    def _start(self, stop: StopRequest) -> None:
        self.stop = stop
        self.stop_at = self.total_steps
        if self.settings.stop_after_steps is not None:
            self.stop_at = min(self.total_steps, self.progress.step + self.settings.stop_after_steps)
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        self.measured_from = (time.monotonic(), time.process_time(), self.progress.step)

    def _validation_due(self) -> bool:
        epoch_ended, interval = self.progress.step_in_epoch == 0, self.settings.validate_every_epochs
        return self.progress.step == self.total_steps or (epoch_ended and self.progress.epoch % interval == 0)

    def _checkpoint_due(self) -> bool:
        interval, epoch_ended = self.settings.checkpoint_every_steps, self.progress.step_in_epoch == 0
        return epoch_ended and self.checkpoints.affordable() if interval is None else self.progress.step % interval == 0

    def _finish(self, samples_per_second: float | None) -> Summary:
        progress, accelerator = self.progress, self.accelerator
        if accelerator.is_main_process:
            self.require_run_dir()
        if progress.best_step is None and accelerator.is_main_process:
            with self._averaged():
                self.stage.export()  # no validation gave finite figures, so the result is the current model
        accelerator.wait_for_everyone()
        return Summary(
            progress.step,
            progress.best,
            progress.best_step,
            self._reason_to_end() or "",
            samples_per_second,
            self._peak_memory(),
            accelerator.is_main_process,
        )

    def _advise(self) -> None:
        """Prints advice once, after a minute of training, if other programs slow down the steps."""
        began, busy_s, step = self.measured_from
        seconds, steps = time.monotonic() - began, self.progress.step - step
        if self.advised or seconds < _ADVISE_AFTER_S or steps < 2:
            return
        self.advised = True
        if advice := slowdown_advice(seconds / steps, (time.process_time() - busy_s) / seconds):
            self.display.message(advice)

    def _reason_to_end(self) -> str | None:
        settings, progress = self.settings, self.progress
        if progress.step >= self.total_steps:
            return "schedule ended"
        if settings.patience is not None and progress.validations_without_gain >= settings.patience:
            return f"no improvement in {settings.patience} validations"
        if progress.step >= self.stop_at:
            return f"train.stop_after_steps={settings.stop_after_steps}"
        return None

    def _interrupted(self, signal_number: int) -> Interrupted:
        return Interrupted(
            f"stopped at step {self.progress.step} of {self.total_steps}; a checkpoint is in {self.run_dir}",
            hint="Continue with the same command and --resume.",
            exit_code=128 + signal_number,
        )

    def _steps(self) -> Iterator[list[Any]]:
        """Yields the micro-batches of each optimizer step, from the current position to the end of the run.

        The epochs share their loading processes: with few images, starting processes takes longer than an epoch.
        """
        if self._reason_to_end() is not None:
            return
        progress, size = self.progress, self.order.micro_batches_per_step
        places = self.order.places(progress.epoch, progress.step_in_epoch)
        batches = load_batches(
            Epochs(self.dataset),
            islice(places, (self.stop_at - progress.step) * size),
            self.collate,
            workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        while step_batches := list(islice(batches, size)):
            yield step_batches

    def _optimizer_step(self, batches: list[Any], stop_signal: int) -> int:
        """Does one optimizer step. Returns the stop signal that any process received, or 0."""
        accelerator, settings, progress = self.accelerator, self.settings, self.progress
        lr = learning_rate(progress.step, self.order.steps_per_epoch, self.total_steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        items = sum(self.stage.items(batch) for batch in batches)
        total_items: float | Tensor = float(items)
        if accelerator.num_processes > 1:
            own = torch.tensor([[float(items), float(stop_signal)]]).to(accelerator.device, non_blocking=True)
            shared = accelerator.gather(own)
            total_items = shared[:, 0].sum()
            stop_signal = self.shared_stop.exchange(shared[:, 1].max())
        self.model.train()
        if isinstance(self.stage, PreparesStep):
            batches = self.stage.prepare_step(batches, progress.epoch)
        loss_sum = accumulate_gradients(self.model, batches, total_items, accelerator)
        norm = update_weights(self.model, self.optimizer, settings.clip_norm, accelerator)

        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)
        self.finite.add(progress.step, loss_sum, norm)
        progress.step_in_epoch += 1
        if progress.step_in_epoch == self.order.steps_per_epoch:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        logged = progress.step % settings.log_every == 0 or progress.step in (1, self.total_steps)
        if logged or settings.detect_non_finite:  # later, broken weights would give bad values in all blocks
            self.finite.require_finite()
        if logged:
            if accelerator.num_processes > 1:
                loss_sum = accelerator.reduce(loss_sum, reduction="sum")
            self._log_step(float(loss_sum / total_items), lr, norm)
        self.display.update(
            step=progress.step,
            epoch=progress.step / self.order.steps_per_epoch,
            loss=self.last_loss,
            lr=lr,
            samples=settings.batch_size,
        )
        return stop_signal

    def _log_step(self, loss: float, lr: float, norm: Tensor) -> None:
        self.last_loss = loss
        self.history.add(self.progress.step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": float(norm)})

    def _validate(self) -> None:
        """Validates, and exports the model if it is the best one so far."""
        progress = self.progress
        device = self.accelerator.device
        # Validation may sample; it must not change the random numbers of the training.
        own_random_numbers = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with self.display.paused(), own_random_numbers, self._averaged():
            self.model.eval()
            self._stop_validation_if_asked()
            figures = self.stage.validate(self.display)
            best = better_value(figures, progress.best) if figures else None
            better = best is not None
            progress.best = best or progress.best
            if self.accelerator.is_main_process:
                self.require_run_dir()
            if better and self.accelerator.is_main_process:
                self.stage.export()
            if isinstance(self.stage, ShowsExamples) and self.accelerator.is_main_process:
                self.stage.show_examples(math.ceil(progress.step / self.order.steps_per_epoch))
        progress.validation_due = False
        if better:
            progress.best_step, progress.validations_without_gain = progress.step, 0
        elif figures:
            progress.validations_without_gain += 1
        if figures:
            self.history.add(progress.step, figures)
        self.checkpoints.save_progress(progress)
        named = {key.removeprefix("validation/"): number for key, number in figures.items()}
        if figures:
            self.display.figures(f"step {progress.step}: validation", named, "  (best so far)" if better else "")

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.in_place()

    def _stop_validation_if_asked(self) -> None:
        # The checkpoint is written before the validation, so nothing is lost. With several processes, one process must
        # not stop alone: the others would wait for it.
        if self.stop.number and self.accelerator.num_processes == 1:
            raise self._interrupted(self.stop.number)

    def _save(self) -> None:
        with self.display.paused():
            self.finite.require_finite()
            self.checkpoints.save(self.progress)

    def resume(self) -> None:
        """Loads the last checkpoint. A run that was stopped before its first checkpoint starts again.

        Raises:
            RunError: The checkpoint or the history does not fit the run.
        """
        progress = self.checkpoints.load(self.order.steps_per_epoch)
        rows = self.history.rows()
        if progress is not None:
            self.progress = progress
        elif self.accelerator.is_main_process:
            interval = first_checkpoint_interval(self.run_dir, self.settings) or self.order.steps_per_epoch
            refuse_lost_checkpoint(self.run_dir, rows, interval)
        self.history.keep_until(self.progress, rows)

    def _peak_memory(self) -> float | None:
        device = self.accelerator.device
        return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
