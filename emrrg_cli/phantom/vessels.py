"""Draws pulmonary vessels: the hila and the trees that grow from them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from emrrg_cli.phantom.anatomy import Thorax
from emrrg_cli.phantom.grid import F32, Grid, ball
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.parameters import SIDES, Case, Side, sign


@dataclass(frozen=True)
class _Branches:
    """Vessels of one order, `[n]` each: start, direction (radians), length (cm), radius at the start (cm)."""

    x: F32
    y: F32
    angle: F32
    length: F32
    radius: F32
    turn: F32
    wave: F32


def hilum(case: Case, side: Side) -> tuple[float, float]:
    """Returns the origin of the vessels of a side, cm."""
    return (sign(side) * 3.1 + case.anatomy.rotation, 2.4 if side == "right" else 1.6)


def vessels(thorax: Thorax, rng: np.random.Generator) -> F32:
    """Draws the thickness of the vessels, cm, `[h, w]`, everywhere; they are visible only in the lungs."""
    size = thorax.case.anatomy.thorax_half_width / 13.9
    ink = branching(thorax.grid, rng, [(*hilum(thorax.case, side), sign(side)) for side in SIDES], size)
    return _hila(thorax, ink, rng) + ink.total()


def branching(grid: Grid, rng: np.random.Generator, origins: list[tuple[float, float, float]], size: float) -> Ink:
    """Draws three orders of vessels from each origin (x, y, direction: 1 fans out towards +x, -1 towards -x)."""
    ink = Ink(grid)
    fans = [_trunks(rng, x, y, s, size) for x, y, s in origins]
    order = _Branches(*(np.concatenate([getattr(fan, f.name) for fan in fans]) for f in fields(_Branches)))
    _draw(order, ink, grid)
    for children, reach in ((5, 0.55), (4, 0.5)):
        order = _split(order, rng, children, reach)
        _draw(order, ink, grid)
    return ink


def _hila(thorax: Thorax, ink: Ink, rng: np.random.Generator) -> F32:
    """Draws the pulmonary arteries and the veins across them; the bundle as a whole has no sharp edge."""
    total = np.zeros(thorax.grid.shape, np.float32)
    t = np.linspace(0, 1, 24, dtype=np.float32)
    for side in SIDES:
        s = sign(side)
        x, y = hilum(thorax.case, side)
        total += 0.9 * ball(thorax.grid, x - s * 0.1, y + 0.2, 1.8, 2.4) ** 2
        # The descending artery, as wide as a finger, beside the heart; the upper branch; two veins.
        reach = rng.uniform(0.9, 1.15, 4)
        for dx, dy, bow, radius in (
            (1.4, 7.0, 1.1, 0.72),
            (1.5, -4.2, 0.5, 0.45),
            (3.6, 3.4, -0.6, 0.36),
            (3.4, -3.0, 0.3, 0.3),
        ):
            scale = reach[0] if radius > 0.5 else reach[1]
            ink.line(
                x + s * (-0.7 + dx * t * scale + bow * np.sin(np.pi * t)),
                y - 0.8 + dy * t * scale,
                radius * (1 - 0.62 * t) * float(reach[2]),
                0.4,
            )
    return total


def _trunks(rng: np.random.Generator, x: float, y: float, s: float, size: float) -> _Branches:
    """Makes segmental vessels that fan out from straight up to straight down."""
    n = 11
    fan = np.linspace(-1.35, 1.3, n) + rng.normal(0, 0.09, n)
    angle = np.where(s > 0, fan, np.pi - fan)
    down = (fan > 0.3).astype(np.float64)
    return _Branches(
        x=_f32(x + s * rng.uniform(0, 0.6, n)),
        y=_f32(y + fan * 0.9 + down * 0.8),
        angle=_f32(angle),
        length=_f32((9.0 + 2.5 * down - 1.5 * (fan < -0.9)) * size * rng.uniform(0.85, 1.1, n)),
        radius=_f32(0.25 + 0.08 * down + rng.uniform(-0.04, 0.06, n)),
        # Vessels bow around the hilum: lower ones turn inwards, upper ones straight up.
        turn=_f32(s * fan * 0.28 + rng.normal(0, 0.12, n)),
        wave=_f32(rng.uniform(-0.22, 0.22, n)),
    )


def _split(order: _Branches, rng: np.random.Generator, children: int, reach: float) -> _Branches:
    """Makes the next order: `children` from each vessel, on both sides of it."""
    n = len(order.x)
    at = _f32((np.arange(children) + rng.uniform(0.2, 1.0, (n, children))) / (children + 0.5) * 0.85 + 0.1)
    x, y, heading = _path(order, at)
    turn_off = rng.uniform(0.35, 0.85, (n, children)) * np.where(
        (np.arange(children) + rng.integers(0, 2, (n, 1))) % 2, 1, -1
    )
    rest = 1 - at * 0.45
    return _Branches(
        x=x.ravel(),
        y=y.ravel(),
        angle=(heading + _f32(turn_off)).ravel(),
        length=(order.length[:, None] * rest * _f32(reach * rng.uniform(0.6, 1.2, (n, children)))).ravel(),
        radius=(order.radius[:, None] * (1 - 0.6 * at) * 0.62).ravel(),
        turn=_f32(-0.5 * turn_off + rng.normal(0, 0.2, (n, children))).ravel(),
        wave=_f32(rng.uniform(-0.35, 0.35, n * children)),
    )


def _path(order: _Branches, at: F32) -> tuple[F32, F32, F32]:
    """Returns points and directions of vessels at fractions `at` of their length, `[n, k]`."""
    t = np.linspace(0, 1, 20, dtype=np.float32)
    heading = order.angle[:, None] + order.turn[:, None] * t + order.wave[:, None] * np.sin(t * 7)
    step = order.length[:, None] * (1 / 19)
    x = order.x[:, None] + np.cumsum(np.cos(heading) * step, axis=1) - np.cos(heading[:, :1]) * step
    y = order.y[:, None] + np.cumsum(np.sin(heading) * step, axis=1) - np.sin(heading[:, :1]) * step
    place = at * 19
    low = np.minimum(place.astype(np.int64), 18)
    part = place - low

    def pick(values: F32) -> F32:
        first = np.take_along_axis(values, low, 1)
        return first + part * (np.take_along_axis(values, low + 1, 1) - first)

    return pick(x), pick(y), pick(heading)


def _draw(order: _Branches, ink: Ink, grid: Grid) -> None:
    count = max(8, int(float(order.length.mean()) / (grid.pixel * 0.8)))
    t = np.linspace(0, 1, count, dtype=np.float32)
    heading = order.angle[:, None] + order.turn[:, None] * t + order.wave[:, None] * np.sin(t * 7)
    step = order.length[:, None] * (1 / (count - 1))
    x = order.x[:, None] + np.cumsum(np.cos(heading) * step, axis=1)
    y = order.y[:, None] + np.cumsum(np.sin(heading) * step, axis=1)
    radius = order.radius[:, None] * (1 - 0.72 * t)
    mass = np.pi * radius**2 * order.length[:, None] * (1 / count)
    for low, high, width in ((0.0, 0.1, 0.03), (0.1, 0.2, 0.09), (0.2, 9.0, 0.2)):
        chosen = (radius >= low) & (radius < high)
        ink.points(x[chosen], y[chosen], mass[chosen], width)


def _f32(values: object) -> F32:
    return np.asarray(values, dtype=np.float32)
