"""The Triton kernels against the float64 reference, values and every gradient: on a GPU, or interpreted without one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emrrg_cli.models.arm.encoder import direction_orders
from emrrg_cli.models.arm.mixer import Mixer
from emrrg_cli.models.scan import get_scan
from emrrg_cli.models.scan.reference import directional_scan_reference

pytest.importorskip("triton")

from emrrg_cli.models.scan import triton_engine
from emrrg_cli.models.scan.triton_engine import directional_scan_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, not interpreted")

NAMES = ("x", "z", "conv_weight", "conv_bias", "projection", "dt_weight", "dt_bias", "A_log", "D")
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a token takes its time: sections of the backward pass that end after 8 of them, not 40.

    Sizes this small overflow no integer: the interpreter's check of every addition, a third of its time, is left out.
    It prepares the language for a kernel and again for each of our functions inside, which is left out, too.
    """
    if INTERPRETED:
        monkeypatch.setattr(triton_engine, "_EVERY", 8)
        semantic = "triton.language.semantic.TritonSemantic.binary_op_sanitize_overflow_impl"
        monkeypatch.setattr(semantic, lambda *arguments: None, raising=False)
        from triton.runtime.interpreter import InterpretedFunction

        prepare = InterpretedFunction.__call__

        def call(function: Any, *arguments: Any, **named: Any) -> Any:
            ours = function.fn.__module__.startswith("emrrg_cli")
            return function.rewrite()(*arguments, **named) if ours else prepare(function, *arguments, **named)

        monkeypatch.setattr(InterpretedFunction, "__call__", call)


