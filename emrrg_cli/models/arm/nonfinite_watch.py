"""Finds the block, the part and the scan direction of an encoder where the first values that are not finite arise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emrrg_cli.errors import RunError
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.arm.mixer import Block, Mixer
from emrrg_cli.models.scan import get_scan

_DIRECTIONS = {1: ("cluster order",), 4: ("row", "row reversed", "column", "column reversed")}
_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_ADVICE = "Lower train.lr or train.clip_norm, and look at the data and the weights that the run starts from."


@contextmanager
def watch(model: nn.Module) -> Iterator[None]:
    """Ends the run with an error if a block of an encoder gives infinity or NaN inside the context.

    Each forward pass checks the input of each block and the outputs of its norms, mixer and MLP. Each check waits for
    the device. The hooks are removed at the end.

    Args:
        model: An `ArmEncoder`, with or without adapters, or a model that contains one or more.

    Raises:
        RunError: In the forward pass. The message names the block (`layers.i`, counted from 0), the part, for the mixer
            the direction (counted from 0, as in `mixer.directions`), the number of values, the dtype, and what to do.
    """
    handles: list[RemovableHandle] = []
    try:
        for encoder in (module for module in model.modules() if isinstance(module, ArmEncoder)):
            for number, block in enumerate(encoder.layers):
                assert isinstance(block, Block)
                handles += _watch_block(block, f"layers.{number}")
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_block(block: Block, name: str) -> list[RemovableHandle]:
    def entered(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not _finite(inputs[0]):
            before = "the images or the patch embedding" if name == "layers.0" else "the sum of the blocks before it"
            raise RunError(
                f"encoder block {name}: its input is already not finite: {_count(inputs[0])}",
                hint=f"It comes from {before}. {_ADVICE}",
            )

    def left(part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not _finite(output):
            place = next(child for child, module in block.named_children() if module is part)
            if isinstance(part, Mixer):
                place += f", {_part_of_mixer(part, *inputs)}"
            raise _error(f"{name}, {place}", part, inputs, output)

    parts = (block.norm1, block.mixer, block.norm2, block.mlp)
    return [block.register_forward_pre_hook(entered), *(part.register_forward_hook(left) for part in parts)]


@torch.no_grad()
def _part_of_mixer(mixer: Mixer, x: Tensor, order: Tensor) -> str:
    """Returns the first part of the mixer whose output is not finite, in the dtype of the forward pass."""
    tokens, gate = mixer.X(x), mixer.Z(x)
    for name, projected in (("X", tokens), ("Z", gate)):
        if not _finite(projected):
            return f"projection {name}"
    weights = mixer.weights_by_direction()
    names = _DIRECTIONS.get(len(order), ("",) * len(order))
    broken = []
    for k, name in enumerate(names):
        one = slice(k, k + 1)
        if not _finite(get_scan(mixer.engine)(tokens, gate, order[one], *(weight[one] for weight in weights))):
            broken.append(f"{k} ({name})" if name else str(k))
    if not broken:
        return "out_proj"
    return f"direction{'s' if len(broken) > 1 else ''} {', '.join(broken)}"


def _error(place: str, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> RunError:
    broken = [name for name, weight in part.named_parameters() if not _finite(weight)]
    if broken:
        hint = (
            f"Weights of this part are not finite ({', '.join(broken[:3])}): "
            "an earlier step made them so, or the file that they were loaded from has such values."
        )
    elif output.dtype not in (torch.float16, torch.bfloat16):
        hint = _ADVICE
    elif _finite_in_fp32(part, inputs):
        precision = "fp32, or bf16, which has the same range" if output.dtype == torch.float16 else "fp32"
        hint = f"In fp32, the output for the same input is finite: train with train.precision={precision}."
    else:
        hint = f"In fp32, the output for the same input is not finite either. {_ADVICE}"
    return RunError(f"encoder block {place}: the output is not finite: {_count(output)}", hint=hint)


@torch.no_grad()
def _finite_in_fp32(part: nn.Module, inputs: tuple[Any, ...]) -> bool:
    # Not through __call__, which would run the hooks of the part. Its weights may have half precision.
    in_fp32 = copy.deepcopy(part).float()
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _finite(in_fp32.forward(*(t.float() if t.is_floating_point() else t for t in inputs)))


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _count(tensor: Tensor) -> str:
    infinite, nan = int(tensor.isinf().sum()), int(tensor.isnan().sum())
    dtype = _SHORT.get(tensor.dtype, str(tensor.dtype))
    return f"{infinite:,} infinite and {nan:,} NaN of {tensor.numel():,} values, {dtype}"
