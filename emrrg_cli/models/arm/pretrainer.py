"""The stage 1 model: autoregressive image modelling, one cluster of patches after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from emrrg_cli.checksums import write_checksums
from emrrg_cli.errors import RunError, UsageError, require_path
from emrrg_cli.files.atomic import atomic_directory, read_directory, whole_directory
from emrrg_cli.files.records import read_bounded
from emrrg_cli.models.arm.encoder import CLUSTER, PATCH_SIZE, ArmEncoder, cluster_order, sincos_position_embedding
from emrrg_cli.models.weights import load_weights

PATCHES_PER_CLUSTER = CLUSTER * CLUSTER
PIXELS = PATCH_SIZE * PATCH_SIZE * 3  # values of a patch
HEAD_WIDTH = 64
WEIGHTS = "pretrainer.safetensors"
CONFIG = "pretrainer.json"


class PretrainOutput(NamedTuple):
    """`loss`: scalar, the mean over tokens and pixels; `prediction`: `[b, l - 16, 768]`, order as in `targets`."""

    loss: Tensor
    prediction: Tensor


def default_taps(depth: int, count: int = 4) -> tuple[int, ...]:
    """Returns the blocks, counted from 1, whose outputs the decoder reads, evenly spaced in the second half.

    For the published depths they are the published ones: 6, 8, 10, 12 of 12 and 12, 16, 20, 24 of 24. If the second
    half of the encoder has too few blocks, they are the last `count` blocks.

    Raises:
        ValueError: The encoder has fewer blocks than the decoder.
    """
    if depth < count:
        raise ValueError(f"an encoder of {depth} blocks is too shallow for a decoder of {count} blocks")
    step = max(1.0, depth / 2 / max(1, count - 1))
    return tuple(depth - round(step * back) for back in reversed(range(count)))


def patch_pixels(images: Tensor) -> Tensor:
    """Returns the pixels of the patches: `[b, 3, h, w] -> [b, l, 768]`, row-major; in a patch row, column, channel."""
    b, channels, h, w = images.shape
    x = images.reshape(b, channels, h // PATCH_SIZE, PATCH_SIZE, w // PATCH_SIZE, PATCH_SIZE)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, PIXELS)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values of other tokens; the width of a head is 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Attends from `x` `[b, t, width]` to `memory` `[b, s, width]` where `mask` `[t, s]` is true; shape of `x`."""
        b, t, width = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv(memory).view(b, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # scale head_dim^-0.5
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(b, t, width))
        return out


