"""The vision backbone: ARM, a Mamba encoder that scans the patches in four directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emrrg_cli.models.arm.mixer import Block

PATCH_SIZE = 16


def direction_orders(grid: int) -> Tensor:
    """Token orders of the four directions, the class token staying in the middle of each.

    Args:
        grid: patches on a side.

    Returns:
        `[4, grid**2 + 1]`, int64: row-major, its reverse, column-major, its reverse. Entry `[k, t]` is the row-order
        index of the token visited at step `t`. The published code has no rule for an odd number of patches; here the
        class token is token `patches // 2` of the row and the column order alike.
    """
    patches = grid * grid
    middle = patches // 2
    rows = torch.arange(patches + 1)
    columns = torch.arange(patches).view(grid, grid).T.flatten()
    columns = columns + (columns >= middle).long()  # patch index -> token index, past the class token
    columns = torch.cat([columns[:middle], torch.tensor([middle]), columns[middle:]])
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])


class ArmEncoder(nn.Module):
    """ARM encoder, "v3": `[b, 3, h, w] -> [b, l + 1, d]`, class token included, in the middle.

    Args:
        d_model: `d`, the width (base 768, large 1024, huge 1536).
        depth: number of blocks (12, 24, 24).
        image_size: side of the square input in pixels, a multiple of 16.
        d_state: `n`, the SSM state size.
        drop_path: the largest stochastic depth rate; block `i` takes entry `i` of `[0] + linspace(0, rate, depth)`.
        scan: engine of the scan (`emrrg_cli.models.scan`).

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
    ) -> None:
        super().__init__()
        if image_size % PATCH_SIZE:
            raise ValueError(f"image_size must be a multiple of {PATCH_SIZE}, got {image_size}")
        self.d_model = d_model
        self.image_size = image_size
        self.grid = image_size // PATCH_SIZE
        self.gradient_checkpointing = False
        patches = self.grid**2
        self.patch_embed = nn.Conv2d(3, d_model, PATCH_SIZE, stride=PATCH_SIZE)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, d_model))
        rates = [0.0, *torch.linspace(0, drop_path, depth, device="cpu").tolist()]
        self.layers = nn.ModuleList(
            Block(d_model, d_state, directions=4, depth=depth, drop_path=rates[i], scan=scan) for i in range(depth)
        )
        self.norm_f = nn.LayerNorm(d_model, eps=1e-5)
        self.register_buffer("order", direction_orders(self.grid), persistent=False)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes normalised images.

        Args:
            images: `[b, 3, h, w]`, `h = w = image_size`.

        Returns:
            `[b, l + 1, d]`, `l = (h / 16)**2`; the class token is token `l // 2`.

        Raises:
            ValueError: for images of another size.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            expected = [3, self.image_size, self.image_size]
            raise ValueError(f"images must be [b, {', '.join(map(str, expected))}], got {list(images.shape)}")
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [b, l, d]
        middle = x.shape[1] // 2
        cls = self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
        x = torch.cat([x[:, :middle], cls, x[:, middle:]], dim=1) + self.pos_embed
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, self.order, use_reentrant=False)
            else:
                x = layer(x, self.order)
        out: Tensor = self.norm_f(x)
        return out
