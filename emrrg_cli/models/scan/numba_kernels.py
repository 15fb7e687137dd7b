"""The loops of the engine `numba`, compiled for the CPU when this module is imported, or read from numba's cache.

Each call computes one item of the work: one sample, one direction and `WIDTH` or `WIDTH_BACK` channels, which are the
lanes of the vector instructions. States are fp32. No two items write to the same memory, and numba releases Python's
lock, so any number of threads may compute the items in any order with the same result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import float32, int64, njit, void

# Channels of an item. Forward, state, A and rows fit into the first-level cache; backward, those of several tokens fit
# into the second-level cache.
WIDTH = 256
WIDTH_BACK = 64

# Sums may be reordered, which vector instructions need; infinity and NaN are preserved.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

_2d, _3d, _4d, _5d = float32[:, ::1], float32[:, :, ::1], float32[:, :, :, ::1], float32[:, :, :, :, ::1]


def _compiled(*arguments):
    def compile_now(function: Callable[..., None]) -> Callable[..., None]:
        options = {"nogil": True, "fastmath": _FASTMATH}
        try:
            return njit(void(*arguments), cache=True, **options)(function)
        except RuntimeError:  # neither the package nor the user's cache directory can be written
            return njit(void(*arguments), **options)(function)

    return compile_now


@njit(fastmath={"contract"})  # with reordering, the addition and subtraction of the constant would cancel
def _exp(x):
    """Computes `exp(x)` for `x <= 0` in fp32 without a branch: a power of 2 times a polynomial in `|f| <= ln(2) / 2`.

    The result is 0 below the normal numbers; NaN stays NaN. The coefficients are those of Cephes' `expf`.
    """
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)  # 1.5 * 2**23: low bits are the whole number
    whole = shifted - np.float32(12582912.0)
    f = x - whole * np.float32(0.693359375) - whole * np.float32(-2.12194440e-4)  # ln(2), in two parts
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + np.float32(1.0)
    exponent = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
    power = np.int32(np.float32(p).view(np.int32) + exponent).view(np.float32)
    return np.float32(0.0) if x < np.float32(-87.0) else power


@njit(fastmath={"contract"})
def _softplus(x):
    """Computes `log(1 + exp(x))` and its derivative in fp32.

    It uses `log(1 + e) = 2 artanh(e / (2 + e))` for `e = exp(-|x|) <= 1`.
    """
    e = _exp(-abs(x))
    s = e / (np.float32(2.0) + e)  # at most 1/3, so that few terms of the series are needed
    q = s * s
    p = q * np.float32(1 / 13) + np.float32(1 / 11)
    p = p * q + np.float32(1 / 9)
    p = p * q + np.float32(1 / 7)
    p = p * q + np.float32(1 / 5)
    p = p * q + np.float32(1 / 3)
    logarithm = np.float32(2.0) * (s + s * q * p)
    slope = (np.float32(1.0) if x > np.float32(0.0) else e) / (np.float32(1.0) + e)
    return (x if x > np.float32(0.0) else np.float32(0.0)) + logarithm, slope


@_compiled(int64, int64, _4d, _4d, _2d, _3d, _4d, _4d, _2d, _4d, _5d)
def forward(item, chunk, u, raw, bias, A, B, C, D, y, before):
    """Scans `WIDTH` channels of one sample along one direction.

    Args:
        item: Index of the item, of `b K ceil(d / WIDTH)`; channels vary fastest, then directions.
        chunk: Number of tokens between two states that are kept.
        u: `[b, K, l, d]`.
        raw: `[b, K, l, d]`, dt before bias and softplus.
        bias: `[K, d]`, bias of dt.
        A: `[K, n, d]`.
        B, C: `[b, K, l, n]`.
        D: `[K, d]`.
        y: `[b, K, l, d]`, output.
        before: `[b, K, ceil(l / chunk), n, d]`, output: the state before each chunk.
    """
    _, directions, length, d = u.shape
    n = A.shape[1]
    blocks = (d + WIDTH - 1) // WIDTH
    sample, k, start = item // blocks // directions, item // blocks % directions, item % blocks * WIDTH
    end = min(start + WIDTH, d)
    a = A[k, :, start:end].copy()
    skip, offset = D[k, start:end], bias[k, start:end]
    h = np.zeros_like(a)
    dt = np.empty(end - start, np.float32)
    du = np.empty(end - start, np.float32)
    for t in range(length):
        if t % chunk == 0:
            before[sample, k, t // chunk, :, start:end] = h
        u_t, raw_t, y_t = u[sample, k, t, start:end], raw[sample, k, t, start:end], y[sample, k, t, start:end]
        for j in range(end - start):
            dt[j], _ = _softplus(raw_t[j] + offset[j])
            du[j] = dt[j] * u_t[j]
            y_t[j] = skip[j] * u_t[j]
        for s in range(n):
            b_s, c_s, a_s, h_s = B[sample, k, t, s], C[sample, k, t, s], a[s], h[s]
            for j in range(end - start):
                state = _exp(dt[j] * a_s[j]) * h_s[j] + du[j] * b_s
                h_s[j] = state
                y_t[j] += c_s * state


@_compiled(int64, int64, _4d, _4d, _2d, _3d, _4d, _4d, _2d, _5d, _4d, _4d, _4d, _3d, _4d, _5d, _5d, _3d)
def backward(item, chunk, u, raw, bias, A, B, C, D, before, gy, gu, graw, gbias, gA, gB, gC, gD):
    """Computes the gradients of `forward`, chunk by chunk from the last token, with states computed from the kept ones.

    Args:
        item: Index of the item, of `b K ceil(d / WIDTH_BACK)`; channels vary fastest, then directions.
        gy: `[b, K, l, d]`, gradient of `y`.
        gu, graw: `[b, K, l, d]`, output.
        gbias, gD: `[b, K, d]`, output; the caller sums over samples.
        gA: `[b, K, n, d]`, output; the caller sums over samples.
        gB, gC: `[ceil(d / WIDTH_BACK), b, K, l, n]`, output; the caller sums over blocks of channels.
        chunk, u, raw, bias, A, B, C, D, before: As in `forward`.
    """
    _, directions, length, d = u.shape
    n = A.shape[1]
    blocks = (d + WIDTH_BACK - 1) // WIDTH_BACK
    block = item % blocks
    sample, k, start = item // blocks // directions, item // blocks % directions, block * WIDTH_BACK
    end = min(start + WIDTH_BACK, d)
    width = end - start
    a = A[k, :, start:end].copy()
    skip, offset = D[k, start:end], bias[k, start:end]
    flow = np.zeros_like(a)  # gradient that the state passes to the previous token
    ga = np.zeros_like(a)
    gskip = np.zeros(width, np.float32)
    goffset = np.zeros(width, np.float32)
    gdu = np.empty(width, np.float32)
    rate = np.empty(width, np.float32)  # gradient of dt through the decay
    dt = np.empty((chunk, width), np.float32)
    slope = np.empty((chunk, width), np.float32)
    du = np.empty((chunk, width), np.float32)
    decay = np.empty((chunk, n, width), np.float32)
    states = np.empty((chunk + 1, n, width), np.float32)
    for c in range((length - 1) // chunk, -1, -1):
        first = c * chunk
        tokens = min(chunk, length - first)
        states[0] = before[sample, k, c, :, start:end]
        for i in range(tokens):
            t = first + i
            u_t, raw_t, dt_t, slope_t, du_t = (
                u[sample, k, t, start:end],
                raw[sample, k, t, start:end],
                dt[i],
                slope[i],
                du[i],
            )
            for j in range(width):
                dt_t[j], slope_t[j] = _softplus(raw_t[j] + offset[j])
                du_t[j] = dt_t[j] * u_t[j]
            for s in range(n):
                b_s, a_s = B[sample, k, t, s], a[s]
                decay_s, old_s, new_s = decay[i, s], states[i, s], states[i + 1, s]
                for j in range(width):
                    factor = _exp(dt_t[j] * a_s[j])
                    decay_s[j] = factor
                    new_s[j] = factor * old_s[j] + du_t[j] * b_s
        for i in range(tokens - 1, -1, -1):
            t = first + i
            u_t, dt_t, slope_t, du_t = u[sample, k, t, start:end], dt[i], slope[i], du[i]
            gy_t = gy[sample, k, t, start:end]
            gdu[:] = np.float32(0.0)
            rate[:] = np.float32(0.0)
            for s in range(n):
                b_s, c_s, a_s = B[sample, k, t, s], C[sample, k, t, s], a[s]
                decay_s, old_s, new_s = decay[i, s], states[i, s], states[i + 1, s]
                flow_s, ga_s = flow[s], ga[s]
                gb = np.float32(0.0)
                gc = np.float32(0.0)
                for j in range(width):
                    gc += gy_t[j] * new_s[j]
                    gh = flow_s[j] + gy_t[j] * c_s
                    gb += gh * du_t[j]
                    gdu[j] += gh * b_s
                    back = gh * decay_s[j]
                    flow_s[j] = back
                    exponent = back * old_s[j]  # gradient of dt A
                    rate[j] += exponent * a_s[j]
                    ga_s[j] += exponent * dt_t[j]
                gB[block, sample, k, t, s] = gb
                gC[block, sample, k, t, s] = gc
            gu_t, graw_t = gu[sample, k, t, start:end], graw[sample, k, t, start:end]
            for j in range(width):
                step = (rate[j] + gdu[j] * u_t[j]) * slope_t[j]
                graw_t[j] = step
                goffset[j] += step
                gu_t[j] = gdu[j] * dt_t[j] + skip[j] * gy_t[j]
                gskip[j] += gy_t[j] * u_t[j]
    gA[sample, k, :, start:end] = ga
    gD[sample, k, start:end] = gskip
    gbias[sample, k, start:end] = goffset