class MLP(nn.Module):
    """`fc2(gelu(fc1(x)))` with a hidden layer of four times the width and exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class DecoderBlock(nn.Module):
    """`x + attn(norm_q(x), norm_kv(memory))`, then `x + mlp(norm_mlp(x))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(width, eps=1e-5)
        self.norm_kv = nn.LayerNorm(width, eps=1e-5)
        self.attn = CrossAttention(width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Runs the block; shapes as in `CrossAttention`."""
        x = x + self.attn(self.norm_q(x), self.norm_kv(memory), mask)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class ArmPretrainer(nn.Module):
    """The encoder of stage 1, and a decoder that predicts each 64 x 64 cluster from the clusters before it.

    Tokens are in cluster order (`cluster_order`). The encoder gets all clusters but the last. The decoder predicts all
    but the first: the patches of cluster `c + 1` from clusters `0..c`. Pixels are normalised per patch, so that dark
    and bright films have the same weight.

    Args:
        d_model: `d`, width of the encoder.
        depth: Number of blocks of the encoder.
        image_size: Side of the square input in pixels, a multiple of 64, at least 128.
        d_state: `n`, the SSM state size.
        decoder_width: A multiple of 64 (the width of a head), or less than 64 and a multiple of 4 (one head).
        decoder_depth: Number of blocks of the decoder; each reads another block of the encoder.
        taps: Blocks of the encoder that the decoder reads, counted from 1, in rising order; None: `default_taps`.
        scan: Engine of the scan (`emrrg_cli.models.scan`).

    Raises:
        ValueError: The sizes do not fit together.

    Source: ARM (arXiv 2406.07537) section 3; MambaXray-VL (arXiv 2410.00379) section 3.1.
    """

    def __init__(
        self,
        d_model: int,
        depth: int,
        image_size: int = 192,
        d_state: int = 16,
        decoder_width: int = 512,
        decoder_depth: int = 4,
        taps: Sequence[int] | None = None,
        scan: str = "auto",
    ) -> None:
        super().__init__()
        if image_size < 2 * CLUSTER * PATCH_SIZE:
            raise ValueError(f"image_size must be at least 128, so that a cluster is predicted; got {image_size}")
        if decoder_width % (HEAD_WIDTH if decoder_width > HEAD_WIDTH else 4):
            raise ValueError(
                f"decoder_width must be a multiple of {HEAD_WIDTH}, or a smaller multiple of 4; got {decoder_width}"
            )
        self.taps = tuple(taps) if taps is not None else default_taps(depth, decoder_depth)
        if len(self.taps) != decoder_depth or sorted(set(self.taps) & set(range(1, depth + 1))) != list(self.taps):
            raise ValueError(
                f"taps must be {decoder_depth} blocks from 1 to {depth} in rising order, got {list(self.taps)}"
            )
        self.encoder = ArmEncoder(
            d_model,
            depth,
            image_size=image_size,
            d_state=d_state,
            drop_path=0.0,
            scan=scan,
            directions=1,
            class_token=False,
            final_norm=False,
        )
        self.d_state, self.decoder_width = d_state, decoder_width
        self.tap_norms = nn.ModuleList(nn.LayerNorm(d_model, eps=1e-5) for _ in range(decoder_depth))
        self.enc2dec = nn.Linear(decoder_depth * d_model, decoder_depth * decoder_width)
        self.ar_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.dec_pos_embed: Tensor
        self.register_buffer("dec_pos_embed", sincos_position_embedding(decoder_width, self.encoder.grid))
        self.blocks = nn.ModuleList(DecoderBlock(decoder_width) for _ in range(decoder_depth))
        self.norm = nn.LayerNorm(decoder_width, eps=1e-5)
        self.head = nn.Linear(decoder_width, PIXELS)

        self.order: Tensor
        self.register_buffer("order", cluster_order(self.encoder.grid), persistent=False)
        # The prediction of a token is one cluster ahead, so the same index is used for both.
        cluster = torch.arange(self.encoder.grid**2 - PATCHES_PER_CLUSTER) // PATCHES_PER_CLUSTER
        self.mask: Tensor
        self.register_buffer("mask", cluster[:, None] >= cluster[None, :], persistent=False)
        nn.init.normal_(self.ar_token, std=0.02)
        for module in (self.enc2dec, self.blocks, self.head):
            module.apply(_initialise)

    def forward(self, images: Tensor) -> PretrainOutput:
        """Predicts every cluster but the first.

        Args:
            images: `[b, 3, h, w]`, normalised, `h = w = image_size`.

        Raises:
            ValueError: The images have another size.
        """
        prediction = self.decode(self.encode(images))
        error = prediction.float() - self.targets(images)[0]
        return PretrainOutput(error.square().mean(), prediction)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Returns the taps of the encoder for all clusters but the last: `[b, l - 16, d]` each, in cluster order."""
        seen = self.order[:-PATCHES_PER_CLUSTER]
        steps = torch.arange(len(seen), device=seen.device)[None]
        return self.encoder.blocks(self.encoder.embed(images)[:, seen], steps, self.taps)

    def decode(self, taps: Sequence[Tensor]) -> Tensor:
        """Predicts `[b, l - 16, 768]` from the taps of `encode`: all clusters but the first, in cluster order."""
        joined = torch.cat([norm(tap) for norm, tap in zip(self.tap_norms, taps, strict=True)], dim=-1)
        memories = self.enc2dec(joined).unflatten(-1, (self.decoder_width, len(taps)))  # [b, l - 16, width, blocks]
        queries = self.ar_token + self.dec_pos_embed[:, self.order[PATCHES_PER_CLUSTER:]]
        x = queries.expand(joined.shape[0], -1, -1)
        for block, memory in zip(self.blocks, memories.unbind(-1), strict=True):
            x = block(x, memory, self.mask)
        out: Tensor = self.head(self.norm(x))
        return out

    def targets(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the targets of the prediction.

        Returns:
            Normalised pixels `[b, l - 16, 768]` (patch row, patch column, channel), and the mean and the standard
            deviation of each patch before, `[b, l - 16, 1]`; tokens in cluster order, fp32.
        """
        patches = patch_pixels(images.float())[:, self.order[PATCHES_PER_CLUSTER:]]
        mean = patches.mean(dim=-1, keepdim=True)
        deviation = (patches.var(dim=-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
        return (patches - mean) / deviation, mean, deviation

    def paste(self, patches: Tensor, onto: Tensor | None = None) -> Tensor:
        """Converts patches to images: `[b, l - 16, 768]`, in the order of `targets`, to `[b, 3, h, w]`.

        The first cluster, which is not in `patches`, is copied from `onto` (images `[b, 3, h, w]`), or 0.
        """
        b, size, grid = len(patches), self.encoder.image_size, self.encoder.grid
        pasted = patches.new_zeros(b, grid**2, PIXELS) if onto is None else patch_pixels(onto).to(patches.dtype)
        pasted[:, self.order[PATCHES_PER_CLUSTER:]] = patches
        x = pasted.view(b, grid, grid, PATCH_SIZE, PATCH_SIZE, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, size, size)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def save_pretrainer(directory: Path, model: ArmPretrainer) -> None:
    """Replaces `directory` by the model: `pretrainer.safetensors` (fp32) and `pretrainer.json` with its sizes.

    Raises:
        RunError: It cannot be written.
    """
    config = {
        "format": 1,
        "kind": "pretrainer",
        "d_model": model.encoder.d_model,
        "depth": len(model.encoder.layers),
        "d_state": model.d_state,
        "image_size": model.encoder.image_size,
        "decoder_width": model.decoder_width,
        "decoder_depth": len(model.blocks),
        "taps": list(model.taps),
    }
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_directory(directory) as temporary:
        save_file(state, temporary / WEIGHTS, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_checksums(temporary)


def find_pretrainer(path: Path) -> Path:
    """Returns the directory that `save_pretrainer` wrote: `path` itself, or `model/` of a run.

    Raises:
        UsageError: There is none.
    """
    for directory in (path, path / "model"):
        if (whole_directory(directory) / CONFIG).is_file():
            return directory
    raise UsageError(
        f"{path} contains no pre-trained model of stage 1 ({CONFIG})",
        hint="Name a run directory of `emrrg pretrain`, or a stage 1 directory that `emrrg convert` wrote.",
    )


def load_pretrainer(path: str | Path, scan: str = "auto") -> ArmPretrainer:
    """Loads the pre-trained model of stage 1, in evaluation mode, on the CPU in fp32.

    Args:
        path: Directory that `save_pretrainer` or `emrrg convert` wrote, or a run directory of `emrrg pretrain`.
        scan: Engine of the scan (`emrrg_cli.models.scan`).

    Returns:
        A module `[b, 3, h, w] -> PretrainOutput`.

    Raises:
        UsageError: There is no such model at `path`.
        RunError: Its files are broken or do not fit together.
    """
    return read_directory(find_pretrainer(require_path(path, "the model")), lambda directory: _read(directory, scan))


def _read(directory: Path, scan: str) -> ArmPretrainer:

    file = directory / CONFIG
    try:
        config = json.loads(read_bounded(file, 2**20))
        if config.pop("format") != 1 or config.pop("kind") != "pretrainer":
            raise ValueError("this version cannot read this format")
        model = ArmPretrainer(**config, scan=scan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} cannot be used: {error}") from error
    load_weights(model, directory / WEIGHTS)
    return model.eval()
