"""The gradient of the recurrence."""

from __future__ import annotations

import triton
import triton.language as tl

from emrrg_cli.models.scan.kernels.common import LN2, LOG2E, add, decay_rates, read

# The tile of a warp of the backward scan, [R, S, L, Q]: state n = s * R + r of channel d = l * Q + q. A thread is one
# (s, l), S * L = 32, and has R states of Q channels, so that sums over states and over channels both begin inside a
# thread. Triton chooses layouts by itself. It chooses this one because every load spans both lane axes, if need be the
# same address many times, and is contiguous in r or in q.
_S = tl.constexpr(4)
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
    # Reads a row of bf16 as int32, two values in one, which needs half the registers until they are used.
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
def _read_visited(pointer, order, start, length, width, d, CHUNK: tl.constexpr):
    # As `read`, of a tensor in row order, for the tokens that a direction visits at these steps.
    rows = ()
    for step in tl.static_range(CHUNK):
        t = start + step
        on = d < tl.where((t >= 0) & (t < length), width, 0)
        token = tl.load(order + tl.minimum(tl.maximum(t, 0), length - 1))
        rows = rows + (tl.load(pointer + token * width, mask=on, other=0),)
    return rows


@triton.jit
def _read_weights(pointer, column, start, length, N: tl.constexpr, CHUNK: tl.constexpr):
    # B of each token as a matrix with one column that is not zero, twice the step: [S, columns, R].
    rows = ()
    for step in tl.static_range(CHUNK):
        at = tl.minimum(start + step, length - 1) * (2 * N)
        rows = rows + (tl.load(pointer + at, mask=column == 2 * step, other=0.0),)
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
def scan_backward(
    u, dt, BC, grad_y, order, A_log, D, states, scratch, grad_u, grad_BC, small, zero, rows, batch, length, width,
    K: tl.constexpr, N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr,
    PARAMETERS: tl.constexpr, ATOMIC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradient of `scan_forward`; the gradient of `dt` before bias and softplus replaces `dt`.

    The states are computed again: first from a saved state, `EVERY` tokens at a time, storing one state per `CHUNK`
    tokens in `scratch`; then chunk by chunk from the last to the first, with the states of a chunk in registers. Steps
    past the last token have `dt = 0`, which does not change state and sums.

    Matrix products collect the sums over states (gradients of `u`, `dt`) and over channels (of B, C) in the column of
    their token; the sums of a chunk are finished and written together.

    grad_y: `[b, l, d]` in row order; grad_u: as u; scratch: `[programs, EVERY // CHUNK - 1, n * C]`; grad_BC: `[K, b,
    l, R, S, 2]` fp32, states as in a tile, added to atomically, or `[channel blocks, K, b, l, R, S, 2]`, written;
    small: `[b, ROWS, K, d]` fp32, added to: the first n rows are the gradient of A_log, then those of D and of the bias
    of dt. zero: 0.0, added to `dt` when the decays are computed a second time; otherwise the compiler would keep the
    first ones, which needs too many registers. Grid: as many programs as run at a time, one warp each, which share the
    channel blocks of `rows` = K * b rows, so that `scratch` stays in the cache.
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
        study = (row % batch).to(tl.int64)
        saved = states + (study * K + k) * ((length - 1) // EVERY) * N * width + d * N + n
        kept = scratch + tl.program_id(0) * ((EVERY // CHUNK - 1) * N * C) + (d - first) * N + n
        A = decay_rates(A_log, (k * width + d) * N + n, d < width)
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
        # The gradient of the state before the tokens that are done.
        carry = tl.zeros([n.shape[0], n.shape[1], d.shape[2], _Q], tl.float32)
        sum_A = tl.zeros([n.shape[0], n.shape[1], d.shape[2], _Q], tl.float32)
        sum_D = tl.zeros([_Q, CHUNK, C // _Q], tl.float32)
        sum_bias = tl.zeros([_Q, CHUNK, C // _Q], tl.float32)

        for sections_done in range((length + EVERY - 1) // EVERY):
            section = (length - 1) // EVERY - sections_done
            h = tl.load(saved + (section - 1) * N * width, mask=d < tl.where(section > 0, width, 0), other=0.0)
            start = section * EVERY
            chunks = tl.cdiv(tl.minimum(EVERY, length - start), CHUNK)
            xs = read(x_of, start, length, packed_width, packed_d, CHUNK)
            ss = read(s_of, start, length, packed_width, packed_d, CHUNK)
            bs = _read_shared(B_of, start, length, N, CHUNK)
            for chunk in range(chunks - 1):
                tl.store(kept + chunk * (N * C), h)
                start += CHUNK
                next_xs = read(x_of, start, length, packed_width, packed_d, CHUNK)
                next_ss = read(s_of, start, length, packed_width, packed_d, CHUNK)
                next_bs = _read_shared(B_of, start, length, N, CHUNK)
                for step in tl.static_range(CHUNK):
                    x, s = _unpacked(xs[step], PACKED), _unpacked(ss[step], PACKED)
                    h = tl.exp2(s * A) * h + (s * x) * bs[step]
                xs, ss, bs = next_xs, next_ss, next_bs

            for chunks_done in range(chunks):
                # The state, u and dt of the chunk that comes next are read before this one's gradients are written.
                before = start - CHUNK
                next_h = tl.load(kept + tl.maximum(chunks - 2 - chunks_done, 0) * (N * C))
                next_xs = read(x_of, before, length, packed_width, packed_d, CHUNK)
                next_ss = read(s_of, before, length, packed_width, packed_d, CHUNK)
                bs, cs = _read_shared(B_of, start, length, N, CHUNK), _read_shared(B_of + N, start, length, N, CHUNK)
                weights = _read_weights(B_weights, column, start, length, N, CHUNK)
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
                # Read for the last time, and not by this kernel again: the scratch should stay in the cache, not these.
                of = t * width + d_of
                x = tl.load(u_row + of, mask=on, other=0.0, eviction_policy="evict_first").to(tl.float32)
                s = tl.load(dt_row + of, mask=on, other=0.0, eviction_policy="evict_first").to(tl.float32)
                g = tl.load(grad_y_row + visited * width + d_of, mask=on, other=0.0).to(tl.float32)
                grad_dt = (through_A * LN2 + x * through_u) * (1.0 - tl.exp2(-s * LOG2E))
                grad_x = s * through_u + skip * g
                tl.store(grad_u_row + of, grad_x.to(dtype), mask=on, eviction_policy="evict_first")
                tl.store(dt_row + of, grad_dt.to(dtype), mask=on, eviction_policy="evict_first")
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
            sums = small + (study * ROWS * K + k) * width
            add(sums + n * K * width + d, sum_A * A * LN2, d < width)
            once = (d_of < width) & (step_of == 0)
            sums += N * K * width + d_of
            add(sums, tl.broadcast_to(tl.sum(sum_D, 1, keep_dims=True), d_of.shape), once)
            add(sums + K * width, tl.broadcast_to(tl.sum(sum_bias, 1, keep_dims=True), d_of.shape), once)


@triton.jit
def finish_BC(grad_BC, grad_proj, rows, rank, stride, N: tl.constexpr, M: tl.constexpr):
    """The gradient of B and C, `[rows, R, S, 2]` fp32 as `scan_backward` leaves it, to where the gradient of the
    projections has its place for it, `[rows, stride]` from column `rank`. Grid: row tiles."""
    S: tl.constexpr = min(N, _S)
    m = (tl.program_id(0) * M + tl.arange(0, M))[:, None].to(tl.int64)
    column = tl.arange(0, 2 * N)[None, :]
    n = column % N
    at = (n % (N // S) * S + n // (N // S)) * 2 + column // N
    on = (m < rows) & (column >= 0)
    found = tl.load(grad_BC + m * (2 * N) + at, mask=on, other=0.0)
    tl.store(grad_proj + m * stride + rank + column, found.to(grad_proj.dtype.element_ty), mask=on)
