"""Draws bones as attenuation in addition to the soft tissue that they replace (an exponent, no unit), `[h, w]`."""

from __future__ import annotations

import math

import numpy as np

from emrrg_cli.phantom.anatomy import Thorax
from emrrg_cli.phantom.grid import F32, ball, generator, noise, ramp, root
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.parameters import Case

_CORTEX = 0.32  # attenuation per cm of cortical bone, minus that of soft tissue


def bones(thorax: Thorax, ink: Ink) -> F32:
    """Draws all bones; the thin borders of the scapulae go to `ink`."""
    return ribs(thorax) + spine(thorax) + clavicles(thorax) + shoulders(thorax, ink)


def ribs(thorax: Thorax) -> F32:
    """Draws ribs as bands on the surface of the chest.

    A point of the chest wall has a height and an angle p around the trunk (0 at the spine, pi/2 at the side). A rib
    descends steadily with p, so a ray crosses two ribs: one at the back, and one at the front. At the side, the wall
    runs along the ray, so its path in bone is long.
    """
    case, grid = thorax.case, thorax.grid
    a, extra = case.anatomy, case.distractors
    across = np.clip(thorax.outwards / (thorax.half_width + 0.35), 0, 1)
    # sin p is `across`.
    cosine = np.sqrt(1 - across * across)
    # The path through a curved shell, limited by the thickness of the shell.
    slant = 1 / np.maximum(cosine, 0.22)
    size = a.thorax_half_width / 13.9
    # At the back a rib is almost horizontal near the spine; at the front it descends faster.
    back = (4.6 * size) * (1 - cosine) - (1.8 * size) * across * cosine
    front = (4.6 * size) + (5.2 * size) * cosine
    inside = (across < 1).astype(np.float32)
    each = rib_shapes(case)
    thick: F32 | float = 0.74 * size
    if extra.rib_callus:
        here = np.exp(-(((across - 0.72) * (1 / 0.06)) ** 2)) * thorax.on(extra.rib_callus)
        thick = thick * (1 + 0.5 * here)
    ink = _bands(thorax, back, thick, across, each)
    if extra.rib_callus:
        ink *= 1 + 0.9 * here * (np.abs(grid.y - back - a.apex - extra.callus_rib * a.rib_spacing) < 1.4)
    # At the front, bone ends where cartilage begins, further out with every rib; calcified cartilage is visible.
    end = 2.6 + 0.42 * np.clip(grid.y - a.apex - 3, 0, 12)
    fade = ramp(thorax.outwards - end, 0, 0.5)
    if extra.cartilage:
        spots = np.maximum(noise(generator(case.texture_seed, 3), grid, (60, 0.8), (130, 0.5)), 0)
        fade = fade + (1 - fade) * (thorax.outwards > 1.8) * spots * extra.cartilage
    ink += _bands(thorax, front, 0.86 * size, across, each[::-1], count=8, first=0.6) * fade * 0.55
    result: F32 = ink * slant * inside * (0.088 * a.rib_density)
    return result


def rib_shapes(case: Case) -> F32:
    """Draws the deviations of each rib, `[2, 3, 24]`: back and front; offset, slope, relative thickness; right ribs,
    then left ribs."""
    rng = generator(case.texture_seed, 2)
    spread = np.array([0.055, 0.13, 0.12])[None, :, None]
    shapes: F32 = (np.clip(rng.standard_normal((2, 3, 24)), -2, 2) * spread).astype(np.float32)
    return shapes


def _bands(
    thorax: Thorax, fall: F32, half_height: F32 | float, across: F32, each: F32, count: int = 11, first: float = 0.0
) -> F32:
    """Draws the bands of all ribs of one wall: 1 in the middle, more at the cortical edges."""
    a = thorax.case.anatomy
    start = a.apex + 0.3 + 0.6 * a.rib_phase
    level = (thorax.grid.y - fall - start) * (1 / a.rib_spacing)
    # Upper ribs are closer together.
    level = level * 1.18 - 0.012 * level * np.abs(level)
    number = np.round(level)
    rib = (np.clip(number, 0, 11) + 12 * thorax.is_left).astype(np.intp)
    offset, slope, thickness = each[0]
    shift = offset[rib] + slope[rib] * (across - 0.6)
    away = np.abs(level - number - shift) * (a.rib_spacing / 1.12)
    half_height = half_height * (1 + thickness)[rib]
    soft = max(0.06, thorax.grid.pixel * 0.6)
    inside = np.clip((half_height - away) * (1 / soft) + 0.5, 0, 1)
    cortex = np.maximum(1 - np.abs(away - (half_height - 0.12)) * (1 / max(0.14, thorax.grid.pixel)), 0)
    there = ((number >= first) & (number <= count - 1)).astype(np.float32)
    bands: F32 = (inside * 0.85 + cortex * 0.55) * there
    return bands


