"""Applies decoding options to the scores of the next token, with tensors only: the host reads no value.

Each function corresponds to a logits processor of transformers, for studies of different lengths in one batch. `b`
studies, `k` beams, `t` positions of the token buffer, `v` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_STEP, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def penalize_repetition(scores: Tensor, tokens: Tensor, length: Tensor, penalty: float) -> Tensor:
    """Makes tokens that were already written less likely.

    Args:
        scores: `[b, k, v]`.
        tokens: `[b, k, t]`; the first `length` tokens are written.
        length: `[b]`.
        penalty: negative scores are multiplied by it, positive scores are divided.
    """
    written = torch.arange(tokens.shape[-1], device=tokens.device) < length[:, None, None]
    ids = torch.where(written, tokens, tokens[..., :1])  # unwritten places repeat the first token: same value twice
    chosen = scores.gather(-1, ids)
    penalized = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    return scores.scatter(-1, ids, torch.where(length[:, None, None] > 0, penalized, chosen))


def block_repeated_ngrams(scores: Tensor, tokens: Tensor, length: Tensor, size: int) -> Tensor:
    """Forbids tokens that would complete a sequence of `size` tokens a second time.

    Args: as in `penalize_repetition`.
    """
    b, k, t = tokens.shape
    if t < size:
        return scores
    starts = torch.arange(t - size + 1, device=tokens.device)
    match = (starts + size - 1 < length[:, None]).view(b, 1, -1).expand(b, k, -1)
    if size > 1:
        last = (length[:, None] - (size - 1) + torch.arange(size - 1, device=tokens.device)).clamp(min=0)
        ending = tokens.gather(-1, last[:, None].expand(b, k, -1))  # [b, k, size - 1]
        windows = tokens.unfold(-1, size - 1, 1)[:, :, : len(starts)]  # [b, k, t - size + 1, size - 1]
        match = match & (windows == ending[:, :, None]).all(-1)
    limits = torch.full((b, k, len(starts)), torch.inf, device=scores.device, dtype=scores.dtype)
    return scores.scatter_reduce(-1, tokens[..., size - 1 :], limits.masked_fill(match, -torch.inf), "amin")


def forbid_early_end(scores: Tensor, length: Tensor, minimum: int, end: Tensor) -> Tensor:
    """Forbids end tokens (`end`, `[e]`) while fewer than `minimum` tokens are written."""
    early = (length < minimum)[:, None, None]
    return scores.index_copy(-1, end, scores.index_select(-1, end).masked_fill(early, -torch.inf))


def keep_likely(scores: Tensor, temperature: float, top_k: int, top_p: float, keep: int) -> Tensor:
    """Returns the scores to sample from: divided by the temperature, without unlikely tokens.

    Args:
        top_k: number of tokens kept; 0: all.
        top_p: total probability of the most likely tokens that are kept.
        keep: number of tokens that are always kept.
    """
    scores = scores / temperature
    if top_k:
        least = scores.topk(min(max(top_k, keep), scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1.0:
        ordered, order = scores.sort(dim=-1)
        unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[..., -keep:] = False
        scores = scores.masked_fill(torch.zeros_like(unlikely).scatter(-1, order, unlikely), -torch.inf)
    return scores


def exponential_noise(seeds: Tensor, step: Tensor, size: int) -> Tensor:
    """Draws from the exponential distribution by seed and step only: `[b, size]`, fp32.

    The draws of a study do not depend on other studies of the batch. `argmax(p / noise)` is a draw from `p`.

    Args:
        seeds: int64 `[b]`.
        step: int64 `[b]`.
    """
    places = torch.arange(size, device=seeds.device)
    x = _scramble(_scramble(seeds)[:, None] + step[:, None])  # a key for each study and step
    x = _scramble(x + places * _STEP)
    uniform = (_shift(x, 40).double() + 0.5) / (1 << 24)
    return -uniform.log().float()


def _scramble(x: Tensor) -> Tensor:
    # The finalizer of SplitMix64.
    x = x + _STEP
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    # Shifting a negative number inserts ones, which the mask removes.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
