"""Joins the tokens of a study's views and pools patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def average_views(tokens: Tensor, views: Tensor) -> Tensor:
    """Averages the views of each study: `[n, l, d] -> [b, l, d]`, `views` `[b]` summing to `n`."""
    studies = torch.arange(len(views), device=views.device)
    study = torch.repeat_interleave(studies, views, output_size=len(tokens))  # [n]; output_size avoids a wait
    weight = F.one_hot(study, len(views)).T.to(tokens.dtype) / views[:, None]  # [b, n]
    # A product rather than index_add: the same order of summation on every run.
    return torch.einsum("bn,nld->bld", weight.to(tokens.dtype), tokens)


def concatenate_views(tokens: Tensor, views: Tensor) -> tuple[Tensor, Tensor | None]:
    """Concatenates the views of each study: `[n, l, d] -> [b, v * l, d]` and a mask `[b, v * l]`.

    `v` is the largest number of views of a study. Studies with fewer views are padded with zeros at the end; without
    padding, the mask is None.
    """
    length, d = tokens.shape[1:]
    counts: list[int] = views.tolist()
    most = max(counts)
    if all(count == most for count in counts):
        return tokens.reshape(len(counts), most * length, d), None
    rows = [
        F.pad(group.reshape(-1, d), (0, 0, 0, most * length - group.shape[0] * length))
        for group in torch.split(tokens, counts)
    ]
    mask = torch.arange(most * length, device=tokens.device) < views[:, None] * length
    return torch.stack(rows), mask


def pool_patches(tokens: Tensor) -> Tensor:
    """Averages 2x2 patches, keeps the class token: `[n, g*g + 1, d] -> [n, ceil(g/2)**2 + 1, d]`, row-major."""
    patches = tokens.shape[1] - 1
    grid = math.isqrt(patches)
    middle = patches // 2
    cls = tokens[:, middle : middle + 1]
    rest = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    rest = rest.transpose(1, 2).reshape(tokens.shape[0], -1, grid, grid)
    rest = F.avg_pool2d(rest, 2, ceil_mode=True).flatten(2).transpose(1, 2)
    half = rest.shape[1] // 2
    return torch.cat([rest[:, :half], cls, rest[:, half:]], dim=1)