def spine(thorax: Thorax) -> F32:
    """Draws vertebral bodies with end plates and pedicles, and discs between them."""
    a, grid = thorax.case.anatomy, thorax.grid
    down = grid.rows - a.apex
    size = a.thorax_half_width / 13.9
    half = size * (1.45 + 0.02 * down)
    # Lower vertebrae are larger: the vertebra's number as a function of height.
    period = 2.05 * size
    number = down / period - 0.0062 * (down / period) * np.abs(down / period) + a.rib_phase
    place = number - np.floor(number)
    body = ramp(np.minimum(place, 1 - place), 0.05, 0.14)
    plate = np.maximum(1 - np.abs(np.minimum(place, 1 - place) - 0.14) * 12, 0)
    # The spine needs only a narrow band of columns.
    at = grid.window(-5.0, 5.0, float(grid.rows[0, 0]), float(grid.rows[-1, 0]))[1]
    across = grid.x[:, at] / half
    chord = root(1 - across * across)
    edge = np.maximum(1 - np.abs(np.abs(across) - 0.94) * 9, 0)
    vertebrae = chord * (0.6 + 0.32 * body + 0.3 * plate) + edge * body * 0.22
    pedicle = _spots(np.abs(across) - 0.62, place - 0.36, 0.17, 0.2)
    process = _spots(across, place - 0.8, 0.12, 0.24)
    transverse = ramp(1.9 - np.abs(across), 0, 0.3) * np.maximum(1 - np.abs(place - 0.36) * 6, 0)
    bone = np.zeros(grid.shape, np.float32)
    bone[:, at] = (vertebrae * 0.62 + pedicle * 0.3 + process * 0.34 + transverse * 0.16) * (
        0.62 * ramp(grid.rows - a.apex, -14, 6)
    )
    return bone


def _spots(x: F32, y: F32, rx: float, ry: float) -> F32:
    return root(1 - (x * (1 / rx)) ** 2 - (y * (1 / ry)) ** 2)


def clavicles(thorax: Thorax) -> F32:
    """Draws two S-shaped tubes with a cortical shell, from the sternum up to the shoulders."""
    a, grid = thorax.case.anatomy, thorax.grid
    inner, outer = 1.9, a.body_half_width + 0.6
    start = a.apex + 4.6
    at = grid.window(-outer, outer, start - a.clavicle_rise - 2.5, start + 2.5)
    along = (thorax.outwards[at] - inner) * (1 / (outer - inner))
    height = start - a.clavicle_rise * along - 0.75 * np.sin(along * (2 * np.pi))
    # If the patient is rotated, one clavicle's inner end is nearer to the spine.
    shown = ramp(along + (thorax.is_left[at] - 0.5) * (0.08 * a.rotation), 0, 0.03) * ramp(1 - along, 0, 0.03)
    radius = 0.62 + 0.3 * np.maximum(0.16 - along, 0) * 5
    away = np.abs(grid.y[at] - height) * 0.93
    chord = 2 * (root(radius**2 - away**2) - 0.72 * root((radius - 0.2) ** 2 - away**2))
    bone = np.zeros(grid.shape, np.float32)
    bone[at] = chord * shown * (1.15 * _CORTEX)
    return bone


def shoulders(thorax: Thorax, ink: Ink) -> F32:
    """Draws the scapulae and the upper ends of the humeri."""
    a, grid = thorax.case.anatomy, thorax.grid
    w = a.body_half_width
    total = np.zeros(grid.shape, np.float32)
    medial = a.thorax_half_width + 0.4 - a.scapula_over_lung
    superior, glenoid = (medial + 1.2, a.apex + 1.8), (w + 1.6, a.apex + 4.6)
    inferior, corner = (medial + 2.0, a.apex + 15.5), (medial + 0.1, a.apex + 4.5)
    ring = (superior, glenoid, inferior, corner)
    borders = (
        ((glenoid[0] - 0.2, glenoid[1] + 0.6), inferior, 0.3),
        (inferior, corner, 0.2),
        (corner, superior, 0.17),
        ((corner[0] + 0.3, corner[1] - 0.5), (glenoid[0] + 1.2, glenoid[1] - 4.4), 0.33),
        ((superior[0] + 1.5, superior[1] + 0.6), (glenoid[0] - 0.6, glenoid[1] - 1.3), 0.42),
    )
    for side in (-1.0, 1.0):
        ends = sorted((side * corner[0], side * (w + 3)))
        at = grid.window(ends[0], ends[1], superior[1], inferior[1])
        x, y = grid.x[at] * side, grid.y[at]
        blade = np.full(x.shape, 9, np.float32)
        for (px, py), (qx, qy) in zip(ring, (*ring[1:], ring[0]), strict=True):
            length = math.hypot(qx - px, qy - py)
            # Distance from each border, positive inside.
            blade = np.minimum(blade, (x - px) * ((py - qy) / length) + (y - py) * ((qx - px) / length))
        total[at] += ramp(blade, 0, 0.3) * 0.05
        for (px, py), (qx, qy), radius in borders:
            ink.line(*_bow(side * px, py, side * qx, qy, 0.06 * side), radius, _CORTEX)
        head = (side * (w + 3.4), a.apex + 4.4)
        shell = ball(grid, *head, 2.35, 2.35) - 0.6 * ball(grid, *head, 2.15, 2.15)
        total += shell * 0.5
        for wall in (-0.95, 0.95):
            ink.line(
                *_bow(head[0] + wall + side * 0.2, head[1] + 1.6, head[0] + wall + side * 3.2, head[1] + 17, 0.02),
                0.26,
                _CORTEX,
            )
    return total


def _bow(x0: float, y0: float, x1: float, y1: float, bend: float) -> tuple[F32, F32]:
    """Returns a slightly bent line between two points, `[n]` each."""
    t = np.linspace(0, 1, 24, dtype=np.float32)
    bulge = 4 * t * (1 - t) * bend
    x = x0 + t * (x1 - x0) - bulge * (y1 - y0)
    y = y0 + t * (y1 - y0) + bulge * (x1 - x0)
    return x, y
