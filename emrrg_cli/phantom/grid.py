"""Coordinates of a film, smooth curves, smooth noise. Uses float32 and no BLAS, because sums that depend on the number
of threads would change some grey values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# float32 at run time; numpy's stubs widen the type of products with a Python float.
F32 = NDArray[np.floating[Any]]

# After a large block has been freed, glibc keeps freed memory. Otherwise it returns memory to the system after every
# array, which takes a fifth of the rendering time. With other C libraries this has no effect.
_block = np.empty(2**24, np.uint8)
del _block


@dataclass(frozen=True)
class Grid:
    """Positions of a film's pixels in the patient.

    Attributes:
        x: cm from the midline, positive to the patient's left, `[h, w]`.
        y: cm from the carina, positive downwards, `[h, w]`.
        rows: y of each row at the midline, cm, `[h, 1]`.
        pixel: Side of a pixel, cm.
        left_edge, top_edge: Untilted position of the first pixel's centre, cm.
        tilt: Radians.
        bend: Largest sideways curve of the spine, cm.
    """

    x: F32
    y: F32
    rows: F32
    pixel: float
    left_edge: float
    top_edge: float
    tilt: float
    bend: float

    def middle(self, rows: F32) -> F32:
        """Returns the position of the midline at these rows, cm."""
        return midline(rows, self.tilt, self.bend)

    def pixels(self, x: F32, y: F32) -> tuple[F32, F32]:
        """Returns column and row of points in the patient; inverts the shear to first order in the tilt."""
        film_y = y - self.tilt * x
        column = (x + self.middle(film_y) - self.left_edge) * (1 / self.pixel)
        return column, (film_y - self.top_edge) * (1 / self.pixel)

    def place(self, column: F32, row: F32) -> tuple[F32, F32]:
        """Returns the points in the patient at these columns and rows, cm: the inverse of `pixels`."""
        film_x, film_y = self.left_edge + column * self.pixel, self.top_edge + row * self.pixel
        x = film_x - self.middle(film_y)
        return x, film_y + self.tilt * x

    def window(self, x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice]:
        """Returns the rows and columns that contain a box in the patient (cm), with a small margin."""
        y = np.linspace(y0, y1, 5, dtype=np.float32)
        (c0, r0), (c1, r1) = (self.pixels(np.full(5, x, np.float32), y) for x in (x0, x1))
        height, width = self.shape
        rows, columns = np.concatenate([r0, r1]), np.concatenate([c0, c1])
        return (
            slice(max(0, int(rows.min()) - 2), max(0, min(height, int(rows.max()) + 4))),
            slice(max(0, int(columns.min()) - 2), max(0, min(width, int(columns.max()) + 4))),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """`(h, w)`."""
        height, width = self.x.shape
        return height, width


def film_grid(height: int, width: int, *, field: float, centre: tuple[float, float], tilt: float, bend: float) -> Grid:
    """Makes the grid of a film whose shorter side covers `field` cm.

    Tilt is a shear in both directions. At a few degrees it looks like a rotation, and structures can still be described
    row by row.

    Args:
        height, width: Size in pixels.
        field: Size of the shorter side, cm.
        centre: Centre of the film, cm from the carina.
        tilt: Tilt in radians.
        bend: Largest sideways curve of the spine, cm.
    """
    pixel = field / min(height, width)
    left, top = centre[0] - (width - 1) / 2 * pixel, centre[1] - (height - 1) / 2 * pixel
    columns = (left + np.arange(width, dtype=np.float32) * pixel)[None, :]
    rows = (top + np.arange(height, dtype=np.float32) * pixel)[:, None]
    return Grid(
        x=columns - midline(rows, tilt, bend),
        y=(rows + tilt * columns).astype(np.float32),
        rows=rows.astype(np.float32),
        pixel=pixel,
        left_edge=left,
        top_edge=top,
        tilt=tilt,
        bend=bend,
    )


def midline(rows: F32, tilt: float, bend: float) -> F32:
    """Returns the sideways position of the patient's midline, cm, at rows (cm)."""
    result: F32 = (tilt * rows + bend * np.cos(rows * 0.12)).astype(np.float32)
    return result


