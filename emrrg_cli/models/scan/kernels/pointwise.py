"""The steps before and after the recurrence: dt, and the sum over directions with its gate."""

from __future__ import annotations

import triton
import triton.language as tl

from emrrg_cli.models.scan.kernels.common import LOG2E, sigmoid


@triton.jit
def _softplus(x):
    # max(x, 0) + log1p(e) with e = exp(-|x|); log1p(e) / e by least relative error on [0, 1], 2e-7. `tl.log2` takes
    # three times the instructions and is inaccurate for small e.
    e = tl.exp2(tl.abs(x) * -LOG2E)
    tail = 0.1774524 + e * (-0.107681699 + e * (0.0440896228 + e * -0.00853920635))
    log = e * (0.999999821 + e * (-0.499974042 + e * (0.332754791 + e * (-0.244954631 + e * tail))))
    return tl.maximum(x, 0.0) + log


@triton.jit
def dt_forward(
    proj, weight, bias, low, dt, BC, cleared, rows, width, rank, stride,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """`dt = softplus(weight low + bias)`, and what else comes from the projections. Grid: channels, row tiles, K.

    proj: `[K, rows, stride]` fp32: `low` in the first `rank` columns, then B and C; weight: `[K, d, rank]`, bias `[K,
    d]`; dt: `[K, rows, d]`; BC: `[K, rows, 2, n]` fp32; low: `[K, rows, rank]` in the type of `dt`, written if LOW;
    cleared: as BC, filled with zeros if CLEAR, for a launch less.
    """
    k = tl.program_id(2)
    m = tl.program_id(1) * M + tl.arange(0, M)
    d = tl.program_id(0) * C + tl.arange(0, C)
    r = tl.arange(0, R)
    dtype: tl.constexpr = dt.dtype.element_ty
    first = k.to(tl.int64) * rows
    low_on = (m < rows)[:, None] & (r < rank)[None, :]
    a = tl.load(proj + (first + m)[:, None] * stride + r[None, :], mask=low_on, other=0.0).to(dtype)
    if tl.program_id(0) == 0:
        n = tl.arange(0, 2 * N)
        on = (m < rows)[:, None] & (n < 2 * N)[None, :]
        bc = tl.load(proj + (first + m)[:, None] * stride + rank + n[None, :], mask=on, other=0.0)
        at = (first + m)[:, None] * (2 * N) + n[None, :]
        tl.store(BC + at, bc, mask=on)
        if CLEAR:
            tl.store(cleared + at, tl.zeros([M, 2 * N], tl.float32), mask=on)
        if LOW:
            tl.store(low + (first + m)[:, None] * rank + r[None, :], a, mask=low_on)
    weight_on = (d < width)[None, :] & (r < rank)[:, None]
    w = tl.load(weight + (k * width + d)[None, :] * rank + r[:, None], mask=weight_on, other=0.0)
    product = tl.dot(a, w, input_precision="ieee")
    product += tl.load(bias + k * width + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    out = dt + (first + m)[:, None] * width + d[None, :]
    tl.store(out, _softplus(product).to(dtype), mask=(m < rows)[:, None] & (d < width)[None, :])


@triton.jit
def _sum_over_directions(y, back, batch, length, width, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    # Of what the directions have for a tile of tokens, y [K, b, l, d] to [T, C] in fp32; the tile's place in [b, l, d]
    # and what of it there is. Grid: channels, tokens, b.
    t = tl.program_id(1) * T + tl.arange(0, T)
    d = tl.program_id(0) * C + tl.arange(0, C)
    on = (t < length)[:, None] & (d < width)[None, :]
    image = tl.program_id(2)
    total = tl.zeros([T, C], tl.float32)
    for k in tl.static_range(K):
        step = tl.load(back + k * length + t, mask=t < length, other=0)
        at = ((k * batch + image).to(tl.int64) * length + step)[:, None] * width + d[None, :]
        total += tl.load(y + at, mask=on, other=0.0).to(tl.float32)
    return total, (image.to(tl.int64) * length + t)[:, None] * width + d[None, :], on


@triton.jit
def gate_forward(
    y, z, back, out, mean, batch, length, width, K: tl.constexpr, SAVE: tl.constexpr, T: tl.constexpr, C: tl.constexpr
):
    """`out = silu(z) * mean over directions`: y `[K, b, l, d]` to out, mean `[b, l, d]`. Grid: channels, tokens, b.

    back: `[K, l]`, the step at which a direction visits each token.
    """
    total, at, on = _sum_over_directions(y, back, batch, length, width, K, T, C)
    total = total / K
    gate = tl.load(z + at, mask=on, other=0.0).to(tl.float32)
    tl.store(out + at, (total * gate * sigmoid(gate)).to(out.dtype.element_ty), mask=on)
    if SAVE:
        tl.store(mean + at, total.to(mean.dtype.element_ty), mask=on)


@triton.jit
def sum_directions(grad_u, back, grad_x, batch, length, width, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    """`grad_x` `[b, l, d]`, the sum over directions of `[K, b, l, d]`. Grid: channels, tokens, b."""
    total, at, on = _sum_over_directions(grad_u, back, batch, length, width, K, T, C)
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=on)


@triton.jit
def gate_backward(grad, z, mean, grad_z, grad_y, count, K: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of `gate_forward`, elementwise: to `z`, and to `y` in row order, `[b, l, d]`. Grid: blocks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    on = i < count
    g = tl.load(grad + i, mask=on, other=0.0).to(tl.float32)
    gate = tl.load(z + i, mask=on, other=0.0).to(tl.float32)
    y = tl.load(mean + i, mask=on, other=0.0).to(tl.float32)
    sig = sigmoid(gate)
    tl.store(grad_z + i, (g * y * sig * (1.0 + gate * (1.0 - sig))).to(grad_z.dtype.element_ty), mask=on)
    tl.store(grad_y + i, (g * gate * sig / K).to(grad_y.dtype.element_ty), mask=on)
