"""The scan loop with its gradient written out: the states are computed again in the backward pass instead of kept.

Autograd through the reference loop keeps several `[b, K, d, n]` tensors a token; this keeps the inputs alone, and its
loops run in place. Values and gradients are those of the reference (tested).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Recurrence(torch.autograd.Function):
    """`h_t = exp(dt_t A) h_(t-1) + du_t B_t`, `y_t = C_t h_t`.

    `dt`, `du`: `[b, K, l, d]`; `A`: `[K, d, n]`; `B`, `C`: `[b, K, l, n]`; all of one dtype, fp32 or fp64.
    """

    @staticmethod
    def forward(ctx: Any, dt: Tensor, du: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(dt, du, A, B, C)
        h = dt.new_zeros(*dt.shape[:2], dt.shape[3], A.shape[-1])
        decay = torch.empty_like(h)
        y = torch.empty_like(du)
        for t in range(dt.shape[2]):
            torch.mul(dt[:, :, t, :, None], A, out=decay)
            h.mul_(decay.exp_()).addcmul_(du[:, :, t, :, None], B[:, :, t, None, :])
            y[:, :, t] = (h @ C[:, :, t, :, None]).squeeze(-1)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        dt, du, A, B, C = ctx.saved_tensors
        length = dt.shape[2]
        states = dt.new_empty(length, *dt.shape[:2], dt.shape[3], A.shape[-1])  # [l, b, K, d, n]
        h = torch.zeros_like(states[0])
        decay = torch.empty_like(h)
        for t in range(length):
            torch.mul(dt[:, :, t, :, None], A, out=decay)
            torch.mul(h, decay.exp_(), out=states[t])
            h = states[t].addcmul_(du[:, :, t, :, None], B[:, :, t, None, :])
        gdt, gdu, gB, gC = (torch.empty_like(tensor) for tensor in (dt, du, B, C))
        gA = torch.zeros_like(A)
        gh = torch.zeros_like(h)
        for t in reversed(range(length)):
            gC[:, :, t] = (gy[:, :, t, None, :] @ states[t]).squeeze(-2)
            gh.addcmul_(gy[:, :, t, :, None], C[:, :, t, None, :])  # gradient of h_t
            gdu[:, :, t] = (gh @ B[:, :, t, :, None]).squeeze(-1)
            gB[:, :, t] = (du[:, :, t, None, :] @ gh).squeeze(-2)
            torch.mul(dt[:, :, t, :, None], A, out=decay)
            gh.mul_(decay.exp_())  # now what flows on to h_(t-1)
            if t == 0:
                gdt[:, :, t] = 0  # the state before the first token is zero: its decay acts on nothing
                break
            exponent = gh * states[t - 1]  # gradient of dt_t A, [b, K, d, n]
            gdt[:, :, t] = (exponent * A).sum(-1)
            gA += (exponent * dt[:, :, t, :, None]).sum(0)
        return gdt, gdu, gA, gB, gC


def selective_scan_recompute(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """The same as `reference.selective_scan_loop`, with the memory of its inputs.

    Args:
        u: `[b, K, l, d]`; dt: `[b, K, l, d]` before bias and softplus; dt_bias: `[K, d]`; A_log: `[K, d, n]`;
        B, C: `[b, K, l, n]`; D: `[K, d]`.

    Returns:
        `[b, K, l, d]` in fp32 (fp64 for fp64 inputs).
    """
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        u, dt, B, C = u.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype)
        dt = F.softplus(dt + dt_bias.to(dtype)[:, None])
        A = -torch.exp(A_log.to(dtype))
        y: Tensor = _Recurrence.apply(dt, dt * u, A, B.contiguous(), C.contiguous())  # type: ignore[no-untyped-call]
        return y + D.to(dtype)[:, None] * u
