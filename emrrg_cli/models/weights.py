"""Safetensors files into modules, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from emrrg_cli.errors import RunError


def load_weights(module: nn.Module, file: Path) -> None:
    """Fills a module from a safetensors file, every tensor of both accounted for.

    Raises:
        RunError: for a missing or unreadable file, or a missing, unknown or misshapen tensor, which it names.
    """
    module.load_state_dict(fitting_tensors(module.state_dict(), file))


def fitting_tensors(own: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after making sure that they are those of `own` by name and shape.

    Raises:
        RunError: as `load_weights`.
    """
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # safetensors raises its own error types, which it does not export in one place
        raise RunError(f"{file}: not a readable safetensors file: {error}") from error
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the model has {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RunError(f"{file}: the weights do not fit the model of the recipe: {problems[0]}{more}")
    return tensors
