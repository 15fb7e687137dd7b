"""Loads safetensors files into modules; every tensor must match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from emrrg_cli.checksums import check_file
from emrrg_cli.console import printable
from emrrg_cli.errors import RunError
from emrrg_cli.models.foreign_files import check_header


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file by name, whatever their values: a conversion keeps every bit.

    Raises:
        RunError: The file is missing, unreadable or not a regular file, or its header is too large.
    """
    try:
        check_header(file)
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # safetensors raises its own error types, which it does not export in one place
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(f"{file}: not a readable safetensors file: {reason}") from error
    return tensors


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file for a model, by name.

    Raises:
        RunError: As in `read_tensors`, or a value is not finite.
    """
    tensors = read_tensors(file)
    if (name := not_finite(tensors)) is not None:
        hint = "Put the file back from a copy, or use a run whose training succeeded."
        raise RunError(f"{file}: {printable(name)} has values that are not finite", hint=hint)
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with a value that is NaN or infinite, or None."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def load_weights(module: nn.Module, file: Path) -> None:
    """Loads a safetensors file into a module. File and module must have the same tensors.

    Raises:
        RunError: The file cannot be read, or a tensor is missing, unknown or has a wrong shape. The message names it.
    """
    module.load_state_dict(fitting_tensors(module.state_dict(), file))


def fitting_tensors(own: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, after checking that their names and shapes are those of `own`.

    Raises:
        RunError: As in `load_weights`.
    """
    check_file(file)
    tensors = load_tensors(file)
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
