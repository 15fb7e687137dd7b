"""Random published tensors, converted: forward and every gradient equal the literal model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emrrg_cli
from emrrg_cli.models.encoder_files import EncoderConfig
from emrrg_cli.models.published.convert import convert_to_ours
from emrrg_cli.models.published.layout import decoder_pieces, encoder_pieces, to_published

# Of the norm of each tensor. In double precision nothing but the architecture could make a difference.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
# Not trained: fixed in the published model too.
FIXED = ("pos_embed", "dec_pos_embed")


def _error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def _gradients(output: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(output, list(parameters.values())), strict=True))


def _compare(ours: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert ours.keys() == expected.keys()
    errors = {name: _error(ours[name], expected[name]) for name in ours}
    assert max(errors.values()) < TOLERANCE[dtype], max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("engine", ["reference", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("stage", "d", "depth", "n", "grid"),
    [
        ("2", 32, 2, 16, 4),
        ("3", 48, 3, 4, 2),
        ("2", 40, 1, 8, 6),
        pytest.param("emrrg", 16, 4, 4, 4, marks=pytest.mark.slow),
    ],
)
def test_encoder(
    reference: Any,
    make_state: Callable[..., dict[str, Tensor]],
    save_published: Callable[..., Path],
    tmp_path: Path,
    stage: str,
    d: int,
    depth: int,
    n: int,
    grid: int,
    dtype: torch.dtype,
    engine: str,
) -> None:
    state = make_state(stage, d, depth, n, grid, seed=depth)
    convert_to_ours(save_published(state), tmp_path / "out")
    model = emrrg_cli.load_encoder(tmp_path / "out", scan=engine).to(dtype)
    names = [name for name in state if name.startswith("visual_encoder.") and "lora" not in name]
    leaves = {name.removeprefix("visual_encoder."): state[name].to(dtype).requires_grad_() for name in names}
    images = torch.randn(2, 3, 16 * grid, 16 * grid, dtype=dtype)
    weights = torch.randn(2, grid * grid + 1, d, dtype=dtype)

    expected = reference.encoder(leaves, images)
    ours = model(images)
    assert ours.shape == expected.shape
    assert _error(ours.detach(), expected.detach()) < TOLERANCE[dtype]
    gradients = torch.autograd.grad((expected * weights).sum(), list(leaves.values()))
    found = to_published(
        encoder_pieces(EncoderConfig(d, depth, n, 16 * grid)), _gradients((ours * weights).sum(), model)
    )
    _compare(found, dict(zip(leaves, gradients, strict=True)), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("d", "depth", "n", "grid", "width", "taps"),
    [(32, 12, 4, 8, 32, [6, 8, 10, 12]), (48, 4, 16, 8, 128, [1, 2, 3, 4]), (16, 6, 4, 12, 64, [3, 4, 5, 6])],
)
def test_pretrainer(
    reference: Any,
    make_state: Callable[..., dict[str, Tensor]],
    save_published: Callable[..., Path],
    tmp_path: Path,
    d: int,
    depth: int,
    n: int,
    grid: int,
    width: int,
    taps: list[int],
    dtype: torch.dtype,
) -> None:
    from emrrg_cli.models.arm.pretrainer import load_pretrainer

    state = make_state("1", d, depth, n, grid, seed=depth, width=width)
    convert_to_ours(save_published(state), tmp_path / "out")
    model = load_pretrainer(tmp_path / "out").to(dtype)
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in state.items() if name != "mask"}
    images = torch.randn(1 if grid > 8 else 2, 3, 16 * grid, 16 * grid, dtype=dtype)

    loss, prediction = reference.pretrainer(leaves, images, taps)
    ours = model(images)
    assert ours.prediction.shape == prediction.shape == (len(images), grid * grid - 16, 768)
    assert _error(ours.loss.detach(), loss.detach()) < TOLERANCE[torch.float32]  # of fp32 targets at any precision
    assert _error(ours.prediction.detach(), prediction.detach()) < TOLERANCE[dtype]
    weights = torch.randn(prediction.shape, dtype=dtype)
    goals = (
        [loss, ours.loss] if dtype == torch.float32 else [(p * weights).sum() for p in (prediction, ours.prediction)]
    )
    trained = {name: tensor for name, tensor in leaves.items() if name not in FIXED}
    gradients = torch.autograd.grad(goals[0], list(trained.values()))
    config = EncoderConfig(d, depth, n, 16 * grid, directions=1, class_token=False)
    pieces = [piece.prefixed("", "encoder.") for piece in encoder_pieces(config)] + decoder_pieces(config, width, 4)
    pieces = [piece for piece in pieces if not set(piece.published) & set(FIXED)]
    found = to_published(pieces, _gradients(goals[1], model))
    _compare(found, dict(zip(trained, gradients, strict=True)), dtype)
