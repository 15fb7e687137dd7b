"""The recurrence."""

from __future__ import annotations

import triton
import triton.language as tl

from emrrg_cli.models.scan.kernels.common import decay_rates, read


@triton.jit
def scan_forward(
    u, dt, BC, A_log, D, states, batch, length, width,
    N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The recurrence; `y` replaces `dt`. Grid: channels, K * b; one warp; a thread has the states of a channel.

    u, dt: `[K, b, l, d]`; BC: `[K, b, l, 2, n]`; A_log: `[K, d, n]`; D: `[K, d]`; states: `[b, K, (l - 1) // EVERY, d,
    n]` fp32, the state before tokens EVERY, 2 EVERY, ... The next tokens are read before the current ones are
    written, so that steps do not wait for memory: u and dt a chunk ahead; B and C, which many programs share, a token.
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
    A = decay_rates(A_log, (k * width + d) * N + n, in_d)
    skip = tl.load(D + k * width + d, mask=in_d, other=0.0).to(tl.float32)
    h = tl.zeros([N, C], tl.float32)
    xs, ss = read(u, 0, length, width, d, CHUNK), read(dt, 0, length, width, d, CHUNK)
    b, c = tl.load(BC), tl.load(BC + N)
    for start in range(0, length, CHUNK):
        next_xs = read(u, start + CHUNK, length, width, d, CHUNK)
        next_ss = read(dt, start + CHUNK, length, width, d, CHUNK)
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
