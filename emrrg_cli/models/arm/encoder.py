"""The vision backbone: ARM, a Mamba encoder that scans the patches in four directions."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emrrg_cli.models.arm.mixer import Block

PATCH_SIZE = 16
CLUSTER = 4  # patches per side of a cluster of stage 1


def sincos_position_embedding(d_model: int, grid: int) -> Tensor:
    """Returns the fixed 2-D sine and cosine embedding of a square grid of patches, row-major.

    The first half of the channels encodes the column, the second half the row, as in MAE. Each half contains
    `sin(position * 10000**(-i / q))` for `i = 0..q - 1`, then the cosines of the same angles, with `q = d_model / 4`.

    Args:
        d_model: `d`, a multiple of 4.
        grid: Number of patches per side.

    Returns:
        `[1, grid**2, d]`, fp32.

    Raises:
        ValueError: The width is not a multiple of 4.

    Source: MAE (arXiv 2111.06377), appendix A.1; Attention is all you need (arXiv 1706.03762), section 3.5.
    """
    if d_model % 4:
        raise ValueError(f"a 2-D sine and cosine embedding needs a width that is a multiple of 4, got {d_model}")
    positions = torch.arange(grid, dtype=torch.float64)
    quarter = d_model // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = positions[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, d / 2]
    columns = line[None].expand(grid, -1, -1)
    rows = line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, d_model).float()


def cluster_order(grid: int) -> Tensor:
    """Returns the order in which stage 1 visits the patches: one 4 x 4 cluster after the other.

    The clusters, and the patches in each cluster, are in row-major order.

    Args:
        grid: Number of patches per side, a multiple of 4.

    Returns:
        `[grid**2]`, int64: entry `t` is the row-major index of the patch visited at step `t`.

    Raises:
        ValueError: The grid is not a multiple of 4.

    Source: ARM (arXiv 2406.07537) section 3.1.
    """
    if grid % CLUSTER:
        side = CLUSTER * PATCH_SIZE
        raise ValueError(f"image_size must be a multiple of {side} for clusters, got {grid * PATCH_SIZE}")
    side = grid // CLUSTER
    patches = torch.arange(grid * grid).view(side, CLUSTER, side, CLUSTER)
    return patches.transpose(1, 2).flatten()


def direction_orders(grid: int) -> Tensor:
    """Returns the token orders of the four directions, each with the class token in the middle.

    Args:
        grid: Number of patches per side.

    Returns:
        `[4, grid**2 + 1]`, int64: row-major, its reverse, column-major, its reverse. Entry `[k, t]` is the row-order
        index of the token visited at step `t`. The published code has no rule for an odd number of patches; here the
        class token is token `patches // 2` of both the row and the column order.
    """
    patches = grid * grid
    middle = patches // 2
    rows = torch.arange(patches + 1)
    columns = torch.arange(patches).view(grid, grid).T.flatten()
    columns = columns + (columns >= middle).long()  # patch index -> token index, past the class token
    columns = torch.cat([columns[:middle], torch.tensor([middle]), columns[middle:]])
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])


class ArmEncoder(nn.Module):
    """ARM encoder, "v3": `[b, 3, h, w] -> [b, l + 1, d]`, with the class token in the middle.

    With `directions=1, class_token=False, final_norm=False` it is the encoder of stage 1: `[b, 3, h, w] -> [b, l, d]`.
    It scans in cluster order, `pos_embed` is a fixed buffer, and there are no `cls_token` and `norm_f`.

    Args:
        d_model: `d`, the width (base 768, large 1024, huge 1536).
        depth: Number of blocks (12, 24, 24).
        image_size: Side of the square input in pixels, a multiple of 16; with one direction, a multiple of 64.
        d_state: `n`, the SSM state size.
        drop_path: Largest stochastic depth rate; block `i` has entry `i` of `[0] + linspace(0, rate, depth)`.
        scan: Engine of the scan (`emrrg_cli.models.scan`).
        directions: 4 (stages 2 and 3: rows, columns, and both reversed), or 1 (stage 1: cluster order).
        class_token: Whether there are a class token in the middle and learned position embeddings; else the position
            embeddings are fixed sines and cosines. True with four directions, false with one.
        final_norm: Whether there is a LayerNorm after the last block.

    Raises:
        ValueError: A size or a combination of arguments is not supported.

    Source: ARM (arXiv 2406.07537) section 3; MambaXray-VL (arXiv 2410.00379) section 3.
    """

    def __init__(
        self,
        d_model: int,
        depth: int,
        image_size: int = 224,
        d_state: int = 16,
        drop_path: float = 0.1,
        scan: str = "auto",
        *,
        directions: int = 4,
        class_token: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        if image_size % PATCH_SIZE:
            raise ValueError(f"image_size must be a multiple of {PATCH_SIZE}, got {image_size}")
        if (directions, class_token) not in ((4, True), (1, False)):
            raise ValueError(
                f"four directions need a class token, one direction must have none: got {directions=}, {class_token=}"
            )
        self.d_model = d_model
        self.image_size = image_size
        self.grid = image_size // PATCH_SIZE
        self.order: Tensor
        self.gradient_checkpointing = False
        patches = self.grid**2
        self.patch_embed = nn.Conv2d(3, d_model, PATCH_SIZE, stride=PATCH_SIZE)
        self.cls_token: nn.Parameter | None = None
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
            self.pos_embed: Tensor = nn.Parameter(torch.zeros(1, patches + 1, d_model))
            order = direction_orders(self.grid)
        else:
            self.register_buffer("pos_embed", sincos_position_embedding(d_model, self.grid))
            order = cluster_order(self.grid)[None]
        rates = [0.0, *torch.linspace(0, drop_path, depth, device="cpu").tolist()]
        self.layers = nn.ModuleList(
            Block(d_model, d_state, directions, depth=depth, drop_path=rates[i], scan=scan) for i in range(depth)
        )
        self.norm_f = nn.LayerNorm(d_model, eps=1e-5) if final_norm else nn.Identity()
        self.register_buffer("order", order, persistent=False)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes normalised images.

        Args:
            images: `[b, 3, h, w]`, `h = w = image_size`.

        Returns:
            `[b, l + 1, d]`, `l = (h / 16)**2`; the class token is token `l // 2`. Without a class token `[b, l, d]`.
            The patches are row-major.

        Raises:
            ValueError: The images have another size.
        """
        (last,) = self.blocks(self.embed(images), self.order, taps=[len(self.layers)])
        out: Tensor = self.norm_f(last)
        return out

    def freeze_mixers(self) -> None:
        """Keeps the stacked weights of mixers that are not trained; see `Mixer.freeze`."""
        for layer in self.layers:
            layer.mixer.freeze()  # type: ignore[operator,union-attr]

    def embed(self, images: Tensor) -> Tensor:
        """Returns the input of the first block: patches with class token and position embedding, as in `forward`."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            expected = [3, self.image_size, self.image_size]
            raise ValueError(f"images must be [b, {', '.join(map(str, expected))}], got {list(images.shape)}")
        x: Tensor = self.patch_embed(images).flatten(2).transpose(1, 2)  # [b, l, d]
        if self.cls_token is not None:
            middle = x.shape[1] // 2
            cls = self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
            x = torch.cat([x[:, :middle], cls, x[:, middle:]], dim=1)
        return x + self.pos_embed

    def blocks(self, x: Tensor, order: Tensor, taps: Collection[int]) -> list[Tensor]:
        """Runs the blocks over any sequence of tokens.

        Args:
            x: `[b, t, d]`.
            order: `[K, t]`, the tokens that each direction visits.
            taps: The blocks, counted from 1, whose outputs are returned.

        Returns:
            The output `[b, t, d]` of each block of `taps`, in the order of the blocks, before the final norm.
        """
        found = []
        for number, layer in enumerate(self.layers, start=1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, order, use_reentrant=False)
            else:
                x = layer(x, order)
            if number in taps:
                found.append(x)
        return found
