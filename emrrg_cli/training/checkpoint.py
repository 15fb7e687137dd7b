"""Checkpoints that hold all that an exact continuation needs.

A run keeps `checkpoints/step-<n>/`, complete once it has that name, and a text file `checkpoints/last` that names the
newest. Only what is trained is in it: frozen weights are those of the start. `progress.json` is replaced once the
validation of its step is done, which changes nothing else.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emrrg_cli.errors import RunError
from emrrg_cli.files import atomic_directory, atomic_write_text, whole_directory, writing


@dataclass
class Progress:
    """Where a training run stands.

    `step` counts optimizer steps; `epoch` and `step_in_epoch` name the next one. With `validation_due` the model as it
    is has yet to be validated.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: list[float] | None = None  # score, negative loss
    best_step: int | None = None
    validations_without_gain: int = 0
    validation_due: bool = False


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters by name, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def rng_state() -> dict[str, Any]:
    """The state of every random number generator that training draws from, of this process."""
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
    """Puts back what `rng_state` returned."""
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
) -> Path:
    """Writes `directory/step-<n>`, points `directory/last` at it, then removes the one before.

    Args:
        rng_states: one a process, in rank order.

    Raises:
        RunError: when it cannot be written; the one before is as it was.
    """
    target = _place(directory, progress)
    with writing(target), atomic_directory(target) as temporary:
        save_file(trainable_state(model), temporary / "trainable.safetensors")
        state = {
            "optimizer": optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": rng_states,
        }
        torch.save(state, temporary / "state.pt")
        (temporary / "progress.json").write_text(_as_json(progress))
    atomic_write_text(directory / "last", target.name + "\n")
    for other in directory.glob("step-*"):
        if other.name != target.name:
            shutil.rmtree(other, ignore_errors=True)
    return target


def save_progress(directory: Path, progress: Progress) -> None:
    """Brings the checkpoint of `progress.step` up to date after its validation."""
    atomic_write_text(_place(directory, progress) / "progress.json", _as_json(progress))


def _place(directory: Path, progress: Progress) -> Path:
    return directory / f"step-{progress.step:08d}"


def _as_json(progress: Progress) -> str:
    return json.dumps(asdict(progress), indent=2) + "\n"


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    pointer = directory / "last"
    if not pointer.is_file():
        return None
    target = whole_directory(directory / pointer.read_text().strip())
    return target if (target / "state.pt").is_file() else None


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, rank: int
) -> Progress:
    """Puts a checkpoint back into model, optimizer, gradient scaler and random number generators.

    Raises:
        RunError: when it cannot be read, or its trainable parameters are not those of the model.
    """
    try:
        tensors = load_file(checkpoint / "trainable.safetensors")
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
    except Exception as error:  # each of the formats has its own errors
        raise RunError(
            f"{checkpoint}: this checkpoint cannot be read: {next(iter(str(error).splitlines()), '')}"
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
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    if rank < len(state["rng"]):
        set_rng_state(state["rng"][rank])
    return progress
