"""The selective scan in plain PyTorch: one loop over tokens for all directions together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def directional_scan_reference(
    x: Tensor,
    z: Tensor,
    order: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    recurrence: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Scans the tokens in `K` orders, returns each result to row order, averages them and applies the gate.

    For each direction, with `u = silu(conv(x))`, `(low, B, C) = projection u`, `dt = softplus(dt_weight low + dt_bias)`
    and `A = -exp(A_log)`: `h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t`, `y_t = C_t h_t + D u_t`. The state, `dt` and `A`
    are always fp32; the result has the dtype of `x`.

    Args:
        x: `[b, l, d]`, the X half of `in_proj`, tokens in row order.
        z: `[b, l, d]`, the gate.
        order: `[K, l]`, int64; `order[k, t]` is the row-order index of the token that direction `k` visits at `t`.
        conv_weight: `[K, d, w]`, causal depthwise convolution.
        conv_bias: `[K, d]`.
        projection: `[K, r + 2n, d]`, rows for dt, B and C in this order.
        dt_weight: `[K, d, r]`.
        dt_bias: `[K, d]`.
        A_log: `[K, d, n]`.
        D: `[K, d]`.
        recurrence: Function for the recurrence with the signature of `selective_scan_loop`, which is the default.

    Returns:
        `[b, l, d]`: `silu(z) * mean over directions`.

    Source: Mamba (arXiv 2312.00752) section 3; ARM (arXiv 2406.07537) for the four directions.
    """
    b, length, d = x.shape
    k, _, width = conv_weight.shape
    rank, n = dt_weight.shape[2], A_log.shape[2]

    u = x[:, order]  # [b, K, l, d]
    u = u.permute(0, 1, 3, 2).reshape(b, k * d, length)
    u = F.conv1d(u, conv_weight.reshape(k * d, 1, width), conv_bias.reshape(k * d), padding=width - 1, groups=k * d)
    u = F.silu(u[..., :length]).view(b, k, d, length).transpose(2, 3).contiguous()  # [b, K, l, d]

    projection, dt_weight = _plain_gradient(projection), _plain_gradient(dt_weight)
    projected = u @ projection.transpose(1, 2)
    low, B, C = projected[..., :rank], projected[..., rank : rank + n], projected[..., rank + n :]
    dt = low @ dt_weight.transpose(1, 2)

    y = (recurrence or selective_scan_loop)(u, dt, dt_bias, A_log, B, C, D)  # fp32 [b, K, l, d]
    back = order.argsort(dim=1)
    y = y.gather(2, back[None, :, :, None].expand(b, -1, -1, d)).mean(dim=1)
    return (y * F.silu(z.to(y.dtype))).to(x.dtype)


def _plain_gradient(weight: Tensor) -> Tensor:
    # The product with a transposed matrix gives it a transposed gradient, which DistributedDataParallel warns about.
    if not weight.requires_grad:
        return weight
    view = weight.view_as(weight)
    # `contiguous` would leave the strides of an axis of length 1 as they are.
    view.register_hook(lambda grad: grad if grad is None else grad.clone(memory_format=torch.contiguous_format))  # type: ignore[no-untyped-call]
    return view


def selective_scan_loop(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """Computes the recurrence in fp32 (fp64 for fp64 inputs), one step per token.

    The decay `exp(dt A)` is computed in each step: for all tokens at once, it would be `l` times larger and, on a CPU,
    three times slower (measured).

    Args:
        u: `[b, K, l, d]`; dt: `[b, K, l, d]` before bias and softplus; dt_bias: `[K, d]`; A_log: `[K, d, n]`;
        B, C: `[b, K, l, n]`; D: `[K, d]`.

    Returns:
        `[b, K, l, d]` in fp32 (fp64 for fp64 inputs).
    """
    with torch.autocast(u.device.type, enabled=False):
        u, dt, A, B, C, D = full_precision(u, dt, dt_bias, A_log, B, C, D)
        du = dt * u
        h = u.new_zeros(u.shape[0], u.shape[1], u.shape[3], A.shape[-1])  # [b, K, d, n]
        ys = []
        for t in range(u.shape[2]):
            decay = torch.exp(dt[:, :, t, :, None] * A)
            h = decay * h + du[:, :, t, :, None] * B[:, :, t, None, :]
            ys.append((h @ C[:, :, t, :, None]).squeeze(-1))
        return torch.stack(ys, dim=2) + D[:, None] * u


def full_precision(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the inputs of a recurrence in fp32 (or fp64): `u`, `dt` after bias and softplus, `A`, `B`, `C`, `D`.

    Shapes as in `selective_scan_loop`. Autocast must be off.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype)[:, None])
    return u.to(dtype), dt, -torch.exp(A_log.to(dtype)), B.to(dtype), C.to(dtype), D.to(dtype)
