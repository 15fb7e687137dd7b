"""Converts the stored values of a DICOM image to 8-bit grey: the rules of PS3.3, and our rules where it has none.

In this order, for images with one sample per pixel:

1. Padding: pixels of Pixel Padding Value (to Pixel Padding Range Limit) are ignored and become black.
2. Modality: the Modality LUT, else rescale slope and intercept, else no change.
3. Values of interest: the first VOI LUT, else the first window (LINEAR, LINEAR_EXACT or SIGMOID). If it
   hides the image (99 percent of the pixels at one end), it is ignored, with a note.
4. Without them: up to 8 bits stored, the whole range of the type; more bits, linear between the 0.1 and the 99.9
   percentile of the pixels, because markers and dead detector elements are at the ends.
5. MONOCHROME1 is inverted, so that air is dark.

All of this depends only on the value of a pixel, so it is computed once per value and looked up for each pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from emrrg_cli.imaging.dicom.file import number, text
from emrrg_cli.imaging.dicom.luts import Levels, first_lut

_LEVELS = 65_536
_BLOCK = 4_000_000  # pixels looked up at a time, so that a large film needs little more memory than its result
_USELESS = 0.99
_PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class _Histogram:
    """Every stored value in use, lowest first (values of more than 16 bits in steps), and how many pixels have it."""

    low: int
    step: int
    values: Levels
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """The values of an image.

    Attributes:
        values: Integers, `[h, w]` or `[h, w, 3]`.
        words: The same, with the bits above and below the stored ones.
        bits: Stored bits of a value.
        signed: Whether values are signed.
    """

    values: NDArray[Any]
    words: NDArray[Any]
    bits: int
    signed: bool

    @property
    def low(self) -> int:
        """The lowest value that can be stored."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """The highest value that can be stored."""
        return self.low + (1 << self.bits) - 1


def grey(samples: Samples, header: Dataset) -> tuple[NDArray[np.uint8], list[str]]:
    """Applies the rules above.

    Args:
        samples: One sample per pixel.
        header: Header of the file.

    Returns:
        uint8 `[h, w]`, 0 black to 255 white, and notes for people.
    """
    values, signed = samples.values, samples.signed
    padding = _padding(samples, header)
    if padding is not None and padding.all():
        return np.zeros(values.shape, np.uint8), ["black: all pixels are padding"]
    histogram = _histogram(values, padding)
    modality = _modality(histogram.values, header, signed)
    shown, notes = _values_of_interest(modality, histogram.counts, header, _negative(samples, header))
    if shown is None:
        ends = _type_range(samples, header) if samples.bits <= 8 else _percentiles(modality, histogram.counts)
        shown = _linear(modality, *ends)
    if text(header, "PhotometricInterpretation").upper() == "MONOCHROME1":
        shown = 1 - shown
    table = np.floor(np.clip(shown, 0, 1) * 255 + 0.5).astype(np.uint8)
    result = _look_up(values, histogram, table)
    if padding is not None:
        result[padding] = 0
    return result, notes


def _padding(samples: Samples, header: Dataset) -> NDArray[np.bool_] | None:
    """Returns the pixels that are padding; None if there are none.

    The value should have the sign of the pixels (PS3.3 C.7.5.1.1.2). A value that no pixel can have was written with
    the other sign or for whole words, so its bits are compared.
    """
    first = number(header, "PixelPaddingValue")
    if first is None:
        return None
    limit = number(header, "PixelPaddingRangeLimit")
    ends = [int(end) for end in (first, first if limit is None else limit)]
    if all(samples.low <= end <= samples.high for end in ends):
        mask = _between(samples.values, ends)
    else:
        word = 8 * samples.words.itemsize
        mask = _between(samples.words, [end % 2**word for end in ends])
        if not mask.any():
            stored = [end % 2**samples.bits for end in ends]
            mask = _between(samples.values, [end - 2**samples.bits if end > samples.high else end for end in stored])
    return mask if mask.any() else None


def _between(values: NDArray[Any], ends: list[int]) -> NDArray[np.bool_]:
    return np.asarray((values >= min(ends)) & (values <= max(ends)))


def _histogram(values: NDArray[Any], padding: NDArray[np.bool_] | None) -> _Histogram:
    used = values if padding is None else values[~padding]
    low, high = int(used.min()), int(used.max())
    step = (high - low) // _LEVELS + 1
    counts = np.zeros((high - low) // step + 1, np.int64)
    flat = used.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        counts += np.bincount(_level(flat[start : start + _BLOCK], low, step), minlength=len(counts))
    return _Histogram(low, step, low + step * np.arange(len(counts), dtype=np.float64), counts)


def _level(values: NDArray[Any], low: int, step: int) -> NDArray[np.int64]:
    above = values.astype(np.int64) - low
    return above if step == 1 else above // step


def _look_up(values: NDArray[Any], histogram: _Histogram, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    flat = values.reshape(-1)
    result = np.empty(flat.size, np.uint8)
    for start in range(0, flat.size, _BLOCK):
        levels = _level(flat[start : start + _BLOCK], histogram.low, histogram.step)
        result[start : start + _BLOCK] = table[np.clip(levels, 0, len(table) - 1)]  # padding is outside of the table
    return result.reshape(values.shape)


def _modality(values: Levels, header: Dataset, signed: bool) -> Levels:
    if (lut := first_lut(header, "ModalityLUTSequence", signed=signed)) is not None:
        return lut.apply(values)
    slope, intercept = number(header, "RescaleSlope"), number(header, "RescaleIntercept")
    return values * (slope or 1.0) + (intercept or 0.0)  # a slope of 0 would remove the image


def _type_range(samples: Samples, header: Dataset) -> tuple[float, float]:
    """Returns the whole range of the stored type, after the transform of the modality."""
    ends = _modality(np.array([samples.low, samples.high], np.float64), header, samples.signed)
    return float(ends.min()), float(ends.max())


def _negative(samples: Samples, header: Dataset) -> bool:
    """Whether the input of a VOI LUT may be negative; the output of a modality LUT never is (C.11.1.1)."""
    return _type_range(samples, header)[0] < 0


def _values_of_interest(
    values: Levels, counts: NDArray[np.int64], header: Dataset, negative: bool
) -> tuple[Levels | None, list[str]]:
    """Returns the values as the file displays them, 0 to 1; None if it has no usable LUT or window, and notes."""
    lut = first_lut(header, "VOILUTSequence", signed=negative)
    what = "window" if lut is None else "VOI LUT"
    shown = _window(values, header) if lut is None else lut.apply(values) / lut.white
    if shown is None:
        return None, []
    shown = np.clip(shown, 0, 1)
    pixels = counts.sum()
    at_one_end = max(counts[shown <= 0.002].sum(), counts[shown >= 0.998].sum())
    if len(values) > 1 and at_one_end >= _USELESS * pixels:
        return None, [f"{what} ignored: it shows nothing of the image"]
    return shown, []


def _window(values: Levels, header: Dataset) -> Levels | None:
    """Applies the first window (PS3.3 C.11.2.1.2); a width below 1, not allowed in LINEAR, counts as LINEAR_EXACT."""
    center, width = number(header, "WindowCenter"), number(header, "WindowWidth")
    if center is None or width is None or width <= 0:
        return None
    function = text(header, "VOILUTFunction").upper()
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -500, 500))))
    if function == "LINEAR_EXACT" or width < 1:
        return (values - center) / width + 0.5
    return (values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5


def _linear(values: Levels, low: float, high: float) -> Levels:
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _percentiles(values: Levels, counts: NDArray[np.int64]) -> tuple[float, float]:
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(counts[order])
    ranks = [percent / 100 * (cumulative[-1] - 1) for percent in _PERCENTILES]
    low, high = (float(values[order[np.searchsorted(cumulative, rank, side="right")]]) for rank in ranks)
    return (low, high) if high > low else (float(values.min()), float(values.max()))
