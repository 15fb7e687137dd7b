"""Draws thin structures by adding mass along their path, so that the result does not depend on the pixel size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.phantom.grid import F32, Grid, blurred

# Widths (standard deviation, cm) of the layers of tubes; each layer is blurred once.
_WIDTHS = (0.03, 0.09, 0.2, 0.36)


@dataclass
class Ink:
    """Thickness of thin tubes, collected point by point.

    A tube of radius r in the plane of the film has the cross-section area pi r^2. This mass is added to the grid and
    blurred, so the thickness is correct even if the tube is thinner than a pixel.
    """

    grid: Grid
    _points: dict[float, list[tuple[F32, F32, F32]]] = field(default_factory=dict)

    def points(self, x: F32, y: F32, mass: F32, width: float) -> None:
        """Adds `mass` (cm^3) at (x, y) (cm in the patient), to be blurred by about `width` (cm)."""
        nearest = min(_WIDTHS, key=lambda w: abs(w - width))
        self._points.setdefault(nearest, []).append((x.ravel(), y.ravel(), mass.ravel()))

    def line(self, x: F32, y: F32, radius: F32 | float, density: float = 1.0) -> None:
        """Adds a tube along a path of close points.

        Args:
            x, y: Path, cm, `[n]`.
            radius: Radius in cm, one for all points or `[n]`.
            density: Density relative to the material of the layer.
        """
        x, y, step = dense(x, y, self.grid.pixel * 0.7)
        if isinstance(radius, float):
            mass, width = np.full(x.shape, np.pi * density * step * radius**2, np.float32), radius
        else:
            radii = np.interp(np.linspace(0, 1, len(x)), np.linspace(0, 1, len(radius)), radius)
            mass, width = (np.pi * density * step * radii**2).astype(np.float32), float(radii.mean())
        self.points(x, y, mass, width * 0.6)

    def total(self) -> F32:
        """Returns the thickness of all tubes in cm (times density), `[h, w]`."""
        height, width = self.grid.shape
        total = np.zeros((height, width), np.float32)
        if not self._points:
            return total
        layers = {size: _joined(parts) for size, parts in self._points.items()}
        x, y, mass = _joined(list(layers.values()))
        layer = np.repeat(np.arange(len(layers)), [len(points[0]) for points in layers.values()])
        drops = _splat(self.grid, x, y, mass, layer, len(layers))
        for size, drop in zip(layers, drops, strict=True):
            total += blurred(drop, max(size / self.grid.pixel, 0.45))
        return total


def dense(x: F32, y: F32, step: float) -> tuple[F32, F32, float]:
    """Returns the same path with points about `step` apart, and their exact distance."""
    length = np.zeros(len(x))
    np.cumsum(np.hypot(np.diff(x), np.diff(y)), out=length[1:])
    count = max(3, int(length[-1] / step))
    at = np.linspace(0, length[-1], count)
    spacing = float(length[-1]) / (count - 1)
    return np.interp(at, length, x).astype(np.float32), np.interp(at, length, y).astype(np.float32), spacing


def _joined(parts: list[tuple[F32, F32, F32]]) -> tuple[F32, F32, F32]:
    x, y, mass = (np.concatenate([part[k] for part in parts]) for k in range(3))
    return x, y, mass


def _splat(grid: Grid, x: F32, y: F32, mass: F32, layer: NDArray[np.int64], layers: int) -> F32:
    """Adds mass to the four nearest pixels and divides it by their area: `[n]` -> thickness in cm, `[layers, h, w]`."""
    height, width = grid.shape
    column, row = grid.pixels(x, y)
    c0, r0 = np.floor(column), np.floor(row)
    keep = (c0 >= 0) & (c0 < width - 1) & (r0 >= 0) & (r0 < height - 1)
    c0, r0, column, row, mass = c0[keep], r0[keep], column[keep], row[keep], mass[keep]
    fc, fr = column - c0, row - r0
    base = (layer[keep] * height + r0.astype(np.int64)) * width + c0.astype(np.int64)
    lower, upper = fr * mass, (1 - fr) * mass
    where = np.concatenate([base, base + 1, base + width, base + width + 1])
    what = np.concatenate([(1 - fc) * upper, fc * upper, (1 - fc) * lower, fc * lower])
    total = np.bincount(where, what, minlength=layers * height * width).reshape(layers, height, width)
    return (total * (1 / grid.pixel**2)).astype(np.float32)
