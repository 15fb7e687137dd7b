"""What the compiled loop has of its own: blocks of channels, threads, its exponential, and where it steps aside."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from emrrg_cli.models.scan import numba_engine
from emrrg_cli.models.scan.numba_engine import selective_scan_numba
from emrrg_cli.models.scan.recompute import selective_scan_recompute
from emrrg_cli.models.scan.reference import selective_scan_loop

if numba_engine.why_not() != "ok":
    pytest.skip("numba is not installed", allow_module_level=True)

from emrrg_cli.models.scan import numba_kernels

WIDTH, WIDTH_BACK, CHUNK = numba_kernels.WIDTH, numba_kernels.WIDTH_BACK, numba_engine._CHUNK
NAMES = ("u", "dt", "dt_bias", "A_log", "B", "C", "D")


def _inputs(b: int, k: int, length: int, d: int, n: int, seed: int = 0) -> list[Tensor]:
    """In fp32, laid out as the mixer leaves them: `u` with tokens last, `B` and `C` cut out of a wider tensor."""
    torch.manual_seed(seed)
    u = torch.randn(b, k, d, length).transpose(2, 3)
    projected = torch.randn(b, k, length, 3 + 2 * n)
    A_log = torch.log(torch.arange(1.0, n + 1)).expand(k, d, n)
    tensors = [u, torch.randn(b, k, length, d) - 2, torch.randn(k, d), A_log + 0.3 * torch.randn(k, d, n)]
    tensors += [projected[..., 3 : 3 + n], projected[..., 3 + n :], torch.randn(k, d)]
    return [tensor.requires_grad_() for tensor in tensors]


def _gradients(recurrence: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    value = recurrence(*inputs)
    weight = torch.linspace(-9, 9, value.numel(), dtype=torch.float64).view_as(value).sin().to(value.dtype)
    wanted = {name: tensor for name, tensor in zip(NAMES, inputs, strict=True) if tensor.requires_grad}
    gradients = torch.autograd.grad((value * weight).sum(), list(wanted.values()))
    return {"value": value.detach(), **dict(zip(wanted, gradients, strict=True))}


def _in_fp64(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]


def _assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert ours.keys() == exact.keys()
    for name, tensor in exact.items():
        error = float((ours[name].double() - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        assert error < relative, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (3, 4, 5, WIDTH_BACK - 1, 3),
        (1, 4, CHUNK, WIDTH_BACK + 1, 16),
        (2, 1, CHUNK + 1, WIDTH, 8),
        (1, 2, 2 * CHUNK + 3, WIDTH + WIDTH_BACK + 5, 16),
        (1, 1, 197, 48, 16),
        (1, 1, 3, 2 * WIDTH + 16, 32),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_reference_in_fp64(shape: tuple[int, int, int, int, int]) -> None:
    inputs = _inputs(*shape)
    assert shape[2] == 1 or not inputs[0].is_contiguous()
    _assert_close(_gradients(selective_scan_numba, inputs), _gradients(selective_scan_loop, _in_fp64(inputs)))


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4, 5), (6,)], ids=str)
def test_gradients_for_some_inputs_only(wanted: tuple[int, ...]) -> None:
    inputs = _inputs(2, 4, CHUNK + 3, 7, 8)
    whole = _gradients(selective_scan_numba, inputs)
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index in wanted)
    some = _gradients(selective_scan_numba, inputs)
    assert list(some) == ["value", *(NAMES[index] for index in wanted)]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in some.items())


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, found = _inputs(3, 4, CHUNK + 2, WIDTH + 9, 8), []
    for threads in (1, 2, 5):  # of this engine alone: those of torch change the last bit of its softplus
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(_gradients(selective_scan_numba, inputs))
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def test_without_gradients_fewer_states_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, chunks = _inputs(1, 4, 2 * CHUNK + 1, 9, 8), []
    expected = selective_scan_numba(*inputs).detach()
    kernel = numba_kernels.forward
    monkeypatch.setattr(
        numba_kernels, "forward", lambda item, chunk, *arrays: (chunks.append(chunk), kernel(item, chunk, *arrays))
    )
    with torch.no_grad():
        assert torch.equal(selective_scan_numba(*inputs), expected)
    with torch.inference_mode():
        assert torch.equal(selective_scan_numba(*inputs), expected)
    assert set(chunks) == {2 * CHUNK + 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinity_and_nan_keep_their_place(value: float) -> None:
    inputs = _inputs(1, 2, 2 * CHUNK, 12, 8)
    with torch.no_grad():
        inputs[0][0, 1, CHUNK + 2, 5] = value
        inputs[1][0, 0, 3, 7] = float("nan")
    ours, exact = selective_scan_numba(*inputs), selective_scan_loop(*inputs)
    assert torch.equal(ours.isfinite(), exact.isfinite())
    assert not exact.isfinite().all()


def test_the_exponential() -> None:
    x = -np.concatenate([np.linspace(0, 90, 20001), [1e-30, 1e4, 1e30]]).astype(np.float32)
    ours = np.array([numba_kernels._exp(one) for one in x], dtype=np.float64)
    exact = np.exp(x.astype(np.float64))
    shown = x >= -87
    assert np.abs(ours[shown] / exact[shown] - 1).max() < 2e-7
    assert not ours[~shown].any()
    assert np.isnan(numba_kernels._exp(np.float32(np.nan)))
    assert numba_kernels._exp(np.float32(-np.inf)) == 0


def test_fp64_is_left_to_recompute() -> None:
    inputs = _in_fp64(_inputs(1, 2, 5, 4, 3))
    ours, theirs = _gradients(selective_scan_numba, inputs), _gradients(selective_scan_recompute, inputs)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def _done(results: multiprocessing.SimpleQueue[list[int]]) -> None:
    done: list[int] = []
    numba_engine._each_item(9, done.append)
    results.put(sorted(done))


def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    _done(results)  # leaves threads behind, which no fork has
    child = fork.Process(target=_done, args=(results,))
    child.start()
    child.join(30)
    hung = child.is_alive()
    child.kill()
    assert not hung
    assert [results.get(), results.get()] == [list(range(9))] * 2


def test_without_a_writable_directory_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_now = numba_kernels.njit

    def njit(*arguments: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'twice': no locator available")
        return compile_now(*arguments, **options)

    monkeypatch.setattr(numba_kernels, "njit", njit)

    def twice(values: np.ndarray) -> None:
        for i in range(len(values)):
            values[i] *= np.float32(2)

    values = np.ones(3, np.float32)
    numba_kernels._compiled(numba_kernels.float32[::1])(twice)(values)
    assert values.tolist() == [2, 2, 2]


def test_a_broken_numba_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert "numba cannot be imported" in numba_engine.why_not()
    assert "emrrg[fast]" in numba_engine.why_not()
