"""Checkpoints with the complete state of a training run, so that a resumed run continues exactly.

A checkpoint is a directory `checkpoints/step-<n>/`; it gets this name when it is complete. The text file
`checkpoints/last` names the newest one. If that file is lost or wrong, the newest complete checkpoint is used. A
checkpoint has trained weights only: frozen weights do not change. After the validation of its step, `progress.json` is
replaced and nothing else. `checksums.json` has the SHA-256 of the other files.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from emrrg_cli.checksums import check_directory, warn_unchecked, write_checksums
from emrrg_cli.console import err
from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_directory, atomic_write_text
from emrrg_cli.files.records import read_bounded, read_record
from emrrg_cli.files.write_errors import writing
from emrrg_cli.models.foreign_files import check_archive
from emrrg_cli.models.weights import load_tensors

_WEIGHTS, _STATE, _PROGRESS = "trainable.safetensors", "state.pt", "progress.json"

AVERAGE = "average.safetensors"


@dataclass
class Progress:
    """The progress of a training run.

    `step` counts optimizer steps. `epoch` and `step_in_epoch` are the position of the next step. `validation_due`
    means that the current model is not validated yet.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: list[float] | None = None  # score, negative loss
    best_step: int | None = None
    validations_without_gain: int = 0
    validation_due: bool = False


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the trainable parameters by name, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def trained_bytes(model: nn.Module) -> int:
    """Returns the size of the trainable parameters in bytes."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def rng_state() -> dict[str, Any]:
    """Returns the state of all random number generators that training uses in this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    # Plain containers and tensors only: checkpoints load with weights-only unpickling.
    state["numpy"] = [state["numpy"][0], torch.from_numpy(state["numpy"][1].astype(np.int64)), *state["numpy"][2:]]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the states that `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    progress: Progress,
    rng_states: list[dict[str, Any]],
    average: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes `directory/step-<n>`, names it in `directory/last` and removes earlier checkpoints.

    Args:
        rng_states: The random state of each process, in rank order.
        average: The average of the trainable parameters; None without `train.ema`.

    Raises:
        RunError: It cannot be written. The previous checkpoint is unchanged.
    """
    target = _place(directory, progress)
    tensors = trainable_state(model)
    # AdamW keeps two moments for each weight.
    needed = 3 * trained_bytes(model)
    with writing(target, needed), atomic_directory(target) as temporary:
        with writing(target / _WEIGHTS, needed // 3):
            save_file(tensors, temporary / _WEIGHTS)
        if average is not None:
            save_file(average, temporary / AVERAGE)
        state = {
            "optimizer": optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": rng_states,
        }
        with writing(target / _STATE, needed * 2 // 3):
            torch.save(state, temporary / _STATE)
        write_checksums(temporary)
        (temporary / _PROGRESS).write_text(_as_json(progress))
    atomic_write_text(directory / "last", target.name + "\n")
    for other in directory.glob("step-*"):
        if (step := _step(other)) is not None and step < progress.step:
            shutil.rmtree(other, ignore_errors=True)
    return target


def save_progress(directory: Path, progress: Progress) -> None:
    """Updates the progress in the checkpoint of `progress.step`, after its validation."""
    atomic_write_text(_place(directory, progress) / "progress.json", _as_json(progress))


def _progress(record: dict[str, Any], checkpoint: Path) -> Progress:
    """Returns the `Progress` in a record of `progress.json`.

    Raises:
        ValueError: A value has the wrong type or is impossible.
    """
    progress = Progress(**record)
    counts = (progress.step, progress.epoch, progress.step_in_epoch, progress.validations_without_gain)
    if any(type(count) is not int or not 0 <= count < 10**12 for count in counts):
        raise ValueError(f"{_PROGRESS} contains an invalid count: {counts}")
    if progress.step != _step(checkpoint):
        raise ValueError(f"{_PROGRESS} is of step {progress.step}")
    best = progress.best
    if best is not None and not (len(best) == 2 and all(math.isfinite(value) for value in best)):
        raise ValueError(f"{_PROGRESS} contains an invalid best result: {best}")
    if progress.best_step is not None and not 0 <= progress.best_step <= progress.step:
        raise ValueError(f"{_PROGRESS} says that step {progress.best_step} was the best, after {progress.step} steps")
    return progress


def _place(directory: Path, progress: Progress) -> Path:
    return directory / f"step-{progress.step:08d}"


def _as_json(progress: Progress) -> str:
    return json.dumps(asdict(progress), indent=2) + "\n"


def last_checkpoint(directory: Path) -> Path | None:
    """Returns the checkpoint to continue from: the one that `last` names, else the newest complete one, else None."""
    found = {_step(place): place for place in directory.glob("step-*") if _is_whole(place)}
    whole = {step: place for step, place in found.items() if step is not None}
    try:
        named = _step(Path(read_bounded(directory / "last", 100).decode("utf-8").strip()))
    except (OSError, ValueError):
        named = None
    if named in whole:
        return whole[named]
    return whole[max(whole)] if whole else None


def require_checkpoint(run_dir: Path) -> Path | None:
    """Returns `last_checkpoint`, which is None only if the run has never written a checkpoint.

    Raises:
        RunError: The run has written checkpoints, and none of them is complete. Starting again at the first step
            would overwrite the rest of the run.
    """
    directory = run_dir / "checkpoints"
    checkpoint = last_checkpoint(directory)
    places = sorted(place for place in directory.glob("step-*") if _step(place) is not None)
    written = places or (directory / "last").exists() or (run_dir / "model").exists()
    if checkpoint is None and written:
        reason = f"{places[-1].name} is not complete" if places else "there is none left"
        raise RunError(
            f"{directory}: the checkpoint of this run is lost: {reason}",
            hint="Put it back from a copy of the run, or start a new run with another --output.",
        )
    return checkpoint


def refuse_lost_checkpoint(run_dir: Path, rows: Sequence[Mapping[str, Any]], interval: int) -> None:
    """Checks that a run without a checkpoint was stopped before its first one, and prints that it starts again.

    Args:
        rows: Rows of `history.jsonl`, each with a step.
        interval: Number of steps after which the first checkpoint was due.

    Raises:
        RunError: The history shows that a checkpoint was written.
    """
    reached = max((row["step"] for row in rows), default=0)
    if reached > interval or any("validation/loss" in row for row in rows):  # a validation comes after a checkpoint
        raise RunError(
            f"{run_dir / 'checkpoints'}: the checkpoint of this run is lost: there is none, and history.jsonl goes up "
            f"to step {reached}",
            hint="Put it back from a copy of the run, or start a new run with another --output. To train this run "
            "again from its first step, delete its history.jsonl.",
        )
    logged = f"history.jsonl goes up to step {reached}" if reached else "history.jsonl has no step"
    err.print(
        f"{run_dir} has no checkpoint ({logged}): training starts at the first step",
        markup=False,
        soft_wrap=True,
    )


def _is_whole(place: Path) -> bool:
    return not place.is_symlink() and all((place / name).is_file() for name in (_WEIGHTS, _STATE, _PROGRESS))


def _step(place: Path) -> int | None:
    """Returns the step in the name of a checkpoint, also if its replacement was interrupted; None for other names."""
    match = re.fullmatch(r"step-(\d{8,12})(\.previous-emrrg)?", place.name, re.ASCII)
    return int(match[1]) if match else None


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, rank: int
) -> Progress:
    """Loads a checkpoint into model, optimizer, gradient scaler and random number generators.

    Raises:
        RunError: It cannot be read or is damaged, or its trainable parameters differ from those of the model.
    """
    try:
        if not check_directory(checkpoint) and rank == 0:
            warn_unchecked(checkpoint)
        tensors = load_tensors(checkpoint / _WEIGHTS)
        check_archive(checkpoint / _STATE)
        state = torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
        record = read_record(checkpoint / _PROGRESS, "the progress of the training", "Put it back from a copy.")
        progress = _progress(record or {}, checkpoint)
    except Exception as error:  # each of the formats has its own errors
        reason = error.message if isinstance(error, RunError) else next(iter(str(error).splitlines()), "")
        raise RunError(
            f"{checkpoint}: this checkpoint cannot be read: {reason}",
            hint="Put it back from a copy of the run, or start a new run with another --output.",
        ) from error
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if different := sorted(set(tensors) ^ set(parameters)):
        raise RunError(
            f"{checkpoint}: its trainable parameters are not those of the recipe, starting with {different[0]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != parameters[name].shape:
                raise RunError(
                    f"{checkpoint}: {name} is {list(tensor.shape)}, the model has {list(parameters[name].shape)}"
                )
            parameters[name].copy_(tensor)
    try:
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        if rank < len(state["rng"]):
            set_rng_state(state["rng"][rank])
    except Exception as error:  # a state of another shape raises errors of several types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"{checkpoint / _STATE}: does not fit the model of the recipe: {reason}") from error
    return progress


def load_average(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the average of the trainable parameters (`train.ema`) in a checkpoint.

    Raises:
        RunError: It cannot be read.
    """
    return load_tensors(checkpoint / AVERAGE)
