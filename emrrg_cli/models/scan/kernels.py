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
def _decay_rates(A_log, at, on):
    # A times log2(e), for exp2
    return -tl.exp2(tl.load(A_log + at, mask=on, other=0.0).to(tl.float32) * _LOG2E) * _LOG2E


@triton.jit
def _read(pointer, start, length, width, d, CHUNK: tl.constexpr):
    # Rows start, start + 1, ... of u or dt, each of the shape of d; zeros past the last token and before the first.
    rows = ()
    for step in tl.static_range(CHUNK):
        t = start + step
        on = d < tl.where((t >= 0) & (t < length), width, 0)
        rows = rows + (tl.load(pointer + t * width, mask=on, other=0),)
    return rows


@triton.jit
def scan_forward(
    u, dt, BC, A_log, D, states, batch, length, width,
    N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The recurrence; `y` replaces `dt`. Grid: channels, K * b; one warp, a thread of which has a channel's states.

    u, dt: `[K, b, l, d]`; BC: `[K, b, l, 2, n]`; A_log: `[K, d, n]`; D: `[K, d]`; states: `[b, K, (l - 1) // EVERY, d,
    n]` fp32, the state before tokens EVERY, 2 EVERY, ... The next tokens are read before these are written, or every
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
    states += study * ((length - 1) // EVERY) * N * width + d * N + n
    A = _decay_rates(A_log, (k * width + d) * N + n, in_d)
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


# The tile of a warp of the backward scan, [R, S, L, Q]: state n = s * R + r of channel d = l * Q + q. A thread is one
# (s, l), S * L = 32, and has R states of Q channels, so that sums over states and over channels both begin inside a
# thread. Triton chooses layouts by itself. It chooses this one because every load spans both lane axes, if need be the
# same address many times, and is contiguous in r or in q.
STATE_LANES = 4
_S = tl.constexpr(STATE_LANES)
_Q = tl.constexpr(4)


@triton.jit
def _tile(first, N: tl.constexpr, C: tl.constexpr):
    # State [R, S, 1, 1] and channel [1, S, L, Q] of each element; what is read a channel spans S too, see above.
    S: tl.constexpr = min(N, _S)
    L: tl.constexpr = C // _Q
    n = tl.arange(0, S)[None, :, None, None] * (N // S) + tl.arange(0, N // S)[:, None, None, None]
    d = first + tl.arange(0, L)[None, None, :, None] * _Q + tl.arange(0, _Q)[None, None, None, :]
    return n, tl.broadcast_to(d, [1, S, L, _Q])


@triton.jit
def _finished(first, C: tl.constexpr, CHUNK: tl.constexpr):
    # Step [1, CHUNK, 1] and channel [Q, CHUNK, L] of a chunk's results: the layout that matrix products leave them in.
    L: tl.constexpr = C // _Q
    step = tl.arange(0, CHUNK)[None, :, None]
    d = first + tl.arange(0, L)[None, None, :] * _Q + tl.arange(0, _Q)[:, None, None]
    return step, tl.broadcast_to(d, [_Q, CHUNK, L])


@triton.jit
def _packed(pointer, first, width, N: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr):
    # How to read a row of bf16: two values as one int32, which takes half the registers until they are used.
    if PACKED:
        S: tl.constexpr = min(N, _S)
        pairs = tl.arange(0, C // _Q)[None, None, :, None] * (_Q // 2) + tl.arange(0, _Q // 2)[None, None, None, :]
        d = tl.broadcast_to(first // 2 + pairs, [1, S, C // _Q, _Q // 2])
        return pointer.to(tl.pointer_type(tl.int32)) + d, d, width // 2
    else:  # noqa: RET505 - one of two types: Triton compiles a branch only where it is chosen
        d = _tile(first, N, C)[1]
        return pointer + d, d, width


@triton.jit
def _unpacked(x, PACKED: tl.constexpr):
    # [1, S, L, Q] in fp32
    if PACKED:
        low, high = (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(1, x.shape[1], x.shape[2], 2 * x.shape[3])
    else:  # noqa: RET505 - as above
        return x.to(tl.float32)


@triton.jit
def _read_shared(pointer, start, length, N: tl.constexpr, CHUNK: tl.constexpr):
    # B or C of each token of a chunk, [R, S, L, 1]; those past the end repeat the last.
    rows = ()
    for step in tl.static_range(CHUNK):
        rows = rows + (tl.load(pointer + tl.minimum(start + step, length - 1) * (2 * N)),)
    return rows


@triton.jit
def _read_weights(pointer, column, start, length, N: tl.constexpr, CHUNK: tl.constexpr, APART: tl.constexpr):
    # B or C of each token as a matrix with one column that is not zero, APART times the step: [S, columns, R].
    rows = ()
    for step in tl.static_range(CHUNK):
        at = tl.minimum(start + step, length - 1) * (2 * N)
        rows = rows + (tl.load(pointer + at, mask=column == APART * step, other=0.0),)
    return rows


@triton.jit
def _weights(N: tl.constexpr, COLUMNS: tl.constexpr):
    # State and column of each element of such a matrix, [S, columns, R] both.
    S: tl.constexpr = min(N, _S)
    n = tl.arange(0, S)[:, None, None] * (N // S) + tl.arange(0, N // S)[None, None, :]
    column = tl.arange(0, COLUMNS)[None, :, None]
    return tl.broadcast_to(n, [S, COLUMNS, N // S]), tl.broadcast_to(column, [S, COLUMNS, N // S])


@triton.jit
def _add_states(sums, x, weight, dtype: tl.constexpr):
    # Adds the sums over states of x [R, S, L, Q] times weight [S, columns, R] to sums [Q * L, columns]. On the tensor
    # cores, whose operands are laid out as x is if the states are taken in this order.
    R: tl.constexpr = x.shape[0]
    S: tl.constexpr = x.shape[1]
    rows: tl.constexpr = x.shape[2] * x.shape[3]
    columns: tl.constexpr = sums.shape[1]
    W: tl.constexpr = 1 if R == 1 or dtype == tl.float32 else 2
    x = x.reshape(R // W, W, S, x.shape[2], x.shape[3]).permute(4, 3, 0, 2, 1).reshape(rows, R * S)
    weight = weight.reshape(S, columns, R // W, W).permute(2, 0, 3, 1).reshape(R * S, columns)
    if R * S < 16:  # too few for a matrix product
        return sums + tl.sum(x[:, :, None] * weight[None, :, :], 1)
    else:  # noqa: RET505 - as above
        return tl.dot(x, weight, sums, input_precision="tf32x3" if dtype == tl.float32 else "tf32")


@triton.jit
def _add(pointer, value, on):
    # To what parts of the batch before this one have left there; a place belongs to one program.
    tl.store(pointer, tl.load(pointer, mask=on, other=0.0) + value, mask=on)


@triton.jit
def _add_channels(sums, of_B, of_C, later_B, later_C, step: tl.constexpr, dtype: tl.constexpr):
    # Adds the sums over channels of products [R, S, L, Q] at `step` and at the one after it to these columns of `sums`
    # [2 n, columns]: over q inside a thread, over l by a matrix product whose weights send each token to its column.
    K: tl.constexpr = 2 * of_B.shape[2]
    rows: tl.constexpr = 2 * of_B.shape[0] * of_B.shape[1]
    now = tl.join(tl.sum(of_B, 3), tl.sum(of_C, 3))
    later = tl.join(tl.sum(later_B, 3), tl.sum(later_C, 3))
    products = tl.join(now, later).permute(0, 1, 3, 4, 2).reshape(rows, K)
    token = tl.arange(0, K)[:, None] // (K // 2)
    select = (tl.arange(0, sums.shape[1])[None, :] == step + token).to(tl.float32)
    return tl.dot(products, select, sums, input_precision="tf32x3" if dtype == tl.float32 else "tf32")


@triton.jit
def _read_visited(pointer, order, start, length, width, d, CHUNK: tl.constexpr):
    # As `_read`, of a tensor in row order, for the tokens that a direction visits at these steps.
    rows = ()
    for step in tl.static_range(CHUNK):
        t = start + step
        on = d < tl.where((t >= 0) & (t < length), width, 0)
        token = tl.load(order + tl.minimum(tl.maximum(t, 0), length - 1))
        rows = rows + (tl.load(pointer + token * width, mask=on, other=0),)
    return rows


@triton.jit
def scan_backward(
    u, dt, BC, grad_y, order, A_log, D, states, scratch, grad_u, grad_BC, small, zero, rows, batch, length, width,
    N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr,
    PARAMETERS: tl.constexpr, ATOMIC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradient of `scan_forward`; that to `dt` before bias and softplus replaces `dt`.

    The states are computed again: from the saved one, `EVERY` tokens at a time, keeping one every `CHUNK` tokens in
    `scratch`, then chunk by chunk from the last to the first, a chunk's states held in registers. Steps past the last
    token have `dt = 0`, which leaves state and sums as they are.

    Sums over states (to `u`, `dt`) and over channels (to B, C) are gathered by matrix products into the column of their
    token, and a chunk's are finished and written at once.

    grad_y: `[b, l, d]` in row order; grad_u: as u; scratch: `[programs, EVERY // CHUNK - 1, n * C]`; grad_BC: `[K, b,
    l, R, S, 2]` fp32, states as in a tile, added to atomically, or `[channel blocks, K, b, l, R, S, 2]`, written;
    small: `[b, K, ROWS, d]` fp32, added to: the first n rows are the gradient to A_log, then come those to D and to
    dt's bias. zero: 0.0, added to `dt` where the decays are needed a second time: the compiler would keep the first
    ones, which takes more registers than there are. Grid: as many programs as run at a time, one warp each, which
    share the channel blocks of `rows` = K * b rows, so that `scratch` stays in the cache.
    """
    blocks = tl.cdiv(width, C)
    dtype: tl.constexpr = u.dtype.element_ty
    for item in range(tl.program_id(0), blocks * rows, tl.num_programs(0)):
        block, row = item % blocks, item // blocks
        k = row // batch
        first = block * C
        n, d = _tile(first, N, C)
        at = row.to(tl.int64) * length
        u_row = u + at * width
        dt_row = dt + at * width
        grad_u_row = grad_u + at * width
        BC_row = BC + at * (2 * N)
        grad_y_row = grad_y + (row % batch).to(tl.int64) * length * width
        visits = order + k * length
        study = (row % batch).to(tl.int64) * (rows // batch) + k
        saved = states + study * ((length - 1) // EVERY) * N * width + d * N + n
        kept = scratch + tl.program_id(0) * ((EVERY // CHUNK - 1) * N * C) + (d - first) * N + n
        A = _decay_rates(A_log, (k * width + d) * N + n, d < width)
        step_of, d_of = _finished(first, C, CHUNK)
        skip = tl.load(D + k * width + d_of, mask=d_of < width, other=0.0).to(tl.float32)
        # Columns of the sums over states are (step, which sum); of those over channels the first CHUNK are used.
        COLUMNS: tl.constexpr = 2 * CHUNK
        n_of, column = _weights(N, COLUMNS)
        B_of = BC_row + tl.broadcast_to(n, [n.shape[0], n.shape[1], d.shape[2], 1])
        B_weights = BC_row + n_of
        x_of, packed_d, packed_width = _packed(u_row, first, width, N, C, PACKED)
        s_of, packed_d, packed_width = _packed(dt_row, first, width, N, C, PACKED)
        g_of, packed_d, packed_width = _packed(grad_y_row, first, width, N, C, PACKED)
        if ATOMIC:
            grad_BC_row = grad_BC + at * (2 * N)
        else:
            grad_BC_row = grad_BC + (block.to(tl.int64) * rows * length + at) * (2 * N)
        line = tl.arange(0, 2 * N)[:, None]
        token = tl.arange(0, COLUMNS)[None, :]
        grad_BC_row += token * (2 * N) + line
        carry = tl.zeros(
            [n.shape[0], n.shape[1], d.shape[2], _Q], tl.float32
        )  # gradient of the state before those done
        sum_A = tl.zeros([n.shape[0], n.shape[1], d.shape[2], _Q], tl.float32)
        sum_D = tl.zeros([_Q, CHUNK, C // _Q], tl.float32)
        sum_bias = tl.zeros([_Q, CHUNK, C // _Q], tl.float32)

        for sections_done in range((length + EVERY - 1) // EVERY):
            section = (length - 1) // EVERY - sections_done
            h = tl.load(saved + (section - 1) * N * width, mask=d < tl.where(section > 0, width, 0), other=0.0)
            start = section * EVERY
            chunks = tl.cdiv(tl.minimum(EVERY, length - start), CHUNK)
            xs = _read(x_of, start, length, packed_width, packed_d, CHUNK)
            ss = _read(s_of, start, length, packed_width, packed_d, CHUNK)
            bs = _read_shared(B_of, start, length, N, CHUNK)
            for chunk in range(chunks - 1):
                tl.store(kept + chunk * (N * C), h)
                start += CHUNK
                next_xs = _read(x_of, start, length, packed_width, packed_d, CHUNK)
                next_ss = _read(s_of, start, length, packed_width, packed_d, CHUNK)
                next_bs = _read_shared(B_of, start, length, N, CHUNK)
                for step in tl.static_range(CHUNK):
                    x, s = _unpacked(xs[step], PACKED), _unpacked(ss[step], PACKED)
                    h = tl.exp2(s * A) * h + (s * x) * bs[step]
                xs, ss, bs = next_xs, next_ss, next_bs

            for chunks_done in range(chunks):
                # The state, u and dt of the chunk that comes next are read before this one's gradients are written.
                before = start - CHUNK
                next_h = tl.load(kept + tl.maximum(chunks - 2 - chunks_done, 0) * (N * C))
                next_xs = _read(x_of, before, length, packed_width, packed_d, CHUNK)
                next_ss = _read(s_of, before, length, packed_width, packed_d, CHUNK)
                bs, cs = _read_shared(B_of, start, length, N, CHUNK), _read_shared(B_of + N, start, length, N, CHUNK)
                weights = _read_weights(B_weights, column, start, length, N, CHUNK, 2)
                gs = _read_visited(g_of, visits, start, length, packed_width, packed_d, CHUNK)
                history = (h,)
                for step in tl.static_range(CHUNK):
                    x, s = _unpacked(xs[step], PACKED), _unpacked(ss[step], PACKED)
                    history = history + (tl.exp2(s * A) * history[step] + (s * x) * bs[step],)
                over_states = tl.zeros([C, COLUMNS], tl.float32)
                over_channels = tl.zeros([2 * N, COLUMNS], tl.float32)
                for step in tl.static_range(CHUNK - 1, -1, -1):
                    x, s, g = _unpacked(xs[step], PACKED), _unpacked(ss[step], PACKED), _unpacked(gs[step], PACKED)
                    grad_h = carry + g * cs[step]
                    of_B, of_C = (s * x) * grad_h, g * history[step + 1]
                    if step % 2 == 1:
                        later_B, later_C = of_B, of_C
                    else:
                        over_channels = _add_channels(over_channels, of_B, of_C, later_B, later_C, step, dtype)
                    over_states = _add_states(over_states, grad_h, weights[step], dtype)
                    carry = grad_h * tl.exp2((s + zero) * A)
                    flow = carry * history[step]
                    over_states = _add_states(over_states, flow * A, (column == 2 * step + 1).to(tl.float32), dtype)
                    if PARAMETERS:
                        sum_A += flow * s

                through_u, through_A = over_states.reshape(_Q, C // _Q, CHUNK, 2).permute(0, 2, 1, 3).split()
                t = start + step_of
                on = d_of < tl.where(t < length, width, 0)
                visited = tl.load(visits + tl.minimum(t, length - 1))
                x = tl.load(u_row + t * width + d_of, mask=on, other=0.0).to(tl.float32)
                s = tl.load(dt_row + t * width + d_of, mask=on, other=0.0).to(tl.float32)
                g = tl.load(grad_y_row + visited * width + d_of, mask=on, other=0.0).to(tl.float32)
                grad_dt = (through_A * _LN2 + x * through_u) * (1.0 - tl.exp2(-s * _LOG2E))
                tl.store(grad_u_row + t * width + d_of, (s * through_u + skip * g).to(dtype), mask=on)
                tl.store(dt_row + t * width + d_of, grad_dt.to(dtype), mask=on)
                if PARAMETERS:
                    sum_D += g * x
                    sum_bias += grad_dt
                inside = (token < tl.minimum(CHUNK, length - start)) & (line >= 0)
                if ATOMIC:
                    tl.atomic_add(grad_BC_row + start * (2 * N), over_channels, mask=inside, sem="relaxed")
                else:
                    tl.store(grad_BC_row + start * (2 * N), over_channels, mask=inside)
                xs, ss, h = next_xs, next_ss, next_h
                start = before

        if PARAMETERS:
            sums = small + study * ROWS * width
            _add(sums + n * width + d, sum_A * A * _LN2, d < width)
            once = (d_of < width) & (step_of == 0)
            sums += N * width + d_of
            _add(sums, tl.broadcast_to(tl.sum(sum_D, 1, keep_dims=True), d_of.shape), once)
            _add(sums + width, tl.broadcast_to(tl.sum(sum_bias, 1, keep_dims=True), d_of.shape), once)


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

    small: `[b, K, ROWS, d]` fp32, added to; from row FIRST the gradients to the weight's taps and to the bias.
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
        study = (row % batch).to(tl.int64) * (tl.num_programs(1) // batch) + k
        small += (study * ROWS + FIRST) * width + d
        for tap in tl.static_range(W):
            _add(small + tap * width, sums[tap], ok)
        _add(small + W * width, sum_bias, ok)


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
