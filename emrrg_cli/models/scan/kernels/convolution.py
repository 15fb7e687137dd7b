"""The causal, depthwise convolution in the order of each direction, and its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from emrrg_cli.models.scan.kernels.common import add, sigmoid

_UNROLL = tl.constexpr(8)  # tokens that are read before the first is used


@triton.jit
def _row(x, order, t, length, width, d, ok):
    # The token that a direction visits at step t, [C] in fp32; zeros before the first and past the last step.
    token = tl.load(order + tl.minimum(tl.maximum(t, 0), length - 1))
    on = ok & (t + d * 0 >= 0) & (t + d * 0 < length)
    return tl.load(x + token * width + d, mask=on, other=0.0).to(tl.float32)


@triton.jit
def _taps(weight, at, ok, W: tl.constexpr):
    # Of each channel, [C] in fp32 each.
    taps = ()
    for tap in tl.static_range(W):
        taps = taps + (tl.load(weight + at * W + tap, mask=ok, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _direction(row, x, order, weight, bias, u, batch, length, width, W: tl.constexpr, C: tl.constexpr):
    # The part of a program: the direction, its channels and whether they exist; x, order and u of its study and
    # direction; bias and taps of the convolution.
    k = row // batch
    d = tl.program_id(0) * C + tl.arange(0, C)
    ok = d < width
    x += (row % batch).to(tl.int64) * length * width
    u += row.to(tl.int64) * length * width + d
    shift = tl.load(bias + k * width + d, mask=ok, other=0.0).to(tl.float32)
    return k, d, ok, x, order + k * length, u, shift, _taps(weight, k * width + d, ok, W)


@triton.jit
def _convolved(seen, step: tl.constexpr, shift, taps, W: tl.constexpr):
    # The convolution at a step, [C]; `seen` begins W - 1 tokens before the first step.
    pre = shift
    for tap in tl.static_range(W):
        pre += seen[step + tap] * taps[tap]
    return pre


@triton.jit
def conv_forward(x, order, weight, bias, u, batch, length, width, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    """`u = silu(conv(x))`, causal and depthwise: x `[b, l, d]` to u `[K, b, l, d]`. Grid: channels, tokens, K * b.

    weight: `[K, d, W]`, bias: `[K, d]`. A program slides over T tokens and reads each once.
    """
    row = tl.program_id(2)
    _, d, ok, x, order, u, shift, taps = _direction(row, x, order, weight, bias, u, batch, length, width, W, C)
    start = tl.program_id(1) * T
    window = ()
    for tap in tl.static_range(W - 1):
        window = window + (_row(x, order, start - (W - 1) + tap, length, width, d, ok),)
    for first in range(start, tl.minimum(start + T, length), _UNROLL):
        seen = window
        for step in tl.static_range(_UNROLL):
            seen = seen + (_row(x, order, first + step, length, width, d, ok),)
        for step in tl.static_range(_UNROLL):
            pre = _convolved(seen, step, shift, taps, W)
            t = first + step
            tl.store(
                u + t * width, (pre * sigmoid(pre)).to(u.dtype.element_ty), mask=d < tl.where(t < length, width, 0)
            )
        window = seen[_UNROLL:]


@triton.jit
def _conv_rows(x, grad_u, order, first, length, width, d, ok):
    # Of the next tokens: x and the gradient of u, [C] each.
    rows, gs = (), ()
    for step in tl.static_range(_UNROLL):
        t = first + step
        rows = rows + (_row(x, order, t, length, width, d, ok),)
        gs = gs + (tl.load(grad_u + t * width, mask=d < tl.where(t < length, width, 0), other=0.0).to(tl.float32),)
    return rows, gs


@triton.jit
def conv_backward(
    x, order, weight, bias, grad_u, small, batch, length, width,
    K: tl.constexpr, W: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    PARAMETERS: tl.constexpr,
):  # fmt: skip
    """`grad_u` `[K, b, l, d]` becomes the gradient of what the direction read, in its order. Grid: channels, K * b.

    small: `[b, ROWS, K, d]` fp32, added to; from row FIRST the gradients to the weight's taps and to the bias.
    """
    row = tl.program_id(1)
    k, d, ok, x, order, grad_u, shift, taps = _direction(
        row, x, order, weight, bias, grad_u, batch, length, width, W, C
    )  # fmt: skip
    window, before, sums = (), (), ()
    for tap in tl.static_range(W):
        sums = sums + (tl.zeros([C], tl.float32),)
        if tap < W - 1:
            window = window + (tl.zeros([C], tl.float32),)
            before = before + (tl.zeros([C], tl.float32),)
    sum_bias = tl.zeros([C], tl.float32)
    rows, gs = _conv_rows(x, grad_u, order, 0, length, width, d, ok)
    # A token's gradient is whole, and written, W - 1 steps later.
    for first in range(0, length + W - 1, _UNROLL):
        next_rows, next_gs = _conv_rows(x, grad_u, order, first + _UNROLL, length, width, d, ok)
        seen = window + rows
        for step in tl.static_range(_UNROLL):
            pre = _convolved(seen, step, shift, taps, W)
            sig = sigmoid(pre)
            g = gs[step] * sig * (1.0 + pre * (1.0 - sig))
            before = before + (g,)
            out = g * taps[0]
            for tap in tl.static_range(1, W):
                out += before[step + W - 1 - tap] * taps[tap]
            t = first + step - (W - 1)
            on = d < tl.where((t >= 0) & (t < length), width, 0)
            tl.store(grad_u + t * width, out.to(grad_u.dtype.element_ty), mask=on)
            if PARAMETERS:
                sum_bias += g
                more = ()
                for tap in tl.static_range(W):
                    more = more + (sums[tap] + g * seen[step + tap],)
                sums = more
        rows, gs = next_rows, next_gs
        window, before = seen[_UNROLL:], before[_UNROLL:]
    if PARAMETERS:
        small += (((row % batch).to(tl.int64) * ROWS + FIRST) * K + k) * width + d
        for tap in tl.static_range(W):
            add(small + tap * K * width, sums[tap], ok)
        add(small + W * K * width, sum_bias, ok)
