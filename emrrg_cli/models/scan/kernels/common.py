"""Parts shared by the kernels of the directional scan."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))  # one instruction; a division takes five
    return root * root


@triton.jit
def add(pointer, value, on):
    # Adds to the sums of earlier parts of the batch; only one program writes to a place.
    tl.store(pointer, tl.load(pointer, mask=on, other=0.0) + value, mask=on)


@triton.jit
def decay_rates(A_log, at, on):
    # A times log2(e), for exp2
    return -tl.exp2(tl.load(A_log + at, mask=on, other=0.0).to(tl.float32) * LOG2E) * LOG2E


@triton.jit
def read(pointer, start, length, width, d, CHUNK: tl.constexpr):
    # Rows start, start + 1, ... of u or dt, each of the shape of d; zeros past the last token and before the first.
    rows = ()
    for step in tl.static_range(CHUNK):
        t = start + step
        on = d < tl.where((t >= 0) & (t < length), width, 0)
        rows = rows + (tl.load(pointer + t * width, mask=on, other=0),)
    return rows
