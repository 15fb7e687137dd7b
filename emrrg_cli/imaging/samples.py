"""Converts samples of any depth to 8-bit grey: the rules of `read_image` for arrays that Pillow does not support."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601


def stretch(values: NDArray[Any], used: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Maps [min, max] linearly to [0, 255], in float64, rounded to nearest. A constant array becomes 0.

    Args:
        values: Numbers of any type and shape; infinity and NaN are ignored and become the nearest end.
        used: The pixels whose smallest and largest value count; None: all.
    """
    values = values.astype(np.float64)
    counted = np.isfinite(values) if used is None else np.isfinite(values) & used
    low, high = (values[counted].min(), values[counted].max()) if counted.any() else (0.0, 0.0)
    values = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    span = high - low
    scaled = (values - low) / span * 255 if span > 0 else np.zeros_like(values)
    return np.asarray(np.floor(scaled + 0.5).astype(np.uint8))


def by_type(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Converts integers of `bits` bits by the range of their type: the high byte, or fewer bits scaled to 8."""
    unsigned = values.astype(np.int64 if bits < 63 else np.uint64)
    if values.dtype.kind == "i":
        unsigned = (values.astype(np.int64) + 2 ** (bits - 1)) if bits < 64 else values.view(np.uint64) ^ (1 << 63)
    if bits > 8:
        return np.asarray((unsigned >> (bits - 8)).astype(np.uint8))
    return np.asarray(np.floor(unsigned / (2**bits - 1) * 255 + 0.5).astype(np.uint8))


def luma(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Converts red, green and blue `[..., 3]`, 0 to 255, to grey `[...]`."""
    return np.asarray(np.floor(colours[..., :3] @ _LUMA + 0.5).astype(np.uint8))


def cmyk_to_rgb(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts cyan, magenta, yellow and black `[..., 4]` to red, green, blue `[..., 3]`, without a colour profile."""
    inverse = 255 - colours.astype(np.uint16)
    return np.asarray((inverse[..., :3] * inverse[..., 3:4] // 255).astype(np.uint8))


def grey_levels(values: NDArray[Any], bits: int, alpha: NDArray[Any] | None = None) -> NDArray[np.uint8]:
    """Converts grey `[h, w]` or red, green and blue `[h, w, 3]` to grey, as `read_image` does.

    Args:
        values: Integers or floats.
        bits: Bits of an integer sample. Above 8, grey is stretched and colour uses high bytes. Floats are stretched.
        alpha: `[h, w]`, from 0 (transparent, becomes black) to the largest value of its type.
    """
    opaque = None if alpha is None else alpha > 0
    if values.dtype.kind == "f" or (bits > 8 and values.ndim == 2):
        shown = stretch(values, opaque if opaque is None or values.ndim == 2 else opaque[..., None])
    else:
        shown = by_type(values, bits)
    grey = shown if shown.ndim == 2 else luma(shown)
    if alpha is None:
        return grey
    top = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    share = np.clip(alpha.astype(np.float64) / top, 0, 1)
    return np.asarray(np.floor(grey * share + 0.5).astype(np.uint8))
