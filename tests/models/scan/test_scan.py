"""The engines of the selective scan: equal values and gradients, fp32 state, and how one is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emrrg_cli.errors import UsageError
from emrrg_cli.models.scan import available_engines, choose_engine, get_scan, numba_engine
from emrrg_cli.models.scan import recompute as recompute_module
from emrrg_cli.models.scan.numba_engine import selective_scan_numba
from emrrg_cli.models.scan.recompute import selective_scan_recompute
from emrrg_cli.models.scan.reference import selective_scan_loop

Recurrence = Callable[..., Tensor]
_WITH_NUMBA = pytest.mark.skipif(numba_engine.why_not() != "ok", reason="numba is not installed")
RECURRENCES = [
    pytest.param(selective_scan_loop, id="reference"),
    pytest.param(selective_scan_recompute, id="recompute"),
    pytest.param(selective_scan_numba, id="numba", marks=_WITH_NUMBA),
]
ENGINES = ["reference", "recompute", pytest.param("numba", marks=_WITH_NUMBA)]
CHUNK = recompute_module._CHUNK

# b, K, l, d, n: odd batches, lengths 1 and around the chunk, both state sizes, one and four directions.
SHAPES = [
    (1, 4, 1, 5, 16),
    (3, 1, 1, 4, 8),
    (2, 4, 2, 3, 16),
    (3, 4, 7, 6, 8),
    (1, 1, CHUNK - 1, 7, 16),
    (5, 4, CHUNK, 3, 16),
    (3, 4, CHUNK + 1, 5, 8),
    (1, 4, 2 * CHUNK - 1, 2, 16),
    (2, 1, 2 * CHUNK, 9, 16),
    (3, 4, 2 * CHUNK + 1, 4, 16),
    (1, 4, 3 * CHUNK + 5, 6, 8),
]


def _full_inputs(b: int, k: int, length: int, d: int, n: int, dtype: torch.dtype, rank: int = 2) -> list[Tensor]:
    """Arguments of an engine in order, all leaves that want a gradient but `order`."""
    generator = torch.Generator().manual_seed(hash((b, k, length, d, n)) % 2**31)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(k)])
    return [
        normal(b, length, d),
        normal(b, length, d),
        order,
        normal(k, d, 4),
        normal(k, d),
        normal(k, rank + 2 * n, d),
        normal(k, d, rank),
        normal(k, d),
        normal(k, d, n, scale=0.5),
        normal(k, d),
    ]


def _gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value, then the gradient of every input, of one and the same scalar."""
    value = function(*inputs)
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value).sin().to(value.dtype)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), wanted)]


