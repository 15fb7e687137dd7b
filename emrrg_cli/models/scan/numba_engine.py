"""The recurrence of the scan, compiled by numba for the CPU: its state fits into the cache, and it uses all threads.

numba is an optional dependency (the extra `fast`). Values and gradients equal those of the reference (tested).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emrrg_cli.console import err
from emrrg_cli.models.scan.recompute import selective_scan_recompute

# Number of tokens whose states the backward pass computes at a time; the state before each chunk is kept.
_CHUNK = 16


def why_not() -> str:
    """Returns `ok`, or the reason why numba cannot be used on this computer."""
    try:
        import numba  # noqa: F401
    except ImportError as error:  # not installed, or not compatible with this numpy
        return f"numba cannot be imported ({error}); it comes with the extra emrrg[fast]"
    return "ok"


def selective_scan_numba(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """Computes `reference.selective_scan_loop` with compiled code, on as many threads as torch uses.

    On other devices than the CPU, in fp64 and under `torch.compile`, it calls `recompute.selective_scan_recompute`.

    Args:
        u: `[b, K, l, d]`; dt: `[b, K, l, d]` before bias and softplus; dt_bias: `[K, d]`; A_log: `[K, d, n]`;
        B, C: `[b, K, l, n]`; D: `[K, d]`.

    Returns:
        `[b, K, l, d]` in fp32 (fp64 for fp64 inputs).
    """
    if u.device.type != "cpu" or u.dtype == torch.float64 or torch.compiler.is_compiling():
        return selective_scan_recompute(u, dt, dt_bias, A_log, B, C, D)
    with torch.autocast("cpu", enabled=False):
        A = -torch.exp(A_log.float()).transpose(1, 2)
        inputs = [tensor.float().contiguous() for tensor in (u, dt, dt_bias, A, B, C, D)]
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        y: Tensor = _Recurrence.apply(*inputs, _CHUNK if differentiable else u.shape[2])  # type: ignore[no-untyped-call]
        return y


class _Recurrence(torch.autograd.Function):
    """`u`, `dt`: `[b, K, l, d]`; `bias`, `D`: `[K, d]`; `A`: `[K, n, d]`; `B`, `C`: `[b, K, l, n]`; contiguous."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int
    ) -> Tensor:
        b, k, length, d = u.shape
        kernels = _kernels()
        y = torch.empty_like(u)
        before = u.new_empty(b, k, -(-length // chunk), A.shape[1], d)
        arrays = [tensor.numpy() for tensor in (u, dt, bias, A, B, C, D, y, before)]
        _each_item(b * k * -(-d // kernels.WIDTH), lambda item: kernels.forward(item, chunk, *arrays))
        ctx.save_for_backward(u, dt, bias, A, B, C, D, before)
        ctx.chunk = chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> Any:
        u, dt, bias, A, B, C, D, before = ctx.saved_tensors
        b, k, length, d = u.shape
        n = A.shape[1]
        kernels = _kernels()
        blocks = -(-d // kernels.WIDTH_BACK)
        gu, gdt, gA = torch.empty_like(u), torch.empty_like(dt), A.new_empty(b, k, n, d)
        gB, gC = (B.new_empty(blocks, b, k, length, n) for _ in range(2))
        gbias, gD = (D.new_empty(b, k, d) for _ in range(2))
        tensors = (u, dt, bias, A, B, C, D, before, gy.contiguous(), gu, gdt, gbias, gA, gB, gC, gD)
        arrays = [tensor.numpy() for tensor in tensors]
        _each_item(b * k * blocks, lambda item: kernels.backward(item, ctx.chunk, *arrays))
        return gu, gdt, gbias.sum(0), gA.sum(0), gB.sum(0), gC.sum(0), gD.sum(0), None


def _each_item(items: int, work: Callable[[int], None]) -> None:
    # Our own threads: those of numba fail after the fork of a data loader and with two callers at the same time.
    threads = min(torch.get_num_threads(), items)
    left = iter(range(items))  # each thread takes the next

    def take() -> None:
        for item in left:
            work(item)

    others = [_pool(threads, os.getpid()).submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)  # a forked process does not have the threads of its parent, so it gets its own


@cache
def _kernels() -> Any:
    notice = threading.Timer(2.0, partial(err.print, "compiling the scan for this processor"))
    notice.daemon = True
    notice.start()
    try:
        from emrrg_cli.models.scan import numba_kernels
    finally:
        notice.cancel()
    return numba_kernels