def _inputs(b: int, length: int, d: int, n: int, k: int, rank: int, seed: int) -> tuple[Inputs, Tensor, Tensor]:
    """Arguments by name in fp64, an order of the tokens, and the gradient that comes in."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64) + shift).to(DEVICE)

    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(k)]).to(DEVICE)
    inputs = {
        "x": normal(b, length, d),
        "z": normal(b, length, d),
        "conv_weight": normal(k, d, 4, scale=0.3),
        "conv_bias": normal(k, d, scale=0.1),
        "projection": normal(k, rank + 2 * n, d, scale=d**-0.5),
        "dt_weight": normal(k, d, rank, scale=rank**-0.5),
        "dt_bias": normal(k, d, shift=-3.0),
        "A_log": torch.log(torch.arange(1, n + 1, dtype=torch.float64, device=DEVICE)) + normal(k, d, n, scale=0.1),
        "D": normal(k, d),
    }
    return inputs, order, normal(b, length, d)


def _run(scan: Callable[..., Tensor], inputs: Inputs, order: Tensor, grad: Tensor, dtype: torch.dtype) -> Inputs:
    leaves = {}
    for name, tensor in inputs.items():
        own = dtype if name in ("x", "z") or dtype == torch.float64 else torch.float32
        leaves[name] = tensor.detach().to(own).requires_grad_()
    out = scan(leaves["x"], leaves["z"], order, *(leaves[name] for name in NAMES[2:]))
    out.backward(grad.to(out.dtype))
    found = {name: leaf.grad for name, leaf in leaves.items()} | {"out": out.detach()}
    return {name: tensor.double() for name, tensor in found.items() if tensor is not None}


def _errors(sizes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, float]:
    """Relative error of the result and of every gradient; both sides start from inputs rounded to `dtype`."""
    inputs, order, grad = _inputs(*sizes, seed)
    for name in inputs:
        inputs[name] = inputs[name].to(dtype if name in ("x", "z") else torch.float32).double()
    grad = grad.to(dtype).double()
    truth = _run(directional_scan_reference, inputs, order, grad, torch.float64)
    ours = _run(directional_scan_triton, inputs, order, grad, dtype)
    assert set(ours) == {*NAMES, "out"}
    if sizes[1] == 1:  # A has no part in a sequence of one token
        assert not ours.pop("A_log").any()
        assert not truth.pop("A_log").any()
    return {name: float((ours[name] - truth[name]).norm() / truth[name].norm()) for name in truth}


def _random_sizes(count: int) -> list[tuple[int, ...]]:
    # b, l, d, n, K, r
    choose = random.Random(0)
    return [
        (
            choose.choice([1, 2, 3, 5]),
            choose.choice([1, 3, 17, 64, 100, 145, 197, 257]),
            16 * choose.randint(1, 12),
            choose.choice([8, 16, 32]),
            choose.choice([1, 4]),
            choose.choice([2, 6, 16, 48]),
        )
        for _ in range(count)
    ]


# Interpreted: less than a warp, more than one section, an odd end, more channels than one program has, each n.
FEW = [(1, 1, 16, 8, 1, 1), (1, 13, 48, 8, 1, 3), (2, 9, 16, 16, 2, 3), (2, 3, 16, 32, 4, 2)]
SIZES = FEW if INTERPRETED else [*FEW, *_random_sizes(40)]


@pytest.mark.parametrize(
    "sizes", [*SIZES[:2], *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in SIZES[2:])], ids=str
)
def test_fp32_equals_the_reference(sizes: tuple[int, ...]) -> None:
    errors = _errors(sizes, torch.float32)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a launch is only kept where it is compiled")
def test_a_cached_launch_is_not_used_for_another() -> None:
    # The same tokens and states; what Triton compiles differently for (a multiple of 16, or 1) changes.
    for directions, rank in ((4, 16), (1, 16), (4, 12), (4, 1), (4, 16)):
        errors = _errors((16, 17, 32, 16, directions, rank), torch.float32)
        assert max(errors.values()) < 1e-5, (directions, rank, errors)


# The interpreter stands on numpy, which has no bf16.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 9, 16, 8, 2, 3)] if INTERPRETED else SIZES[1:], ids=str)
def test_half_precision_is_near_the_reference(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    errors = _errors(sizes, dtype)
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 2, 3, 400])
def test_parts_of_a_batch_equal_the_whole_batch(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_engine, "_FORWARD_PART", 1)
    monkeypatch.setattr(triton_engine, "_programs", lambda device: programs)
    # One or two studies a part, or all of them; a program takes several studies and directions, or one.
    monkeypatch.setattr(triton_engine, "_BACKWARD_PART", 2 * programs * 32 * 2)
    assert triton_engine._parts(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    errors = _errors((3, 2, 16, 8, 2, 2), torch.float32)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_sums_in_a_fixed_order() -> None:
    inputs, order, grad = _inputs(2, 3, 48, 8, 1, 3, seed=1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (_run(directional_scan_triton, inputs, order, grad, torch.float32) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    truth = _run(directional_scan_reference, inputs, order, grad, torch.float64)
    for name in truth:
        assert torch.equal(first[name], second[name])
        assert float((first[name] - truth[name]).norm() / truth[name].norm()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 7, 16, 16, 1, 2)], ids=str)
def test_large_steps_and_fast_decay_stay_finite(sizes: tuple[int, ...]) -> None:
    inputs, order, grad = _inputs(*sizes, seed=2)
    inputs["dt_bias"] = torch.full_like(inputs["dt_bias"], 50.0)
    inputs["A_log"] = torch.full_like(inputs["A_log"], 6.9)  # A = -1e3
    for dtype in (torch.float32, torch.float16 if INTERPRETED else torch.bfloat16):
        for name, tensor in _run(directional_scan_triton, inputs, order, grad, dtype).items():
            assert tensor.isfinite().all(), (dtype, name)


@pytest.mark.slow
def test_frozen_parameters_get_no_gradient_and_inputs_get_theirs() -> None:
    inputs, order, grad = _inputs(2, 3, 16, 8, 2, 2, seed=3)
    x, z = (inputs[name].float().requires_grad_() for name in ("x", "z"))
    rest = [inputs[name].float() for name in NAMES[2:]]
    directional_scan_triton(x, z, order, *rest).backward(grad.float())
    truth = _run(directional_scan_reference, inputs, order, grad, torch.float64)
    for name, leaf in (("x", x), ("z", z)):
        assert leaf.grad is not None
        assert float((leaf.grad - truth[name]).norm() / truth[name].norm()) < 1e-5


def test_a_state_size_that_is_no_power_of_two_is_refused() -> None:
    inputs, order, _ = _inputs(1, 3, 16, 12, 1, 2, seed=0)
    with pytest.raises(ValueError, match="power of two, got 12"):
        directional_scan_triton(*(inputs[n].float() for n in ("x", "z")), order, *(inputs[n] for n in NAMES[2:]))


def test_fp64_takes_the_plain_engine() -> None:
    inputs, order, _ = _inputs(1, 3, 16, 8, 4, 2, seed=0)
    arguments = (inputs["x"], inputs["z"], order, *(inputs[name] for name in NAMES[2:]))
    assert torch.allclose(get_scan("triton")(*arguments), directional_scan_reference(*arguments), atol=1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_the_operator_passes_torchs_own_checks(k: int) -> None:
    # Schema, fake kernel and autograd registration, as torch.compile needs them.
    inputs, order, _ = _inputs(1, 3, 16, 8, k, 2, seed=0)
    arguments = [inputs[name].float().requires_grad_() for name in NAMES]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_engine._scan, (*arguments, order, True), test_utils=tests)
    frozen = [argument.detach() for argument in arguments]
    torch.library.opcheck(triton_engine._scan, (*frozen, order, False), test_utils=tests)


def _mixer(**options: Any) -> tuple[Mixer, Tensor, Tensor]:
    torch.manual_seed(0)
    mixer = Mixer(16, 8, scan="triton", **options).to(DEVICE)
    side = 1 if INTERPRETED else 2  # interpreted, each token takes its time
    return mixer, torch.randn(side, side**2 + 1, 16, device=DEVICE), direction_orders(side).to(DEVICE)


@pytest.mark.slow
def test_a_checkpointed_mixer_under_autocast_learns_the_same() -> None:
    mixer, x, order = _mixer()

    def gradients(checkpointed: bool) -> list[Tensor]:
        mixer.zero_grad()
        with torch.autocast(DEVICE, torch.float16 if INTERPRETED else torch.bfloat16):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(mixer, x, order, use_reentrant=False)
            else:
                y = mixer(x, order)
        y.float().square().sum().backward()
        return [parameter.grad.clone() for parameter in mixer.parameters() if parameter.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(list(mixer.parameters()))
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)  # atomic sums differ in their last digits


@pytest.mark.slow
def test_released_weights_follow_what_is_written_to_them() -> None:
    mixer, x, order = _mixer()
    mixer.requires_grad_(False)
    mixer.freeze()
    before = mixer(x, order)
    assert mixer._kept is not None
    mixer.release()
    with torch.no_grad():
        mixer.directions[2].B.weight.mul_(3)
    after = mixer(x, order)
    fresh, _, _ = _mixer()
    fresh.load_state_dict(mixer.state_dict())
    assert torch.equal(after, fresh(x, order))
    assert not torch.equal(before, after)
    assert nn.Module.state_dict(mixer).keys() == fresh.state_dict().keys()


@pytest.mark.slow
def test_a_compiled_mixer_is_the_eager_one() -> None:
    mixer, x, order = _mixer()
    compiled = torch.compile(mixer, backend="aot_eager" if INTERPRETED else "inductor")

    def run(module: Any) -> list[Tensor]:
        mixer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = module(leaf, order)
        y.square().sum().backward()
        assert leaf.grad is not None
        grads = [parameter.grad for parameter in mixer.parameters() if parameter.grad is not None]
        return [y.detach(), leaf.grad, *(grad.clone() for grad in grads)]

    for one, other in zip(run(compiled), run(mixer), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(compiled(x, order), mixer(x, order), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="a graph is captured on a GPU only")
def test_captured_in_a_graph() -> None:
    mixer, x, order = _mixer()
    mixer.requires_grad_(False)
    mixer(x, order)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mixer(x, order)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.allclose(captured, mixer(x, order), rtol=1e-4, atol=1e-5)
