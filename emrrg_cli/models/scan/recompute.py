"""The scan loop with an explicit backward pass, which computes the states again instead of keeping them.

Autograd through the reference loop keeps several `[b, K, d, n]` tensors per token. This loop keeps one for every few
tokens and computes the others again. Values and gradients equal those of the reference (tested).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emrrg_cli.models.scan.reference import full_precision

# Number of tokens whose states are computed at a time: a larger number is faster, a smaller one needs less memory.
_CHUNK = 16


class _Recurrence(torch.autograd.Function):
    """`h_t = exp(dt_t A) h_(t-1) + du_t B_t`, `y_t = C_t h_t`, tokens first.

    `dt`, `du`: `[l, b, K, d]`; `A`: `[K, d, n]`; `B`, `C`: `[l, b, K, n]`; all contiguous, of one dtype, fp32 or fp64.
    Returns `y` `[l, b, K, d]`. Only the state before each chunk is kept.
    """

    @staticmethod
    def forward(ctx: Any, dt: Tensor, du: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
        h = dt.new_zeros(*dt.shape[1:], A.shape[-1])  # [b, K, d, n]
        before = []
        y = torch.empty_like(du)
        for at in _chunks(dt.shape[0], chunk):
            before.append(h)
            _, states = _states(dt[at], du[at], A, B[at], h)
            torch.matmul(states, C[at].unsqueeze(-1), out=y[at].unsqueeze(-1))
            h = states[-1].clone()  # a view would keep the whole chunk
        ctx.save_for_backward(dt, du, A, B, C, *before)
        ctx.chunk = chunk
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        dt, du, A, B, C, *before = ctx.saved_tensors
        gy = gy.contiguous()
        gdt, gdu, gB, gC = (torch.empty_like(tensor) for tensor in (dt, du, B, C))
        gA = torch.zeros_like(A)
        carry: Tensor | None = None  # gradient of the state before the following chunk
        for at, h in reversed(list(zip(_chunks(dt.shape[0], ctx.chunk), before, strict=True))):
            decay, states = _states(dt[at], du[at], A, B[at], h)
            gh = gy[at].unsqueeze(-1) * C[at].unsqueeze(-2)  # becomes the gradient of each state
            if carry is not None:
                gh[-1] += carry
            gradients, factors = gh.unbind(), decay.unbind()
            for t in range(len(gh) - 2, -1, -1):
                gradients[t].addcmul_(gradients[t + 1], factors[t + 1])
            torch.matmul(gy[at].unsqueeze(-2), states, out=gC[at].unsqueeze(-2))
            torch.matmul(du[at].unsqueeze(-2), gh, out=gB[at].unsqueeze(-2))
            torch.matmul(gh, B[at].unsqueeze(-1), out=gdu[at].unsqueeze(-1))
            flow = gh.mul_(decay)  # gradient that each state passes to the state before it
            carry = flow[0].clone()
            flow[1:] *= states[:-1]
            flow[0] *= h  # now the gradient of dt_t A
            torch.sum(flow * A, dim=-1, out=gdt[at])
            gA += (flow * dt[at].unsqueeze(-1)).sum((0, 1))
        return gdt, gdu, gA, gB, gC, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _states(dt: Tensor, du: Tensor, A: Tensor, B: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    # decay and state of each token of a chunk, [c, b, K, d, n]
    decay = (dt.unsqueeze(-1) * A).exp_()
    states = du.unsqueeze(-1) * B.unsqueeze(-2)
    for state, factor in zip(states.unbind(), decay.unbind(), strict=True):
        before = state.addcmul_(factor, before)
    return decay, states


def selective_scan_recompute(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """Computes `reference.selective_scan_loop` with little more memory than its inputs.

    Args:
        u: `[b, K, l, d]`; dt: `[b, K, l, d]` before bias and softplus; dt_bias: `[K, d]`; A_log: `[K, d, n]`;
        B, C: `[b, K, l, n]`; D: `[K, d]`.

    Returns:
        `[b, K, l, d]` in fp32 (fp64 for fp64 inputs).
    """
    with torch.autocast(u.device.type, enabled=False):
        u, dt, A, B, C, D = full_precision(u, dt, dt_bias, A_log, B, C, D)
        first = [tensor.permute(2, 0, 1, 3).contiguous() for tensor in (dt, dt * u, B, C)]
        y: Tensor = _Recurrence.apply(first[0], first[1], A, first[2], first[3], _CHUNK)  # type: ignore[no-untyped-call]
        return y.permute(1, 2, 0, 3) + D[:, None] * u
