"""Attention of a decoding step: few queries, and many keys that a group of heads shares."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_NAME = "emrrg_packed"


@cache
def packed_attention() -> str:
    """Registers this attention and returns its name in transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _packed)
    return _NAME


def _packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Groups the query heads that share a key head, so that keys are not repeated in memory.

    Args:
        query: `[n, heads, k, head_dim]`.
        key, value: `[n, kv_heads, l, head_dim]`.
        attention_mask: bool `[n, 1, k, l]`.

    Returns:
        `[n, k, heads, head_dim]`.
    """
    if attention_mask is None or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention with a soft cap, sinks or a position bias")
    n, heads, k, width = query.shape
    groups = heads // key.shape[1]
    out = F.scaled_dot_product_attention(
        query.reshape(n, key.shape[1], groups * k, width),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=scaling,
    )
    return out.reshape(n, heads, k, value.shape[-1]).transpose(1, 2), None