def curve(at: F32, points: Sequence[tuple[float, float]]) -> F32:
    """Evaluates a smooth curve through `points` (x, y), x ascending, at `at`; constant beyond its ends.

    Cubic Hermite with limited slopes, so that it does not overshoot its points.
    """
    px = np.array([p[0] for p in points], dtype=np.float32)
    py = np.array([p[1] for p in points], dtype=np.float32)
    step = np.diff(px)
    secant = np.diff(py) / step
    slope = np.zeros_like(py)
    same = secant[:-1] * secant[1:] > 0
    slope[1:-1][same] = 2 * secant[:-1][same] * secant[1:][same] / (secant[:-1][same] + secant[1:][same])
    slope[0], slope[-1] = secant[0], secant[-1]
    at = np.clip(at, px[0], px[-1])
    i = np.clip(np.searchsorted(px, at) - 1, 0, len(px) - 2)
    t = (at - px[i]) / step[i]
    h00, h10 = (1 + 2 * t) * (1 - t) ** 2, t * (1 - t) ** 2
    h01, h11 = t * t * (3 - 2 * t), t * t * (t - 1)
    value = h00 * py[i] + h10 * step[i] * slope[i] + h01 * py[i + 1] + h11 * step[i] * slope[i + 1]
    result: F32 = value.astype(np.float32)
    return result


def root(values: F32) -> F32:
    """Returns the square root of positive values, else 0: the profile of a round body, which has a sharp edge."""
    return np.sqrt(np.maximum(values, 0))


def ramp(values: F32, low: float, high: float) -> F32:
    """Returns 0 up to `low`, 1 from `high`, and a smooth transition between (smoothstep)."""
    t = np.clip((values - low) * (1 / (high - low)), 0, 1)
    result: F32 = t * t * (3 - 2 * t)
    return result


def ball(grid: Grid, x: float, y: float, rx: float, ry: float) -> F32:
    """Returns the chord of an ellipsoid seen from the front, 0 to 1, `[h, w]`."""
    chord = np.zeros(grid.shape, np.float32)
    at = grid.window(x - rx, x + rx, y - ry, y + ry)
    across, along = (grid.x[at] - x) * (1 / rx), (grid.y[at] - y) * (1 / ry)
    chord[at] = root(1 - across * across - along * along)
    return chord


def resized(image: F32, height: int, width: int) -> F32:
    """Resizes an image bicubically to `[height, width]`."""
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.float32)


def generator(seed: int, *index: int) -> np.random.Generator:
    """Makes a random generator that depends only on these numbers."""
    return np.random.Generator(np.random.PCG64([seed, *index]))


def noise(rng: np.random.Generator, grid: Grid, *layers: tuple[int, float]) -> F32:
    """Draws smooth noise with the same pattern at every size, `[h, w]`.

    Args:
        rng: Random generator; one draw per knot.
        grid: Grid of the film, which gives the size.
        layers: Knots per side, ascending, and amplitude (about 1.4 standard deviations) of each scale.
    """
    height, width = grid.shape
    total = np.zeros((layers[0][0],) * 2, np.float32)
    for cells, amplitude in layers:
        if total.shape[0] != cells:
            total = resized(total, cells, cells)
        total = total + rng.standard_normal((cells, cells), dtype=np.float32) * amplitude
    return resized(total, height, width)


def blurred(image: F32, sigma: float) -> F32:
    """Applies a Gaussian blur.

    Args:
        image: `[h, w]`.
        sigma: Standard deviation in pixels; below 0.3 the image is unchanged.
    """
    if sigma < 0.3:
        return image
    radius = max(1, round(2.6 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1, dtype=np.float32) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    height, width = image.shape
    # Rows, then columns; the kernel is symmetric, so that two shifts share a product.
    padded = np.pad(image, ((radius, radius), (0, 0)), mode="edge")
    rows = taps[radius] * image
    for i in range(radius):
        rows += taps[i] * (padded[i : i + height] + padded[2 * radius - i : 2 * radius - i + height])
    padded = np.pad(rows, ((0, 0), (radius, radius)), mode="edge")
    result: F32 = taps[radius] * rows
    for i in range(radius):
        result += taps[i] * (padded[:, i : i + width] + padded[:, 2 * radius - i : 2 * radius - i + width])
    return result
