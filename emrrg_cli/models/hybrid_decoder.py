"""Hybrid decoder layers for any Hugging Face causal LM: self-attention plus gated cross-attention to the image.

In a hybrid layer, the text queries also attend to keys and values projected from the visual tokens. A gate computed
from the text scales this context, which is added to the self-attention before the output projection. The gate starts
at zero, so a new hybrid LLM gives the same output as the plain LLM.

The attention modules are extended in place and keep their parameter names, so the weights and the LoRA adapters of the
LLM are saved and loaded as for the plain LLM. Visual tokens are keyword arguments of the LLM's `forward` and `generate`
(which expands them over beams). They are not stored on a layer, because this would break gradient checkpointing.

Source: EMRRG (arXiv 2510.16776) section 3.3.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from emrrg_cli.errors import UsageError
from emrrg_cli.models.hybrid_probe import check_hybrid_layers

VISUAL_ARGUMENTS = ("visual_tokens", "visual_mask")


class CrossAttention(nn.Module):
    """The cross-attention that a hybrid layer adds to its self-attention: key/value projection and gate.

    Args:
        hidden_size: Width of the LLM.
        heads: Number of query heads of the layer.
        kv_heads: Number of key/value heads of the layer (grouped-query attention as in the layer).
        head_dim: Width of a head.
        gate: `states` computes the gate from the text states after the layer's norm, `attention` from the output of
            self-attention before its output projection.
        query: Whether the queries are taken before or after the rotary embedding: `before_rotary` or `after_rotary`.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        gate: str = "states",
        query: str = "before_rotary",
    ) -> None:
        super().__init__()
        self.gate_from, self.query_from = gate, query
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.kv_proj = nn.Linear(hidden_size, 2 * kv_heads * head_dim, bias=False)
        self.gate = nn.Linear(hidden_size if gate == "states" else heads * head_dim, 1)
        self.warmup = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.kv_proj.weight, std=hidden_size**-0.5)

    def keys_and_values(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Projects visual tokens, after the layer's input norm: `[b, m, hidden] -> 2 x [b, kv_heads, m, head_dim]`."""
        kv = self.kv_proj(visual.to(self.kv_proj.weight.dtype))
        kv = kv.view(*visual.shape[:2], 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return kv[0], kv[1]

    def forward(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the gated context, which is added before the output projection.

        Args:
            hidden: `[b, t, hidden]`, input of the gate.
            query: `[b, t, heads * head_dim]`, the queries of the layer.
            key, value: `[b, kv_heads, m, head_dim]`.
            mask: `[b, m]`, true for real visual tokens; None: all are real.

        Returns:
            `[b, t, heads * head_dim]`.
        """
        b, t, _ = query.shape
        # Every text token attends to every visual token, so the query heads of one key head can be joined as queries.
        query = query.view(b, t, self.heads, self.head_dim).transpose(1, 2)
        context = F.scaled_dot_product_attention(
            query.reshape(b, self.kv_heads, -1, self.head_dim),
            key.to(query.dtype),
            value.to(query.dtype),
            attn_mask=None if mask is None else mask[:, None, None, :].bool(),
        ).reshape(b, self.heads, t, self.head_dim)
        return self.gates(hidden).to(context.dtype) * context.transpose(1, 2).reshape(b, t, -1)

    def gates(self, hidden: Tensor) -> Tensor:
        """Returns the factor of the context at each position, which may be negative: `[b, t, hidden] -> [b, t, 1]`."""
        gate: Tensor = self.warmup * torch.tanh(self.gate(hidden.to(self.gate.weight.dtype)))
        return gate

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the attention weights of each head: `[b, heads, t, m]`, fp32, summing to 1 over `m`.

        Arguments as in `forward`, which does not compute these weights.
        """
        b, t, _ = query.shape
        grouped = query.float().view(b, t, self.kv_heads, -1, self.head_dim).permute(0, 2, 3, 1, 4)
        scores = torch.einsum("bgqtd,bgmd->bgqtm", grouped, key.float()) * self.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None, None], -torch.inf)
        weights: Tensor = scores.softmax(-1).flatten(1, 2)
        return weights


class _HybridAttention(nn.Module):
    """Mixed into the class of a decoder layer's `self_attn`; `add_hybrid_layers` sets `cross` and `visual_norm`."""

    cross: CrossAttention
    q_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        visual_tokens: Tensor | None = None,
        visual_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if visual_tokens is None:
            return super().forward(hidden_states, *args, **kwargs)
        heads_out: list[Tensor] = []
        hook = None
        if self.cross.gate_from == "attention":
            hook = self.o_proj.register_forward_pre_hook(lambda _, inputs: heads_out.append(inputs[0]))
        try:
            attended, *rest = super().forward(hidden_states, *args, **kwargs)
        finally:
            if hook is not None:
                hook.remove()
        # Found by its type: transformers 5.24 renamed the argument from `past_key_values` to `cache`.
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        key, value = self._visual_keys_and_values(visual_tokens, cache)
        query = self.q_proj(hidden_states)
        if (q_norm := getattr(self, "q_norm", None)) is not None:  # Qwen3 norms each head's query, OLMoE all together
            query = q_norm(query.unflatten(-1, (-1, q_norm.weight.shape[-1]))).flatten(-2)
        if self.cross.query_from == "after_rotary":
            query = self._rotated(query, kwargs["position_embeddings"])
        context = self.o_proj(self.cross(heads_out[0] if heads_out else hidden_states, query, key, value, visual_mask))
        if (bias := getattr(self.o_proj, "bias", None)) is not None:
            context = context - bias  # self-attention has added it already
        return (attended + context.to(attended.dtype), *rest)

    def _rotated(self, query: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        # With the function of the LLM's family, which is in the module of its attention.
        rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
        heads = query.view(*query.shape[:2], self.cross.heads, -1).transpose(1, 2)
        rotated: Tensor = rotate(heads, heads, *positions)[0]
        return rotated.transpose(1, 2).flatten(2)

    def _visual_keys_and_values(self, visual: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        # In generation they are the same at every step, so they are stored in the cache of this generation.
        # Beam search reorders rows only within a study, where all rows are equal, so they need no reordering.
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        if cache is not None and not torch.is_grad_enabled():
            kept = cache.__dict__.setdefault("visual_keys_and_values", kept)
        layer = id(self)
        if layer not in kept or kept[layer][0].shape[0] != visual.shape[0]:
            norm: nn.Module = self.__dict__["visual_norm"]
            kept[layer] = self.cross.keys_and_values(norm(visual))
        return kept[layer]


class _HybridLLM:
    """Mixed into the class of the LLM, so that `generate` accepts the visual arguments in `**kwargs`."""

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        others = {key: value for key, value in model_kwargs.items() if key not in VISUAL_ARGUMENTS}
        super()._validate_model_kwargs(others)  # type: ignore[misc]


def add_hybrid_layers(llm: Any, every: int, *, gate: str = "states", query: str = "before_rotary") -> list[int]:
    """Turns every `every`-th decoder layer of a causal LM, from the first, into a hybrid layer, in place.

    Afterwards, `llm(..., visual_tokens=[b, m, hidden], visual_mask=[b, m] or None)` and `llm.generate(...)` with the
    same arguments attend to the image. Without them, the LLM gives the output of the plain LLM.

    Args:
        gate, query: As in `CrossAttention`.

    Returns:
        The indices of the hybrid layers.

    Raises:
        UsageError: The architecture lacks a part that a hybrid layer needs (separate `q_proj` and `o_proj` in
            `self_attn`, `input_layernorm` before it), or does not pass the visual tokens to its layers.
    """
    layers = decoder_layers(llm)
    if not hasattr(llm.config, "hidden_size"):
        raise UsageError(
            f"hybrid layers do not fit {type(llm).__name__}: it is a model for images and text, not a plain LLM",
            hint="Choose a text-only LLM, or set model.hybrid.every=null.",
        )
    chosen = list(range(0, len(layers), every))
    for index in chosen:
        layer: Any = layers[index]
        attention: Any = getattr(layer, "self_attn", None)
        norm = getattr(layer, "input_layernorm", None)
        missing = [name for name in ("q_proj", "o_proj") if not isinstance(getattr(attention, name, None), nn.Module)]
        if norm is None:
            missing.append("input_layernorm")
        heads, kv_heads, head_dim = _head_shape(llm.config, attention)
        if not missing and getattr(attention.q_proj, "out_features", None) != heads * head_dim:
            missing.append("q_proj of heads * head_dim rows")
        if missing:
            raise UsageError(
                f"hybrid layers do not fit {type(llm).__name__}: its decoder layer has no {', '.join(missing)}",
                hint="Llama, Mistral, Qwen2 and Qwen3 fit. Or set model.hybrid.every=null for a plain LLM.",
            )
        attention.cross = CrossAttention(llm.config.hidden_size, heads, kv_heads, head_dim, gate, query)
        attention.__dict__["visual_norm"] = norm  # shared with the layer, so not a second entry in the state dict
        _mix_in(attention, _HybridAttention)
    _mix_in(llm, _HybridLLM)
    check_hybrid_layers(llm, layers, chosen)
    return chosen


def hybrid_parameters(llm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters that hybrid layers added, with their names in the LLM."""
    for name, parameter in llm.named_parameters():
        if ".cross." in name:
            yield name, parameter


def decoder_layers(llm: Any) -> nn.ModuleList:
    """Returns the decoder layers of a Hugging Face causal LM.

    Raises:
        UsageError: The model has no `layers` as decoder-only models do.
    """
    layers = getattr(llm.get_decoder() if hasattr(llm, "get_decoder") else llm, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(layers[0], "self_attn"):
        raise UsageError(f"{type(llm).__name__} is not a decoder-only LLM with layers that have self_attn")
    return layers


def _head_shape(config: Any, attention: Any) -> tuple[int, int, int]:
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0) or 1
    head_dim = getattr(attention, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, head_dim


def _mix_in(module: Any, mixin: type) -> None:
    # The class keeps its name: `save_pretrained` writes it into config.json as the architecture.
    cls = type(module)
    if not issubclass(cls, mixin):
        mixed: Any = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
        module.__class__ = mixed
