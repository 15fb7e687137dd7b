"""Triton kernels of the directional scan. `triton_engine` calls them in order and says what each tensor is.

Tensors of one direction are kept in the order in which that direction visits the tokens, `[K, b, l, d]`: only the
convolution and the sum over directions look at the index map. One program scans a few channels over all tokens, with
the state in registers; the tokens of a published image (197) are far too few for a parallel scan to pay.

`N` (the SSM state size) must be a power of two. All arithmetic is fp32 whatever the type of the tensors, but for the
matrix product of `dt_forward`, which takes operands of the tensors' own type.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_UNROLL = tl.constexpr(4)  # tokens that the convolutions read before they use the first


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def _softplus(x, EXACT: tl.constexpr):
    # max(x, 0) + log1p(e) with e = exp(-|x|).
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    if EXACT:  # as 2 artanh(e / (2 + e)): log(1 + e) loses what small e have to say
        s = e / (2.0 + e)
        q = s * s
        tail = 0.14285714 + q * (0.11111111 + q * (0.09090909 + q * 0.07692308))
        log = 2.0 * s * (1.0 + q * (0.33333333 + q * (0.2 + q * tail)))
    else:
        log = tl.log2(1.0 + e) * _LN2
    return tl.maximum(x, 0.0) + log


@triton.jit
def _row(x, order, t, length, width, d, ok):
    # The token that a direction visits at step t, [C] in fp32; zeros before the first and past the last step.
    token = tl.load(order + tl.minimum(tl.maximum(t, 0), length - 1))
    on = ok & (t + d * 0 >= 0) & (t + d * 0 < length)
    return tl.load(x + token * width + d, mask=on, other=0.0).to(tl.float32)


@triton.jit
def conv_forward(x, order, weight, bias, u, batch, length, width, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    """`u = silu(conv(x))`, causal and depthwise: x `[b, l, d]` to u `[K, b, l, d]`. Grid: channels, tokens, K * b.

    weight: `[K, d, W]`, bias: `[K, d]`. A program slides over T tokens and reads each once.
    """
    row = tl.program_id(2)
    k = row // batch
    d = tl.program_id(0) * C + tl.arange(0, C)
    ok = d < width
    x += (row % batch).to(tl.int64) * length * width
    order += k * length
    u += row.to(tl.int64) * length * width + d
    start = tl.program_id(1) * T
    shift = tl.load(bias + k * width + d, mask=ok, other=0.0).to(tl.float32)
    taps, window = (), ()
    for tap in tl.static_range(W):
        taps = taps + (tl.load(weight + (k * width + d) * W + tap, mask=ok, other=0.0).to(tl.float32),)
        if tap < W - 1:
            window = window + (_row(x, order, start - (W - 1) + tap, length, width, d, ok),)
    for first in range(start, tl.minimum(start + T, length), _UNROLL):
        seen = window
        for step in tl.static_range(_UNROLL):
            seen = seen + (_row(x, order, first + step, length, width, d, ok),)
        for step in tl.static_range(_UNROLL):
            pre = shift
            for tap in tl.static_range(W):
                pre += seen[step + tap] * taps[tap]
            t = first + step
            tl.store(
                u + t * width, (pre * _sigmoid(pre)).to(u.dtype.element_ty), mask=d < tl.where(t < length, width, 0)
            )
        window = seen[_UNROLL:]


@triton.jit
def dt_forward(
    proj, weight, bias, dt, BC, rows, width, rank, stride,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`dt = softplus(weight low + bias)`, and B and C in fp32. Grid: channels, row tiles, K.

    proj: `[K, rows, stride]`: `low` in the first `rank` columns, then B and C; weight: `[K, d, rank]`, bias `[K, d]`;
    dt: `[K, rows, d]`; BC: `[K, rows, 2, n]` fp32.
    """
    k = tl.program_id(2)
    m = tl.program_id(1) * M + tl.arange(0, M)
    d = tl.program_id(0) * C + tl.arange(0, C)
    r = tl.arange(0, R)
    first = k.to(tl.int64) * rows
    low_on = (m < rows)[:, None] & (r < rank)[None, :]
    a = tl.load(proj + (first + m)[:, None] * stride + r[None, :], mask=low_on, other=0.0)
    weight_on = (d < width)[None, :] & (r < rank)[:, None]
    w = tl.load(weight + (k * width + d)[None, :] * rank + r[:, None], mask=weight_on, other=0.0)
    if EXACT:
        product = tl.dot(a, w, input_precision="ieee")
    else:
        product = tl.dot(a, w)
    product += tl.load(bias + k * width + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    out = dt + (first + m)[:, None] * width + d[None, :]
    tl.store(out, _softplus(product, EXACT).to(dt.dtype.element_ty), mask=(m < rows)[:, None] & (d < width)[None, :])
    if tl.program_id(0) == 0:
        n = tl.arange(0, 2 * N)
        on = (m < rows)[:, None] & (n < 2 * N)[None, :]
        bc = tl.load(proj + (first + m)[:, None] * stride + rank + n[None, :], mask=on, other=0.0)
        tl.store(BC + (first + m)[:, None] * (2 * N) + n[None, :], bc.to(tl.float32), mask=on)


@triton.jit
def _decay_rates(A_log, k, width, d, n, on, N: tl.constexpr):
    # A times log2(e), for exp2: [n, C]
    a = tl.load(A_log + (k * width + d) * N + n, mask=on, other=0.0).to(tl.float32)
    return -tl.exp2(a * _LOG2E) * _LOG2E


@triton.jit
def _read(pointer, start, length, width, d, CHUNK: tl.constexpr):
    # Rows start, start + 1, ... of u or dt, [1, C] each, as stored; zeros past the last token and before the first.
    rows = ()
    for step in tl.static_range(CHUNK):
        t = start + step
        on = d < tl.where((t >= 0) & (t < length), width, 0)
        rows = rows + (tl.load(pointer + t * width, mask=on, other=0.0),)
    return rows


@triton.jit
def scan_forward(
    u, dt, BC, A_log, D, states, batch, length, width,
    N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The recurrence; `y` replaces `dt`. Grid: channels, K * b; one warp.

    u, dt: `[K, b, l, d]`; BC: `[K, b, l, 2, n]`; A_log: `[K, d, n]`; D: `[K, d]`; states: `[b, K, (l - 1) // EVERY, n,
    d]` fp32, the state before tokens EVERY, 2 EVERY, ... The next tokens are read before these are written, or every
    step would wait for memory: u and dt a chunk ahead, B and C, which many programs share, one token.
    """
    row = tl.program_id(1)
    k = row // batch
    n = tl.arange(0, N)[:, None]
    d = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    in_d = d < width
    at = row.to(tl.int64) * length
    u += at * width + d
    dt += at * width + d
    BC += at * (2 * N) + n
    study = (row % batch).to(tl.int64) * (tl.num_programs(1) // batch) + k
    states += study * ((length - 1) // EVERY) * N * width + n * width + d
    A = _decay_rates(A_log, k, width, d, n, in_d, N)
    skip = tl.load(D + k * width + d, mask=in_d, other=0.0).to(tl.float32)
    h = tl.zeros([N, C], tl.float32)
    xs, ss = _read(u, 0, length, width, d, CHUNK), _read(dt, 0, length, width, d, CHUNK)
    b, c = tl.load(BC), tl.load(BC + N)
    for start in range(0, length, CHUNK):
        next_xs = _read(u, start + CHUNK, length, width, d, CHUNK)
        next_ss = _read(dt, start + CHUNK, length, width, d, CHUNK)
        if SAVE:
            if (start > 0) & (start % EVERY == 0):
                tl.store(states, h, mask=in_d)
                states += N * width
        for step in tl.static_range(CHUNK):
            t = start + step
            ahead = tl.minimum(t + 1, length - 1) * (2 * N)
            next_b, next_c = tl.load(BC + ahead), tl.load(BC + ahead + N)
            x, s = xs[step].to(tl.float32), ss[step].to(tl.float32)
            h = tl.exp2(s * A) * h + (s * x) * b
            y = tl.sum(h * c, 0, keep_dims=True) + skip * x
            tl.store(dt + t * width, y.to(dt.dtype.element_ty), mask=d < tl.where(t < length, width, 0))
            b, c = next_b, next_c
        xs, ss = next_xs, next_ss


@triton.jit
def gate_forward(
    y, z, back, out, mean, batch, length, width, K: tl.constexpr, SAVE: tl.constexpr, T: tl.constexpr, C: tl.constexpr
):
    """`out = silu(z) * mean over directions`: y `[K, b, l, d]` to out, mean `[b, l, d]`. Grid: channels, tokens, b.

    back: `[K, l]`, the step at which a direction visits each token.
    """
    t = tl.program_id(1) * T + tl.arange(0, T)
    d = tl.program_id(0) * C + tl.arange(0, C)
    on = (t < length)[:, None] & (d < width)[None, :]
    image = tl.program_id(2)
    total = tl.zeros([T, C], tl.float32)
    for k in tl.static_range(K):
        step = tl.load(back + k * length + t, mask=t < length, other=0)
        at = ((k * batch + image).to(tl.int64) * length + step)[:, None] * width + d[None, :]
        total += tl.load(y + at, mask=on, other=0.0).to(tl.float32)
    total = total / K
    at = (image.to(tl.int64) * length + t)[:, None] * width + d[None, :]
    gate = tl.load(z + at, mask=on, other=0.0).to(tl.float32)
    tl.store(out + at, (total * gate * _sigmoid(gate)).to(out.dtype.element_ty), mask=on)
    if SAVE:
        tl.store(mean + at, total.to(mean.dtype.element_ty), mask=on)


@triton.jit
def gate_backward(grad, z, mean, grad_z, grad_y, count, K: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of `gate_forward`, elementwise: to `z`, and to `y` in row order, `[b, l, d]`. Grid: blocks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    on = i < count
    g = tl.load(grad + i, mask=on, other=0.0).to(tl.float32)
    gate = tl.load(z + i, mask=on, other=0.0).to(tl.float32)
    y = tl.load(mean + i, mask=on, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    tl.store(grad_z + i, (g * y * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(grad_z.dtype.element_ty), mask=on)
    tl.store(grad_y + i, (g * gate * sigmoid / K).to(grad_y.dtype.element_ty), mask=on)


@triton.jit
def _add_channels(sums, of_B, of_C, select, step: tl.constexpr, dtype: tl.constexpr):
    # Adds the sums over channels of two products [n, C] to the column `step` of `sums` [2 n, columns].
    N: tl.constexpr = of_B.shape[0]
    C: tl.constexpr = of_B.shape[1]
    products = tl.join(of_B.to(dtype), of_C.to(dtype)).permute(2, 0, 1).reshape(2 * N, C)
    if dtype == tl.float32:
        return tl.dot(products, (select == step).to(dtype), sums, input_precision="tf32x3")
    return tl.dot(products, (select == step).to(dtype), sums)


@triton.jit
def _read_visited(pointer, order, start, length, width, d, CHUNK: tl.constexpr):
    # The same of a tensor in row order, for the tokens that a direction visits at these steps.
    rows = ()
    for step in tl.static_range(CHUNK):
        t = start + step
        on = d < tl.where((t >= 0) & (t < length), width, 0)
        token = tl.load(order + tl.minimum(tl.maximum(t, 0), length - 1))
        rows = rows + (tl.load(pointer + token * width, mask=on, other=0.0),)
    return rows


@triton.jit
def _read_shared(pointer, start, length, N: tl.constexpr, CHUNK: tl.constexpr):
    # B (or C) of each token of a chunk, [n, 1]; those past the end repeat the last.
    rows = ()
    for step in tl.static_range(CHUNK):
        rows = rows + (tl.load(pointer + tl.minimum(start + step, length - 1) * (2 * N)),)
    return rows


@triton.jit
def scan_backward(
    u, dt, BC, grad_y, order, A_log, D, states, scratch, grad_u, grad_BC, small, batch, length, width,
    N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr,
    PARAMETERS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Gradient of `scan_forward`; that to `dt` before bias and softplus replaces `dt`.

    The states are computed again: from the saved one, `EVERY` tokens at a time, keeping one every `CHUNK` tokens in
    `scratch`, then chunk by chunk from the last to the first, a chunk's states held in registers. Steps past the last
    token have `dt = 0`, which leaves state and sums as they are.

    Sums over states (to `u`, `dt`) stay inside a lane, which has all states of a channel. Sums over channels (to B,
    C) would take five shuffles a value: they are matrix products with a selector instead, which puts the sum into the
    column of its token, so that the tensor cores do it and a chunk is written at once.

    grad_y: `[b, l, d]` in row order; grad_u: as u; scratch: `[K, b, EVERY // CHUNK - 1, n, d]`; grad_BC: `[K, b, l, 2,
    n]` fp32, added to atomically, or `[channel blocks, K, b, l, 2, n]`, written; small: `[K, b, ROWS, d]` fp32, of
    which the first n rows are the gradient to A_log, then come those to D and to dt's bias. Grid: channels, K * b; one
    warp.
    """
    row = tl.program_id(1)
    k = row // batch
    n = tl.arange(0, N)[:, None]
    d = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    in_d = d < width
    at = row.to(tl.int64) * length
    u += at * width + d
    dt += at * width + d
    grad_u += at * width + d
    BC += at * (2 * N) + n
    grad_y += (row % batch).to(tl.int64) * length * width + d
    order += k * length
    COLUMNS: tl.constexpr = max(CHUNK, 8)  # of a matrix product, at least
    column = tl.arange(0, COLUMNS)[None, :]
    select = tl.zeros([C, 1], tl.int32) + column
    if ATOMIC:
        grad_BC += at * (2 * N)
    else:
        grad_BC += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) * length + at) * (2 * N)
    grad_BC += column * (2 * N) + tl.arange(0, 2 * N)[:, None]
    study = (row % batch).to(tl.int64) * (tl.num_programs(1) // batch) + k
    states += study * ((length - 1) // EVERY) * N * width + n * width + d
    scratch += row.to(tl.int64) * (EVERY // CHUNK - 1) * N * width + n * width + d
    A = _decay_rates(A_log, k, width, d, n, in_d, N)
    skip = tl.load(D + k * width + d, mask=in_d, other=0.0).to(tl.float32)
    carry = tl.zeros([N, C], tl.float32)  # gradient of the state before the tokens that are done
    sum_A = tl.zeros([N, C], tl.float32)
    sum_D = tl.zeros([1, C], tl.float32)
    sum_bias = tl.zeros([1, C], tl.float32)

    for sections_done in range((length + EVERY - 1) // EVERY):
        section = (length - 1) // EVERY - sections_done
        h = tl.load(states + (section - 1) * N * width, mask=d < tl.where(section > 0, width, 0), other=0.0)
        start = section * EVERY
        chunks = tl.cdiv(tl.minimum(EVERY, length - start), CHUNK)
        xs, ss = _read(u, start, length, width, d, CHUNK), _read(dt, start, length, width, d, CHUNK)
        bs = _read_shared(BC, start, length, N, CHUNK)
        for chunk in range(chunks - 1):
            tl.store(scratch + chunk * N * width, h, mask=in_d)
            start += CHUNK
            next_xs, next_ss = _read(u, start, length, width, d, CHUNK), _read(dt, start, length, width, d, CHUNK)
            next_bs = _read_shared(BC, start, length, N, CHUNK)
            for step in tl.static_range(CHUNK):
                x, s = xs[step].to(tl.float32), ss[step].to(tl.float32)
                h = tl.exp2(s * A) * h + (s * x) * bs[step]
            xs, ss, bs = next_xs, next_ss, next_bs

        gs = _read_visited(grad_y, order, start, length, width, d, CHUNK)
        for chunks_done in range(chunks):
            # What the chunk that comes next needs is read before this one's gradients are written.
            before = start - CHUNK
            next_h = tl.load(scratch + tl.maximum(chunks - 2 - chunks_done, 0) * N * width, mask=in_d, other=0.0)
            next_xs, next_ss = _read(u, before, length, width, d, CHUNK), _read(dt, before, length, width, d, CHUNK)
            next_gs = _read_visited(grad_y, order, before, length, width, d, CHUNK)
            bs = _read_shared(BC, start, length, N, CHUNK)
            history = (h,)
            for step in tl.static_range(CHUNK):
                x, s = xs[step].to(tl.float32), ss[step].to(tl.float32)
                history = history + (tl.exp2(s * A) * history[step] + (s * x) * bs[step],)
            sums = tl.zeros([2 * N, COLUMNS], tl.float32)
            for step in tl.static_range(CHUNK - 1, -1, -1):
                t = start + step
                x, s, g = xs[step].to(tl.float32), ss[step].to(tl.float32), gs[step].to(tl.float32)
                b = tl.load(BC + tl.minimum(t, length - 1) * (2 * N))
                c = tl.load(BC + tl.minimum(t, length - 1) * (2 * N) + N)
                grad_h = carry + g * c
                sums = _add_channels(sums, (s * x) * grad_h, g * history[step + 1], select, step, u.dtype.element_ty)
                carry = grad_h * tl.exp2(s * A)
                flow = carry * history[step]
                through_u = tl.sum(grad_h * b, 0, keep_dims=True)
                through_A = tl.sum(flow * A, 0, keep_dims=True) * _LN2
                grad_dt = (through_A + x * through_u) * (1.0 - tl.exp2(-s * _LOG2E))
                on = d < tl.where(t < length, width, 0)
                tl.store(grad_u + t * width, (s * through_u + skip * g).to(u.dtype.element_ty), mask=on)
                tl.store(dt + t * width, grad_dt.to(dt.dtype.element_ty), mask=on)
                if PARAMETERS:
                    sum_A += flow * s
                    sum_D += g * x
                    sum_bias += grad_dt
            inside = (column < tl.minimum(CHUNK, length - start)) & (tl.arange(0, 2 * N)[:, None] >= 0)
            if ATOMIC:
                tl.atomic_add(grad_BC + start * (2 * N), sums, mask=inside, sem="relaxed")
            else:
                tl.store(grad_BC + start * (2 * N), sums, mask=inside)
            xs, ss, gs, h = next_xs, next_ss, next_gs, next_h
            start = before

    if PARAMETERS:
        small += row.to(tl.int64) * ROWS * width + d
        tl.store(small + n * width, sum_A * A * _LN2, mask=in_d)
        tl.store(small + N * width, sum_D, mask=in_d)
        tl.store(small + (N + 1) * width, sum_bias, mask=in_d)


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
    W: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Through SiLU: `grad_u` `[K, b, l, d]` becomes the gradient of the convolution's result. Grid: channels, K * b.

    small: `[K, b, ROWS, d]` fp32; from row FIRST the gradients to the weight's taps and the one to the bias.
    """
    row = tl.program_id(1)
    k = row // batch
    d = tl.program_id(0) * C + tl.arange(0, C)
    ok = d < width
    x += (row % batch).to(tl.int64) * length * width
    order += k * length
    grad_u += row.to(tl.int64) * length * width + d
    shift = tl.load(bias + k * width + d, mask=ok, other=0.0).to(tl.float32)
    taps, window, sums = (), (), ()
    for tap in tl.static_range(W):
        taps = taps + (tl.load(weight + (k * width + d) * W + tap, mask=ok, other=0.0).to(tl.float32),)
        sums = sums + (tl.zeros([C], tl.float32),)
        if tap < W - 1:
            window = window + (tl.zeros([C], tl.float32),)
    sum_bias = tl.zeros([C], tl.float32)
    rows, gs = _conv_rows(x, grad_u, order, 0, length, width, d, ok)
    for first in range(0, length, _UNROLL):
        next_rows, next_gs = _conv_rows(x, grad_u, order, first + _UNROLL, length, width, d, ok)
        seen = window + rows
        for step in tl.static_range(_UNROLL):
            pre = shift
            for tap in tl.static_range(W):
                pre += seen[step + tap] * taps[tap]
            sigmoid = _sigmoid(pre)
            g = gs[step] * sigmoid * (1.0 + pre * (1.0 - sigmoid))
            t = first + step
            tl.store(grad_u + t * width, g.to(grad_u.dtype.element_ty), mask=d < tl.where(t < length, width, 0))
            if PARAMETERS:
                sum_bias += g
                more = ()
                for tap in tl.static_range(W):
                    more = more + (sums[tap] + g * seen[step + tap],)
                sums = more
        rows, gs = next_rows, next_gs
        window = seen[_UNROLL:]
    if PARAMETERS:
        small += (row.to(tl.int64) * ROWS + FIRST) * width + d
        for tap in tl.static_range(W):
            tl.store(small + tap * width, sums[tap], mask=ok)
        tl.store(small + W * width, sum_bias, mask=ok)


@triton.jit
def conv_backward_x(
    grad_pre, back, weight, grad_x, batch, length, width,
    K: tl.constexpr, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`grad_x` `[b, l, d]` from the gradient of the convolutions' results `[K, b, l, d]`. Grid: channels, tokens, b."""
    token = tl.program_id(1) * T + tl.arange(0, T)
    d = tl.program_id(0) * C + tl.arange(0, C)
    on = (token < length)[:, None] & (d < width)[None, :]
    image = tl.program_id(2)
    total = tl.zeros([T, C], tl.float32)
    for k in tl.static_range(K):
        step = tl.load(back + k * length + token, mask=token < length, other=0)
        for tap in tl.static_range(W):
            later = step + (W - 1 - tap)
            at = ((k * batch + image).to(tl.int64) * length + later)[:, None] * width + d[None, :]
            w = tl.load(weight + (k * width + d) * W + tap, mask=d < width, other=0.0).to(tl.float32)
            tile = tl.load(grad_pre + at, mask=(later < length)[:, None] & on, other=0.0).to(tl.float32)
            total += tile * w[None, :]
    at = (image.to(tl.int64) * length + token)[:, None] * width + d[None, :]
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=on)
