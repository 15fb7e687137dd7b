"""The guard against values that are not finite: the right block, part and direction, and nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from emrrg_cli.errors import RunError
from emrrg_cli.models.adapters import encoder_lora
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.arm.nonfinite_watch import watch
from emrrg_cli.models.arm.pretrainer import ArmPretrainer

IMAGES = torch.linspace(-2, 2, 3 * 64 * 64).sin().reshape(1, 3, 64, 64).repeat(2, 1, 1, 1)


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _found(model: nn.Module, images: Tensor, context: AbstractContextManager[object] | None = None) -> RunError:
    with pytest.raises(RunError) as raised, context or nullcontext(), watch(model):
        model(images)
    assert _hooks(model) == 0
    return raised.value


def _half(dtype: torch.dtype, autocast: bool) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype) if autocast else nullcontext()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("k", "name"), [(0, "row"), (1, "row reversed"), (2, "column"), (3, "column reversed")], ids=["0", "1", "2", "3"]
)
def test_a_direction_that_overflows_in_fp16_is_named(
    make_encoder: Callable[..., ArmEncoder], k: int, name: str, autocast: bool
) -> None:
    encoder = make_encoder()
    with torch.no_grad():  # up to about 6e5 before the gate: past fp16, nothing to fp32
        encoder.layers[1].mixer.conv_bias[k] = 10
        encoder.layers[1].mixer.D[k] = 6e4
    images = IMAGES
    if not autocast:
        encoder, images = encoder.half(), images.half()
    error = _found(encoder, images, _half(torch.float16, autocast))
    assert error.message.startswith(f"encoder block layers.1, mixer, direction {k} ({name}): the output is not finite")
    assert error.message.endswith("of 1,088 values, fp16")
    assert error.hint is not None
    assert "In fp32, the output for the same input is finite: train with train.precision=fp32, or bf16" in error.hint


@pytest.mark.parametrize("autocast", [True, False])
def test_a_direction_that_overflows_in_bf16_does_so_in_fp32(
    make_encoder: Callable[..., ArmEncoder], autocast: bool
) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[1].mixer.conv_bias[2] = 10
        encoder.layers[1].mixer.D[2] = 3e38
    images = IMAGES
    if not autocast:
        encoder, images = encoder.bfloat16(), images.bfloat16()
    error = _found(encoder, images, _half(torch.bfloat16, autocast))
    assert "layers.1, mixer, direction 2 (column): " in error.message
    assert error.message.endswith("bf16")
    assert error.hint is not None
    assert "In fp32, the output for the same input is not finite either" in error.hint


def test_several_directions_are_named_together(make_encoder: Callable[..., ArmEncoder]) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[2].mixer.directions[0].C.weight.fill_(3e38)
        encoder.layers[2].mixer.directions[3].B.weight.fill_(3e38)
    error = _found(encoder, IMAGES)
    assert "layers.2, mixer, directions 0 (row), 3 (column reversed): " in error.message
    assert error.message.endswith("fp32")
    assert error.hint is not None
    assert "fp32" not in error.hint  # it is fp32 already


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("layers.1.norm1.weight", "layers.1, norm1"),
        ("layers.1.mixer.X.weight", "layers.1, mixer, projection X"),
        ("layers.1.mixer.Z.weight", "layers.1, mixer, projection Z"),
        ("layers.1.mixer.out_proj.weight", "layers.1, mixer, out_proj"),
        ("layers.1.norm2.bias", "layers.1, norm2"),
        ("layers.0.mlp.w3.weight", "layers.0, mlp"),
        ("layers.2.mlp.w1.bias", "layers.2, mlp"),
    ],
)
def test_other_parts_are_distinguished_from_directions(
    make_encoder: Callable[..., ArmEncoder], weight: str, place: str
) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.get_parameter(weight).view(-1)[3] = math.inf
    error = _found(encoder, IMAGES)
    assert error.message.startswith(f"encoder block {place}: the output is not finite: ")
    assert error.hint is not None
    assert f"are not finite ({weight.split('.', 3)[3]})" in error.hint


def test_an_input_that_is_not_finite_is_reported(make_encoder: Callable[..., ArmEncoder]) -> None:
    images = IMAGES.clone()
    images[1, 0, 5, 5] = math.nan  # one patch of one of two images: 32 values
    error = _found(make_encoder(), images)
    assert error.message == (
        "encoder block layers.0: its input is already not finite: 0 infinite and 32 NaN of 1,088 values, fp32"
    )
    assert error.hint is not None
    assert "the images or the patch embedding" in error.hint


def test_the_sum_of_finite_branches_may_overflow(make_encoder: Callable[..., ArmEncoder]) -> None:
    encoder = make_encoder().half()
    with torch.no_grad():
        for part in ("layers.0.mlp.w3.bias", "layers.1.mlp.w3.bias"):
            encoder.get_parameter(part).fill_(6e4)
    error = _found(encoder, IMAGES.half())
    assert error.message.startswith("encoder block layers.2: its input is already not finite")
    assert error.hint is not None
    assert "the sum of the blocks before it" in error.hint


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inside_adapters_and_another_model(make_encoder: Callable[..., ArmEncoder], checkpointing: bool) -> None:
    from peft import get_peft_model

    encoder = make_encoder()
    encoder.gradient_checkpointing = checkpointing
    adapted = get_peft_model(encoder, encoder_lora(["X", "B", "mlp"], rank=2, alpha=2.0))
    with torch.no_grad():
        encoder.layers[1].mixer.directions[2].B.lora_B["default"].weight.fill_(3e38)
    error = _found(nn.Sequential(adapted), IMAGES)
    assert "layers.1, mixer, direction 2 (column): " in error.message


def test_stage_1_has_one_direction() -> None:
    torch.manual_seed(0)
    model = ArmPretrainer(32, 4, image_size=128, d_state=4, decoder_width=32, decoder_depth=2)
    images = torch.randn(1, 3, 128, 128)
    with watch(model):
        assert model(images).loss.isfinite()
    with torch.no_grad():
        model.encoder.layers[2].mixer.A_log[0, 5] = math.nan
    error = _found(model, images)
    assert error.message.startswith("encoder block layers.2, mixer, direction 0 (cluster order): ")
    assert error.hint is not None
    assert "(A_log)" in error.hint


def test_finite_values_pass_unchanged_and_no_hook_is_left(make_encoder: Callable[..., ArmEncoder]) -> None:
    encoder = make_encoder()
    expected = encoder(IMAGES)
    with watch(encoder):
        assert _hooks(encoder) == 3 * 5
        assert torch.equal(encoder(IMAGES), expected)
    assert _hooks(encoder) == 0
