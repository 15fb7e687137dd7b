"""Random augmentation of training images, on the device of the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from emrrg_cli.recipe.common import AugmentSettings


def augmented(pixels: Tensor, settings: AugmentSettings) -> Tensor:
    """Rotates, shifts and scales grey images and changes their brightness and contrast, each by random amounts.

    The amounts are uniform up to the limits in the recipe and come from the random generator of the device. Areas
    outside the original image are black. Images are not mirrored.

    Args:
        pixels: uint8 `[n, h, w]`.

    Returns:
        `[n, h, w]`, fp32, 0 to 255; unchanged if every setting is 0.
    """
    images = pixels.float()
    if not any(settings.model_dump().values()):
        return images
    draws = torch.rand(6, len(images), device=pixels.device) * 2 - 1  # [6, n], -1 to 1
    images = _moved(images, draws, settings)
    middle = images.mean(dim=(1, 2), keepdim=True)
    contrast, brightness = (draw[:, None, None] for draw in (draws[4], draws[5]))
    images = (images - middle) * (1 + settings.contrast * contrast) + middle
    return (images + 255 * settings.brightness * brightness).clamp(0, 255)


def _moved(images: Tensor, draws: Tensor, settings: AugmentSettings) -> Tensor:
    if not (settings.rotate or settings.shift or settings.scale):
        return images
    angle = math.radians(settings.rotate) * draws[0]
    size = 1 + settings.scale * draws[1]
    # The grid is the source position of each output pixel, so the image moves in the opposite direction. Its unit is
    # half a side; images that are not square would be sheared.
    across, down = 2 * settings.shift * draws[2], 2 * settings.shift * draws[3]
    cos, sin = angle.cos() / size, angle.sin() / size
    matrix = torch.stack([torch.stack([cos, -sin, across], dim=-1), torch.stack([sin, cos, down], dim=-1)], dim=-2)
    with torch.autocast(images.device.type, enabled=False):  # bf16 would round positions by up to a pixel
        grid = F.affine_grid(matrix, [len(images), 1, *images.shape[1:]], align_corners=False)
        return F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