def _assert_close(ours: list[Tensor], theirs: list[Tensor], relative: float) -> None:
    assert len(ours) == len(theirs)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        scale = other.abs().max().clamp(min=1e-30)
        error = float((one - other).abs().max() / scale)
        assert error <= relative, f"tensor {index}: relative error {error:.2e}"


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_engines_equal_the_reference(
    engine: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, relative: float
) -> None:
    inputs = _full_inputs(*shape, dtype=dtype)
    expected = _gradients(get_scan("reference"), inputs)
    assert len(expected) == 10  # the value and nine gradients
    still = {8} if shape[2] == 1 else set()  # A has no part in a sequence of one token
    assert {index for index, tensor in enumerate(expected) if not tensor.any()} == still
    _assert_close(_gradients(get_scan(engine), inputs), expected, relative)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_recompute_does_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _full_inputs(2, 4, 11, 3, 8, dtype=torch.float64)
    expected = _gradients(get_scan("reference"), inputs)
    monkeypatch.setattr(recompute_module, "_CHUNK", chunk)
    _assert_close(_gradients(get_scan("recompute"), inputs), expected, 1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradcheck(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute_module, "_CHUNK", 2)
    inputs = _full_inputs(1, 2, 5, 2, 2, dtype=torch.float64, rank=1)
    assert torch.autograd.gradcheck(get_scan(engine), inputs, fast_mode=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_direction_by_hand(engine: str) -> None:
    """Two tokens, width and state 1, every factor written out."""
    x = torch.tensor([[[0.7], [-1.3]]])
    z = torch.tensor([[[0.4], [2.0]]])
    conv_weight, conv_bias = torch.tensor([[[0.0, 0.5, -0.25, 2.0]]]), torch.tensor([[0.1]])
    projection = torch.tensor([[[0.3], [1.5], [-0.8]]])  # rows for dt, B, C
    dt_weight, dt_bias = torch.tensor([[[0.6]]]), torch.tensor([[-1.0]])
    A_log, D = torch.tensor([[[0.2]]]), torch.tensor([[0.9]])
    order = torch.tensor([[1, 0]])  # the second token first

    def silu(v: float) -> float:
        return v / (1 + math.exp(-v))

    first = silu(2.0 * -1.3 + 0.1)
    second = silu(2.0 * 0.7 - 0.25 * -1.3 + 0.1)
    h, out = 0.0, {}
    for token, u in ((1, first), (0, second)):
        dt = math.log1p(math.exp(0.6 * 0.3 * u - 1.0))
        h = math.exp(-dt * math.exp(0.2)) * h + dt * 1.5 * u * u
        out[token] = -0.8 * u * h + 0.9 * u
    expected = torch.tensor([[[out[0] * silu(0.4)], [out[1] * silu(2.0)]]])
    ours = get_scan(engine)(x, z, order, conv_weight, conv_bias, projection, dt_weight, dt_bias, A_log, D)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_directions_are_averaged(engine: str) -> None:
    """Four equal directions give what one gives."""
    inputs = _full_inputs(2, 1, 6, 4, 8, dtype=torch.float64)
    four = [tensor if index < 2 else tensor.repeat(4, *[1] * (tensor.dim() - 1)) for index, tensor in enumerate(inputs)]
    torch.testing.assert_close(get_scan(engine)(*four), get_scan(engine)(*inputs))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_order_is_undone_by_its_inverse(engine: str) -> None:
    """Any order at all; the encoder's own four are their own inverses and would not show the difference."""
    x, z, order, *rest = _full_inputs(2, 1, 7, 4, 8, dtype=torch.float64)
    assert not torch.equal(order, order.argsort(dim=1))
    expected = torch.empty_like(x)
    expected[:, order[0]] = get_scan(engine)(x[:, order[0]], z[:, order[0]], torch.arange(7)[None], *rest)
    torch.testing.assert_close(get_scan(engine)(x, z, order, *rest), expected)


def _recurrence_inputs(b: int, k: int, length: int, d: int, n: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(b, k, length, d),
        torch.randn(b, k, length, d),
        torch.randn(k, d),
        torch.randn(k, d, n) * 0.3 - 4,  # slow decay: the state adds up over the whole sequence
        torch.randn(b, k, length, n),
        torch.randn(b, k, length, n),
        torch.randn(k, d),
    ]


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_inputs_keep_an_fp32_state(recurrence: Recurrence, autocast: bool) -> None:
    u, dt, dt_bias, A_log, B, C, D = _recurrence_inputs(2, 4, 3 * CHUNK + 1, 5, 16)
    u, dt, B, C = (tensor.bfloat16() for tensor in (u, dt, B, C))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = recurrence(u, dt, dt_bias, A_log, B, C, D)
    assert ours.dtype == torch.float32
    expected = recurrence(u.float(), dt.float(), dt_bias, A_log, B.float(), C.float(), D)
    assert torch.equal(ours, expected)
    exact = selective_scan_loop(*(tensor.double() for tensor in (u, dt, dt_bias, A_log, B, C, D)))
    # fp32 rounding only; a bf16 state would be off by 1e-2.
    assert float((ours - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_tokens(engine: str, dtype: torch.dtype) -> None:
    inputs = _full_inputs(2, 4, 5, 4, 8, dtype=dtype)
    out = get_scan(engine)(*inputs).detach()
    assert out.dtype == dtype
    assert out.shape == (2, 5, 4)
    exact = get_scan("reference")(*(t.detach().double() if t.is_floating_point() else t for t in inputs))
    relative = {torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    assert float((out.double() - exact).abs().max() / exact.abs().max()) < relative


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_large_steps_and_fast_decay_stay_finite(recurrence: Recurrence) -> None:
    torch.manual_seed(0)
    b, k, length, d, n = 2, 4, 2 * CHUNK + 3, 3, 16
    A_log = torch.linspace(-6, math.log(1e3), n).expand(k, d, n).clone()
    inputs = [
        torch.randn(b, k, length, d),
        torch.full((b, k, length, d), 50.0),
        torch.zeros(k, d),
        A_log,
        torch.randn(b, k, length, n),
        torch.randn(b, k, length, n),
        torch.randn(k, d),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    assert all(torch.isfinite(tensor).all() for tensor in _gradients(recurrence, inputs))

    # Where the decay is nothing, a token sees itself alone.
    inputs[3] = torch.full((k, d, n), math.log(1e3))
    u, dt, _, _, B, C, D = inputs
    expected = (B * C).sum(-1, keepdim=True) * F.softplus(dt) * u + D[:, None] * u
    torch.testing.assert_close(recurrence(*inputs), expected, rtol=1e-4, atol=1e-3)


def test_recompute_keeps_little() -> None:
    """What stays in memory for the backward pass: a fraction of what autograd keeps of the loop."""
    inputs = [tensor.requires_grad_() for tensor in _recurrence_inputs(1, 4, 8 * CHUNK, 32, 16)]

    def kept(recurrence: Recurrence) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = recurrence(*inputs)
        out.sum().backward()
        return sum(sizes.values())

    assert kept(selective_scan_recompute) * 4 < kept(selective_scan_loop)


def test_choosing_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMRRG_SCAN", raising=False)
    assert set(available_engines()) >= {"reference", "recompute"}
    fastest = "numba" if available_engines()["numba"] == "ok" else "recompute"
    assert choose_engine() == choose_engine("auto", "cpu") == fastest
    assert choose_engine("reference") == "reference"
    monkeypatch.setenv("EMRRG_SCAN", "reference")
    assert choose_engine() == "reference"
    assert choose_engine("recompute") == "recompute"  # a recipe that names one is stronger
    for nothing in ("", "auto"):
        monkeypatch.setenv("EMRRG_SCAN", nothing)
        assert choose_engine() == fastest


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMRRG_SCAN", raising=False)
    for installed, chosen in ((("numba", "triton"), ("numba", "triton")), (("reference",), ("recompute", "recompute"))):
        monkeypatch.setattr(
            "emrrg_cli.models.scan._state", lambda name, installed=installed: "ok" if name in installed else "missing"
        )
        assert (choose_engine("auto", "cpu"), choose_engine("auto", "cuda")) == chosen


def test_unknown_engines_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown scan engine 'cuda9000'") as raised:
        choose_engine("cuda9000")
    assert "reference" in str(raised.value)
    monkeypatch.setenv("EMRRG_SCAN", "mistyped")
    with pytest.raises(UsageError, match="mistyped"):
        choose_engine()
    assert choose_engine("reference") == "reference"


def test_an_engine_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emrrg_cli.models.scan._state", lambda name: "the moon is full")
    with pytest.raises(UsageError, match="'recompute' cannot run here: the moon is full"):
        choose_engine("recompute")
