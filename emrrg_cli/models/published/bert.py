"""The text tower of a published stage 2 checkpoint: a BERT. Its sizes are read from its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emrrg_cli.models.encoder_files import depth_of

if TYPE_CHECKING:
    from transformers import BertConfig

# The same in all published BERT models. The number of heads cannot be read from the tensors.
HEAD_WIDTH = 64


def usual_heads(width: int) -> int:
    """Returns the usual number of attention heads of a BERT of this width; the tensors do not show it."""
    return width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1


def bert_config(tensors: Mapping[str, Tensor]) -> BertConfig | None:
    """Returns the configuration of the BERT with these tensors; None if they are not those of a BERT.

    Args:
        tensors: Tensors by the names of `transformers.BertModel`.
    """
    from transformers import BertConfig

    embeddings = [tensors.get(f"embeddings.{name}_embeddings.weight") for name in ("word", "position", "token_type")]
    hidden = tensors.get("encoder.layer.0.intermediate.dense.weight")
    matrices = [tensor for tensor in (*embeddings, hidden) if tensor is not None and tensor.dim() == 2]
    if len(matrices) < 4:
        return None
    word, position, token_type, hidden = matrices
    width = word.shape[1]
    layers = {int(found[1]) for name in tensors if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    return BertConfig(
        architectures=["BertModel"],
        vocab_size=word.shape[0],
        hidden_size=width,
        num_hidden_layers=depth_of(layers),
        num_attention_heads=usual_heads(width),
        intermediate_size=hidden.shape[0],
        max_position_embeddings=position.shape[0],
        type_vocab_size=token_type.shape[0],
    )


def bert_shapes(config: Any, *, pooler: bool) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors of a BERT, with or without the pooler on its first token."""
    from transformers import BertModel

    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=pooler)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
