"""The published names and shapes of tensors, and their conversion to ours and back.

A `Piece` is one step of the conversion: some published tensors are reshaped, split into rows or stacked, and give some
of ours. Every step can be reversed exactly, so a checkpoint can be restored. Every step is linear, so it can also
convert gradients. Our names share one namespace: `encoder.*` for the encoder, and `bridge.*` (stage 3),
`text_encoder.*`, `vision_proj.*`, `text_proj.*`, `logit_scale` (stage 2), or the decoder by the names of
`ArmPretrainer` (stage 1).

Source: released checkpoints of MambaXray-VL (arXiv 2410.00379) and EMRRG (arXiv 2510.16776).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from emrrg_cli.models.arm.encoder import CLUSTER, PATCH_SIZE
from emrrg_cli.models.encoder_files import EncoderConfig, depth_of

Shape = tuple[int, ...]

# Row-major, reversed, column-major, reversed: the order of our directions.
SUFFIXES = ("", "_b", "_c", "_c_b")
A_LOGS = ("A_log", "A_b_log", "A_c_log", "A_c_b_log")
D_CONV = 4
PIXELS = PATCH_SIZE * PATCH_SIZE * 3
MLP_RATIO = 4  # hidden width of the decoder's MLP, in widths of the decoder


@dataclass(frozen=True)
class Piece:
    """One step of the conversion.

    Args:
        published: Names and shapes of the published tensors.
        ours: Names of our tensors.
        how: `same`: one tensor, which may be reshaped; `rows`: the rows of one tensor are split into several of ours;
            `stack`: several tensors are stacked along a new first axis.
        sizes: With `rows`, the number of rows of each of our tensors.
        shape: With `same`, the shape of our tensor; with `stack`, the shape of one entry.
    """

    published: Mapping[str, Shape]
    ours: tuple[str, ...]
    how: Literal["same", "rows", "stack"]
    sizes: tuple[int, ...] = ()
    shape: Shape = ()

    def to_ours(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns our tensors of this piece, from the published ones."""
        tensors = [published[name] for name in self.published]
        if self.how == "rows":
            return dict(zip(self.ours, torch.split(tensors[0], list(self.sizes)), strict=True))
        shaped = [tensor.reshape(self.shape) for tensor in tensors]
        return {self.ours[0]: shaped[0] if self.how == "same" else torch.stack(shaped)}

    def to_published(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the published tensors of this piece, from ours."""
        tensors = [ours[name] for name in self.ours]
        if self.how == "rows":
            tensors = [torch.cat(tensors)]
        elif self.how == "stack":
            tensors = list(tensors[0])
        return {
            name: tensor.reshape(shape) for (name, shape), tensor in zip(self.published.items(), tensors, strict=True)
        }

    def prefixed(self, published: str, ours: str) -> Piece:
        """Returns the same piece with prefixes before all names."""
        names = {published + name: shape for name, shape in self.published.items()}
        return replace(self, published=names, ours=tuple(ours + name for name in self.ours))


def to_ours(pieces: Iterable[Piece], published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns our tensors of all pieces, from the published ones, which must all exist."""
    return {name: tensor for piece in pieces for name, tensor in piece.to_ours(published).items()}


def to_published(pieces: Iterable[Piece], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the published tensors of all pieces, from ours, which must all exist."""
    return {name: tensor for piece in pieces for name, tensor in piece.to_published(ours).items()}


def _same(published: str, shape: Shape, ours: str | None = None) -> Piece:
    return Piece({published: shape}, (published if ours is None else ours,), "same", shape=shape)


def _linear(published: str, out: int, width: int, ours: str | None = None) -> list[Piece]:
    name = published if ours is None else ours
    return [
        _same(f"{published}.weight", (out, width), f"{name}.weight"),
        _same(f"{published}.bias", (out,), f"{name}.bias"),
    ]


def _norm(published: str, width: int, ours: str | None = None) -> list[Piece]:
    name = published if ours is None else ours
    return [_same(f"{published}.{part}", (width,), f"{name}.{part}") for part in ("weight", "bias")]


def encoder_pieces(config: EncoderConfig) -> list[Piece]:
    """Returns the pieces of an encoder.

    In stages 2 and 3 it has four directions, a class token and a final norm. In stage 1 it has one direction and
    neither class token nor final norm.
    """
    d, tokens = config.d_model, config.grid**2 + config.class_token
    pieces = [
        _same("pos_embed", (1, tokens, d)),
        _same("patch_embed.proj.weight", (d, 3, PATCH_SIZE, PATCH_SIZE), "patch_embed.weight"),
        _same("patch_embed.proj.bias", (d,), "patch_embed.bias"),
    ]
    if config.class_token:
        pieces += [_same("cls_token", (1, 1, d)), *_norm("norm_f", d)]
    for i in range(config.depth):
        pieces += [piece.prefixed(f"layers.{i}.", f"layers.{i}.") for piece in _block(config)]
    return pieces


def _block(config: EncoderConfig) -> list[Piece]:
    d, n, rank = config.d_model, config.d_state, math.ceil(config.d_model / 16)
    hidden = d * 4 * 2 // 3
    suffixes = SUFFIXES[: config.directions]

    def stack(names: Iterable[str], shape: Shape, ours: str, entry: Shape | None = None) -> Piece:
        return Piece(dict.fromkeys(names, shape), (ours,), "stack", shape=entry or shape)

    mixer = [
        Piece({"in_proj.weight": (2 * d, d)}, ("X.weight", "Z.weight"), "rows", (d, d)),
        stack((f"conv1d{s}.weight" for s in suffixes), (d, 1, D_CONV), "conv_weight", (d, D_CONV)),
        stack((f"conv1d{s}.bias" for s in suffixes), (d,), "conv_bias"),
        stack(A_LOGS[: config.directions], (d, n), "A_log"),
        stack((f"D{s}" for s in suffixes), (d,), "D"),
        _same("out_proj.weight", (d, d)),
    ]
    for k, s in enumerate(suffixes):
        ours = tuple(f"directions.{k}.{name}.weight" for name in ("dt", "B", "C"))
        mixer.append(Piece({f"x_proj{s}.weight": (rank + 2 * n, d)}, ours, "rows", (rank, n, n)))
        mixer += _linear(f"dt_proj{s}", d, rank, f"directions.{k}.dt_proj")
    mlp = [
        piece
        for name, out, width in (("w1", hidden, d), ("w2", hidden, d), ("w3", d, hidden))
        for piece in _linear(f"mlp.{name}", out, width)
    ]
    return [*_norm("norm1", d), *(piece.prefixed("mixer.", "mixer.") for piece in mixer), *_norm("norm2", d), *mlp]


def decoder_pieces(config: EncoderConfig, width: int, depth: int) -> list[Piece]:
    """Returns the pieces of the stage 1 decoder with this width and number of blocks, for the encoder of `config`."""
    d = config.d_model
    pieces = [
        _same("ar_token", (1, 1, width)),
        _same("dec_pos_embed", (1, config.grid**2, width)),
        *_linear("enc2dec", depth * width, depth * d),
    ]
    for j in range(depth):
        block = [
            *_linear("attn2.q", width, width, "attn.q"),
            *_linear("attn2.kv", 2 * width, width, "attn.kv"),
            *_linear("attn2.proj", width, width, "attn.proj"),
            *_norm("norm2_1", width, "norm_q"),
            *_norm("norm2_2", width, "norm_kv"),
            *_norm("norm2", width, "norm_mlp"),
            *_linear("mlp.fc1", MLP_RATIO * width, width),
            *_linear("mlp.fc2", width, MLP_RATIO * width),
        ]
        pieces += _norm(f"norm_{j + 1}", d, f"tap_norms.{j}")
        pieces += [piece.prefixed(f"dec_block.{j}.", f"blocks.{j}.") for piece in block]
    return [*pieces, *_norm("ar_norm", width, "norm"), *_linear("ar_pred", PIXELS, width, "head")]


def alignment_pieces(d_model: int, text_width: int, dim: int, scale_shape: Shape = ()) -> list[Piece]:
    """Returns the pieces of the projections and the temperature of stage 2, which may have shape `[]` or `[1]`."""
    scale = replace(_same("logit_scale", scale_shape), shape=())
    return [*_linear("vision_proj", dim, d_model), *_linear("text_proj", dim, text_width), scale]


def bridge_pieces(d_model: int, hidden_size: int) -> list[Piece]:
    """Returns the pieces of the bridge between encoder and LLM in stage 3."""
    return [
        *_linear("llama_proj", hidden_size, d_model, "bridge.proj"),
        *_norm("layer_norm", hidden_size, "bridge.norm"),
    ]


def block_causal_mask(clusters: int) -> Tensor:
    """Returns the additive mask of the stage 1 decoder: `[16 c, 16 c]`, 0 where a query attends and -inf elsewhere.

    Rows are the patches of clusters 1 to `c`, columns those of clusters 0 to `c - 1`, both in cluster order. A query of
    cluster `i + 1` attends to the clusters 0 to `i`.

    Args:
        clusters: `c`, the number of clusters of an image minus 1.
    """
    cluster = torch.arange(clusters * CLUSTER**2) // CLUSTER**2
    return torch.zeros(len(cluster), len(cluster)).masked_fill(cluster[:, None] < cluster[None, :], -math.inf)


def is_block_causal(mask: Tensor, grid: int) -> bool:
    """Whether a mask is equivalent to `block_causal_mask` for an image of `grid` patches per side.

    It may have additional leading axes, an additional row and column of blocks for the last cluster, and for hidden
    patches any number that a softmax turns into zero.
    """
    clusters = grid * grid // CLUSTER**2
    sizes = [CLUSTER**2 * count for count in (clusters - 1, clusters)]
    if mask.dim() < 2 or mask.shape[-1] not in sizes or mask.shape[-2] != mask.shape[-1]:
        return False
    expected = block_causal_mask(mask.shape[-1] // CLUSTER**2)
    seen = expected == 0
    values = mask.float()
    return bool((values[..., seen] == 0).all() and (values[..., ~seen] <= -1e4).all())


def sizes_of(published: Mapping[str, Tensor], *, class_token: bool) -> EncoderConfig | None:
    """Returns the sizes of a published encoder, each the most frequent one; None if too many tensors are missing.

    Args:
        published: Tensors by the names of `encoder_pieces`.
        class_token: Whether the encoder has one, as in stages 2 and 3.
    """
    numbers = {int(part[1]) for name in published if (part := name.split("."))[0] == "layers" and part[1].isdecimal()}
    width = _most_common(published, ".norm1.weight", 0)
    d_state = _most_common(published, ".A_log", 1)
    position = published.get("pos_embed")
    if not numbers or width is None or d_state is None or position is None or position.dim() != 3:
        return None
    grid = math.isqrt(max(0, position.shape[1] - class_token))
    directions = len(SUFFIXES) if class_token else 1
    return EncoderConfig(width, depth_of(numbers), d_state, grid * PATCH_SIZE, directions, class_token)


def _most_common(tensors: Mapping[str, Tensor], ending: str, axis: int) -> int | None:
    sizes: Sequence[int] = [t.shape[axis] for name, t in tensors.items() if name.endswith(ending) and t.dim() > axis]
    return max(set(sizes), key=sizes.count) if sizes else None
