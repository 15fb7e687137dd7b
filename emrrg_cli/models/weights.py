"""Loads safetensors files into modules; every tensor must match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from emrrg_cli.checksums import check_file
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
        RunError: As in `read_tensors`, or all values of a tensor are NaN.
    """
    tensors = read_tensors(file)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and bool(tensor.isnan().all()):
            raise RunError(f"{file}: every value of {name} is NaN", hint="Put the file back from a copy.")
    return tensors


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
