"""The training loop of all three stages, on Accelerate."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.console import err
from emrrg_cli.datasets.epochs import DrawsEpoch, EpochOrder, Epochs, epoch_length
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.errors import Interrupted, RunError, UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.output_paths import directory_guard
from emrrg_cli.files.records import append_jsonl, read_jsonl
from emrrg_cli.models.arm.nonfinite_watch import watch
from emrrg_cli.recipe.common import LoopSettings
from emrrg_cli.runtime import slowdown_advice
from emrrg_cli.signals import stop_signals
from emrrg_cli.training.average import WeightAverage
from emrrg_cli.training.checkpoint import (
    Progress,
    load_average,
    load_checkpoint,
    refuse_lost_checkpoint,
    require_checkpoint,
    rng_state,
    save_checkpoint,
    save_progress,
)
from emrrg_cli.training.launch import inside_launcher
from emrrg_cli.training.progress import TrainingDisplay
from emrrg_cli.training.schedule import build_optimizer, learning_rate
from emrrg_cli.training.stage import PreparesStep, ShowsExamples, Stage

_ADVISE_AFTER_S = 60.0
# Under several processes a stop is noticed at every so many steps.
_STOP_EVERY_STEPS = 8
# Up to here BLEU-4 is what smoothing adds: the loss chooses the best model.
MIN_BLEU_4 = 0.02


@dataclass
class Summary:
    """How a training run ended. `best` holds score and negative loss of the selected step (None: no finite ones)."""

    steps: int
    best: list[float] | None
    best_step: int | None
    reason: str
    samples_per_second: float | None
    peak_memory_mib: float | None
    is_main_process: bool

    def table(self, run_dir: Path) -> Table:
        """For the terminal."""
        table = Table(show_header=False, title=f"run {run_dir}", title_justify="left")
        rows = {"steps": f"{self.steps} ({self.reason})"}
        if self.best is not None:
            score, negative_loss = self.best
            shown = f"score {score:.4f}, " if score else ""
            rows["best validation"] = f"{shown}loss {-negative_loss:.4f}, step {self.best_step}"
        if self.samples_per_second is not None:
            rows["samples a second"] = f"{self.samples_per_second:.2f}"
        if self.peak_memory_mib is not None:
            rows["peak GPU memory"] = f"{self.peak_memory_mib:,.0f} MiB"
        for name, value in rows.items():
            table.add_row(name, value)
        return table


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
    """Trains a stage until its schedule ends, patience runs out, or somebody stops it.

    The loss of an optimizer step is the mean over the items of the whole batch (report tokens in stage 3), whatever
    the number of processes and micro-batches. Every random choice depends on the seed and the place in the data, so
    that a resumed run continues exactly.

    Args:
        collate: joins examples of `dataset` into a batch with a method `to(device)`.
        run_dir: receives `history.jsonl` and `checkpoints/`.
        accelerator: `accelerate.Accelerator`; the model is not yet prepared.
        workers: processes that load data.
        resume: continue from `run_dir`'s last checkpoint; from the start where there is none.

    Raises:
        RunError: when the loss is not finite (or, with `detect_non_finite`, the output of a block of an encoder), or
            the checkpoint does not fit.
        UsageError: when the batch does not fit the data or the processes.
        Interrupted: after a signal of `stop_signals`, once the checkpoint is written.
    """
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UsageError(
            f"training under {accelerator.distributed_type.value} is not supported yet",
            hint="Use one process a GPU (emrrg's --num-processes, torchrun, or accelerate without FSDP and DeepSpeed).",
        )
    loop = _Loop(stage, dataset, collate, settings, run_dir, accelerator, workers)
    if resume:
        loop.resume()
    with _stop_signals() as stop, watch(stage.model) if settings.detect_non_finite else nullcontext():
        return loop.run(stop)


def accumulate_gradients(model: Any, batches: Sequence[Any], items: float | Tensor, accelerator: Any) -> Tensor:
    """Adds up the gradients of an optimizer step, whose loss is the mean over the items of the whole batch.

    Args:
        model: prepared by `accelerator`; returns `StageOutput`.
        batches: the micro-batches of this process.
        items: of the whole batch, over all processes.

    Returns:
        The loss summed over the items of this process: a scalar on the device, without gradient.
    """
    loss_sum = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(batch.to(accelerator.device))
            # DistributedDataParallel averages gradients over processes; the sum is wanted.
            accelerator.backward(output.loss_sum * (accelerator.num_processes / items))
            loss_sum = loss_sum + output.loss_sum.detach().float()
    return loss_sum


def update_weights(model: Any, optimizer: Any, clip_norm: float | None, accelerator: Any) -> Tensor | None:
    """Clips the gradients, takes the optimizer's step and drops them; returns their norm before clipping, if any."""
    norm = None
    if clip_norm is not None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        norm = accelerator.clip_grad_norm_(trainable, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class _Loop:
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
        self.total_steps = self.order.steps_per_epoch * settings.epochs
        if settings.max_steps is not None:
            self.total_steps = min(self.total_steps, settings.max_steps)
        optimizer = build_optimizer(stage.model, settings)
        self.module = stage.model  # as it is under DistributedDataParallel
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.average = None if settings.ema is None else WeightAverage(self.module, settings.ema)
        self.progress = Progress()
        self.history = run_dir / "history.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self.require_run_dir = directory_guard(run_dir)
        self.samples_per_second: float | None = None
        # First step with a loss or gradient that is not finite; 0: none. Read now and then: reading waits for the GPU.
        self.broken_at = torch.zeros((), device=accelerator.device)

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self, stop: _Stop) -> Summary:
        progress, settings, accelerator = self.progress, self.settings, self.accelerator
        self.stop = stop
        self.stop_at = self.total_steps
        if settings.stop_after_steps is not None:
            self.stop_at = min(self.total_steps, progress.step + settings.stop_after_steps)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self.measured_from = (time.monotonic(), time.process_time(), progress.step)
        with TrainingDisplay(
            self.total_steps,
            progress.step,
            enabled=accelerator.is_main_process,
            after_batch=self._stop_validation_if_asked,
        ) as display:
            self.display = display
            if progress.validation_due:
                self._validate()
            elif progress.step and (reason := self._reason_to_end()):
                display.message(f"this run is already finished: {progress.step} steps, {reason}")
            for step_batches in self._steps():
                signal_number = self._optimizer_step(step_batches, stop.number)
                self._advise()
                epoch_ended = progress.step_in_epoch == 0
                progress.validation_due = progress.step == self.total_steps or (
                    epoch_ended and progress.epoch % settings.validate_every_epochs == 0
                )
                every = settings.checkpoint_every_steps
                due = epoch_ended if every is None else progress.step % every == 0
                # Before the validation, which takes long: the training is saved whatever happens there.
                if due or progress.validation_due or signal_number or self._reason_to_end():
                    self._save()
                if signal_number:
                    raise self._interrupted(signal_number)
                if progress.validation_due:
                    self._validate()
                if self._reason_to_end():
                    break
            self.samples_per_second = display.samples_per_second
        if accelerator.is_main_process:
            self.require_run_dir()
        if progress.best_step is None and accelerator.is_main_process:
            with self._averaged():
                self.stage.export()  # nothing was validated, or to no finite figure: the result is the model as it is
        accelerator.wait_for_everyone()
        return Summary(
            progress.step,
            progress.best,
            progress.best_step,
            self._reason_to_end() or "",
            self.samples_per_second,
            self._peak_memory(),
            accelerator.is_main_process,
        )

    def _advise(self) -> None:
        """Says once, after a minute of training, why steps are slow where other programs are the cause."""
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
            return f"no gain in {settings.patience} validations"
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
        # Lists of the micro-batches of one optimizer step, from the place where the run stands to its end. The epochs
        # have their loading processes in common: with few images, to start some takes longer than an epoch does.
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
        """One optimizer step; returns the signal that any process was stopped by, or 0."""
        accelerator, settings, progress = self.accelerator, self.settings, self.progress
        lr = learning_rate(progress.step, self.order.steps_per_epoch, self.total_steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        items = sum(self.stage.items(batch) for batch in batches)
        total_items: float | Tensor = float(items)
        if accelerator.num_processes > 1:
            shared = torch.tensor([[float(items), float(stop_signal)]], device=accelerator.device)
            shared = accelerator.gather(shared)
            total_items = shared[:, 0].sum()
            # To read a value waits for the GPU, so all processes look at the same few steps.
            stop_signal = int(shared[:, 1].max()) if progress.step % _STOP_EVERY_STEPS == 0 else 0
        self.model.train()
        if isinstance(self.stage, PreparesStep):
            batches = self.stage.prepare_step(batches, progress.epoch)
        loss_sum = accumulate_gradients(self.model, batches, total_items, accelerator)
        norm = update_weights(self.model, self.optimizer, settings.clip_norm, accelerator)

        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)
        finite = loss_sum.isfinite()
        if norm is not None and accelerator.scaler is None:  # with a scaler, such steps are left out
            finite = finite & torch.as_tensor(norm).isfinite()
        self.broken_at = torch.where(finite | (self.broken_at > 0), self.broken_at, float(progress.step))
        progress.step_in_epoch += 1
        if progress.step_in_epoch == self.order.steps_per_epoch:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        logged = progress.step % settings.log_every == 0 or progress.step in (1, self.total_steps)
        if logged or settings.detect_non_finite:  # before broken weights make every block look guilty
            self._require_finite()
        if logged:
            if accelerator.num_processes > 1:
                loss_sum = accelerator.reduce(loss_sum, reduction="sum")
            self._log_step(float(loss_sum / total_items), lr, norm)
        self.display.update(
            step=progress.step,
            epoch=(progress.step - 1) / self.order.steps_per_epoch,
            loss=self.last_loss,
            lr=lr,
            samples=settings.batch_size,
        )
        return stop_signal

    # -- records ------------------------------------------------------------------------------------------------

    advised = False
    last_loss: float = float("nan")

    def _log_step(self, loss: float, lr: float, norm: Any) -> None:
        self.last_loss = loss
        row = {"train/loss": loss, "train/lr": lr}
        if norm is not None:
            row["train/grad_norm"] = float(norm)
        self._record(row)

    def _require_finite(self) -> None:
        """Called by all processes before anything is kept, so that no checkpoint holds broken weights."""
        broken_at = self.broken_at
        if self.accelerator.num_processes > 1:
            # The first: after it the weights are broken in all processes, and each has a bad step of its own.
            broken_at = self.accelerator.gather(broken_at[None])
            broken_at = broken_at[broken_at > 0].min() if bool((broken_at > 0).any()) else broken_at.max()
        if step := int(broken_at):
            where = (
                "Every encoder block gave finite values: it began behind them or in the backward pass."
                if self.settings.detect_non_finite
                else "To see in which block and direction it begins: --resume with train.detect_non_finite=true."
            )
            raise RunError(
                f"the training loss or its gradient is not finite at step {step}; the last checkpoint is kept",
                hint=f"Lower train.lr, or train with train.precision=bf16 or fp32. {where}",
            )

    def _record(self, row: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        epoch = self.progress.step / self.order.steps_per_epoch
        self.require_run_dir()
        append_jsonl(self.history, {"step": self.progress.step, "epoch": round(epoch, 6), **row})
        self.accelerator.log(row, step=self.progress.step)

    def _validate(self) -> None:
        progress = self.progress
        with self.display.paused(), _own_rng(self.accelerator.device), self._averaged():
            self.model.eval()
            self._stop_validation_if_asked()
            figures = self.stage.validate(self.display)
            better = bool(figures) and self._is_better(figures)
            if self.accelerator.is_main_process:
                self.require_run_dir()
            if better and self.accelerator.is_main_process:
                self.stage.export()
            if isinstance(self.stage, ShowsExamples) and self.accelerator.is_main_process:
                self.stage.show_examples(math.ceil(progress.step / self.order.steps_per_epoch))
        progress.validation_due = False
        if not figures:
            return
        if better:
            progress.best_step, progress.validations_without_gain = progress.step, 0
        else:
            progress.validations_without_gain += 1
        self._record(figures)
        if self.accelerator.is_main_process:
            save_progress(self.run_dir / "checkpoints", progress)
        self.accelerator.wait_for_everyone()
        named = {key.removeprefix("validation/"): number for key, number in figures.items()}
        self.display.figures(f"step {progress.step}: validation", named, "  (best so far)" if better else "")

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.in_place()

    def _stop_validation_if_asked(self) -> None:
        # Its checkpoint is written, so that nothing is lost. One process of several must not leave the others alone.
        if self.stop.number and self.accelerator.num_processes == 1:
            raise self._interrupted(self.stop.number)

    def _is_better(self, figures: dict[str, float]) -> bool:
        # The loss decides between scores that are equal as they are shown: early reports often have no 4-gram in common
        # with any reference, and what BLEU adds to avoid a division by zero is no difference.
        score = round(figures.get("validation/score", 0.0), 4)
        if figures.get("validation/BLEU_4", 1.0) <= MIN_BLEU_4:  # noise between models that do not yet write sentences
            score = 0.0
        value = [score, -figures["validation/loss"]]
        if not all(map(math.isfinite, value)):  # NaN is not smaller than anything, so it would pass for the best
            return False
        if self.progress.best is not None and value <= self.progress.best:
            return False
        self.progress.best = value
        return True

    def _save(self) -> None:
        with self.display.paused():
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self._require_finite()
        states = [rng_state()]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            states = gather_object(states)
        if self.accelerator.is_main_process:
            self.require_run_dir()
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.module,
                self.optimizer.optimizer,
                self.accelerator.scaler,
                self.progress,
                states,
                None if self.average is None else self.average.tensors(),
            )
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Puts the run where its last checkpoint left it; at its start where it was stopped before the first one."""
        checkpoint = require_checkpoint(self.run_dir)
        if checkpoint is not None:
            progress = load_checkpoint(
                checkpoint,
                self.module,
                self.optimizer.optimizer,
                self.accelerator.scaler,
                self.accelerator.process_index,
            )
            steps = progress.epoch * self.order.steps_per_epoch + progress.step_in_epoch
            if progress.step != steps or progress.step_in_epoch >= self.order.steps_per_epoch:
                raise RunError(
                    f"{checkpoint / 'progress.json'}: step {progress.step} is not step {progress.step_in_epoch} of "
                    f"epoch {progress.epoch}, with {self.order.steps_per_epoch} steps in an epoch",
                    hint="Put the checkpoint back from a copy of the run, or start a new run with another --output.",
                )
            self.progress = progress
            if self.average is not None:
                self.average.load(load_average(checkpoint))
        if self.accelerator.is_main_process and self.history.exists():
            rows = read_jsonl(self.history)
            if not all(isinstance(row.get("step"), int) for row in rows):
                raise RunError(f"{self.history}: a line has no step", hint="Put it back from a copy, or delete it.")
            if checkpoint is None:
                every = max(self.settings.checkpoint_every_steps or 0, self.order.steps_per_epoch)
                refuse_lost_checkpoint(self.run_dir, rows, every)
            # What was logged after the checkpoint is done again.
            kept = [json.dumps(row) + "\n" for row in rows if self._is_done(row)]
            atomic_write_text(self.history, "".join(kept))

    def _is_done(self, row: dict[str, Any]) -> bool:
        progress = self.progress
        if row["step"] == progress.step and progress.validation_due:
            return "validation/loss" not in row
        return bool(row["step"] <= progress.step)

    def _peak_memory(self) -> float | None:
        if self.accelerator.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.accelerator.device) / 2**20


@contextmanager
def _own_rng(device: torch.device) -> Iterator[None]:
    # Validation may sample; training must not notice that it ran.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@dataclass
class _Stop:
    """Whether somebody asked the training to stop: the number of the first signal that came, 0 before."""

    number: int = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Notes the first signal that asks the program to stop, to be seen between steps; the second acts at once.

    Under a launcher the second does nothing: the same Ctrl-C arrives from the terminal and from the launcher, which
    ends processes that take too long.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def note(number: int, frame: Any) -> None:
        if not inside_launcher():
            for watched_number, handler in before.items():
                signal.signal(watched_number, handler)
            err.print("Finishing this step and saving a checkpoint. Press Ctrl-C again to quit now.")
        stop.number = stop.number or number

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
