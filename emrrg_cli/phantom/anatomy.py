"""Shape of a thorax: how much air and how much soft tissue a ray crosses at every pixel.

The trunk is soft tissue; the lungs replace a part of it by air; the heart, the mediastinum and the abdomen are soft
tissue inside. The chord of a round body grows like a square root from its edge, so its contour on a film is sharp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emrrg_cli.phantom.grid import F32, Grid, ball, curve, generator, noise, ramp, root
from emrrg_cli.phantom.parameters import Case, Side, sign

_ANGLES = 1024
# Outline of a heart around its centre: (x, y) in units of half its width, the patient's left at +x, y downwards. The
# right atrium, the great vessels, the long left border, the apex, the base on the diaphragm.
_HEART = (
    (-1.0, 0.12), (-0.99, -0.18), (-0.9, -0.48), (-0.72, -0.8), (-0.42, -1.08), (-0.1, -1.12), (0.14, -0.98),
    (0.4, -0.7), (0.66, -0.36), (0.88, 0.04), (1.0, 0.42), (1.0, 0.68), (0.86, 0.92), (0.5, 1.0),
    (0.05, 1.0), (-0.45, 0.96), (-0.84, 0.68),
)  # fmt: skip


@dataclass(frozen=True)
class Thorax:
    """Geometry of a thorax, in which findings, vessels and bones are placed.

    Attributes:
        half_width: Inner half width of the rib cage at each row, cm, `[h, 1]`.
        cavity: Depth of the rib cage, front to back, cm, `[h, w]`.
        body: Soft tissue if there were no lungs, cm, `[h, w]`.
        air: Depth of lung, cm, `[h, w]`; 0 outside.
        heart: 0 to 1, chord of the heart relative to its largest, `[h, w]`.
        below: Distance of a pixel below its hemidiaphragm, cm, negative above, `[h, w]`.
        outwards: cm from the midline, positive on both sides, `[h, w]`.
        is_left: The patient's left half, 0 or 1, `[h, w]`.
        dome: y of the top of each hemidiaphragm, cm, after volume loss.
        heart_span: x of the heart's right and left border, cm.
    """

    grid: Grid
    case: Case
    half_width: F32
    cavity: F32
    body: F32
    air: F32
    heart: F32
    below: F32
    outwards: F32
    is_left: F32
    dome: dict[Side, float]
    heart_span: tuple[float, float]

    def on(self, side: Side) -> F32:
        """Returns 1 on this side of the patient, else 0, `[h, w]`."""
        return self.is_left if side == "left" else 1 - self.is_left

    def width_at(self, y: float) -> float:
        """Returns the inner half width of the rib cage at a height, cm."""
        return float(np.interp(y, self.grid.rows[:, 0], self.half_width[:, 0]))


def build_thorax(case: Case, grid: Grid) -> Thorax:
    """Builds the thorax of a case on a grid, including findings that move contours (heart size, volume loss, shift)."""
    a = case.anatomy
    # A large effusion or pneumothorax pushes the mediastinum to the other side.
    push = sum(-sign(e.side) * max(0.0, e.level - 0.55) * 2.5 for e in case.findings.effusions)
    if (ptx := case.findings.pneumothorax) and ptx.amount == "large":
        push -= sign(ptx.side) * 0.7
    shift = a.rotation + push
    fall = (grid.rows - a.apex) * (1 / a.lung_height)  # 0 at the apex, 1 at the costophrenic angle
    half_width = thorax_half_width(fall, a.thorax_half_width)
    outwards, is_left = np.abs(grid.x), (grid.x > 0).astype(np.float32)

    depth = (0.8 * a.depth) * curve(fall, [(0, 0.3), (0.15, 0.66), (0.45, 1), (1, 1)])
    cavity = depth * root(1 - (outwards / half_width) ** 2.6)

    dome = domes(case)
    below = grid.y - _diaphragm(case, grid, outwards, is_left, dome)

    edge = _mediastinal_edge(case, grid, fall, is_left, shift)
    air = cavity * root(np.minimum((outwards - edge) * 0.42, 1))
    # Behind and in front of the dome the lung continues and becomes thinner.
    air *= np.maximum(1 - root(below * (1 / 5.5)), 0)
    heart, span = _heart(case, grid, shift, dome)
    great = _great_vessels(case, grid, shift)
    air = np.maximum(air - (a.depth * 0.5) * heart * ramp(-below, -3.5, 0.3) - great, 0)
    air *= (grid.rows > a.apex - 0.2).astype(np.float32)
    return Thorax(
        grid, case, half_width, cavity, _body(case, grid), air, heart, below, outwards, is_left, dome, span
    )  # fmt: skip


def domes(case: Case) -> dict[Side, float]:
    """Returns y of the top of each hemidiaphragm, cm; collapsed lung pulls it up."""
    dome = dict(case.anatomy.dome)
    for collapse in case.findings.atelectases:
        dome[collapse.side] -= (0.5 if collapse.shape == "linear" else 1.6) * collapse.strength
    return dome


def fluid_level(case: Case, level: float) -> float:
    """Returns y of an effusion's surface in the middle of the chest, cm; level 0 is below the costophrenic angle."""
    a = case.anatomy
    return a.angle + 0.2 - level * 0.8 * a.lung_height


def fine_texture(case: Case, grid: Grid) -> F32 | float:
    """Draws the finest texture of the lungs, `[h, w]`; coarse films skip it, because they cannot show it."""
    if max(grid.shape) < 200:
        return 0.0
    return noise(generator(case.texture_seed, 8), grid, (240, 0.016))


def thorax_half_width(fall: F32, widest: float) -> F32:
    """Returns the inner half width of the rib cage, cm, at heights `fall` (0 apex, 1 costophrenic angle)."""
    up = np.clip(1 - fall * (1 / 0.72), 0, 1)
    result: F32 = widest * (0.35 + 0.65 * (1 - up**2.2) ** 0.56)
    return result


def heart_outline(case: Case) -> tuple[F32, float, float]:
    """Computes the outline of the heart: its radius by angle `[_ANGLES]`, and its size in cm.

    Returns:
        Radius at each angle from -pi to pi, in units of the half width; half width; half height of one unit.
    """
    a = case.anatomy
    points = np.array(_HEART, dtype=np.float64)
    # A horizontal heart is broader below, an upright heart is slim: shear of the lower half.
    points[:, 1] *= 1.12 - 0.3 * a.heart_slope
    angle = np.arctan2(points[:, 1], points[:, 0])
    radius = np.hypot(points[:, 0], points[:, 1])
    order = np.argsort(angle)
    at = np.linspace(-np.pi, np.pi, _ANGLES, endpoint=False)
    table = np.interp(at, angle[order], radius[order], period=2 * np.pi)
    kernel = np.hanning(105)
    padded = np.concatenate([table[-52:], table, table[:52]])
    table = np.convolve(padded, kernel / kernel.sum(), mode="valid")
    x = table * np.cos(at)
    half = case.findings.ctr * a.thorax_half_width
    unit = half * 2 / (x.max() - x.min())
    height = (case.findings.ctr / 0.46) ** 0.55 * 0.46 * a.thorax_half_width
    return table.astype(np.float32), float(unit), float(height)


def _heart(case: Case, grid: Grid, shift: float, dome: dict[Side, float]) -> tuple[F32, tuple[float, float]]:
    table, unit_x, unit_y = heart_outline(case)
    at = np.linspace(-np.pi, np.pi, _ANGLES, endpoint=False)
    low_x, high_x = (table * np.cos(at)).min() * unit_x, (table * np.cos(at)).max() * unit_x
    # A third of the heart is right of the midline; less if the left ventricle is enlarged.
    right = (0.335 - 0.12 * (case.findings.ctr - 0.45)) * (high_x - low_x) - shift
    centre_x = -right - low_x
    bottom = min(dome["right"], dome["left"]) + 2.6
    centre_y = bottom - float((table * np.sin(at)).max()) * unit_y
    high_y = float((table * np.sin(at)).min()) * unit_y
    box = grid.window(centre_x + low_x, centre_x + high_x, centre_y + high_y, bottom)
    dx = (grid.x[box] - centre_x) * (1 / unit_x)
    dy = (grid.y[box] - centre_y) * (1 / unit_y)
    index = ((np.arctan2(dy, dx) + np.pi) * (_ANGLES / (2 * np.pi))).astype(np.int64) % _ANGLES
    chord = np.zeros(grid.shape, np.float32)
    chord[box] = root(1 - (dx * dx + dy * dy) / (table * table)[index])
    return chord, (float(-right), float(centre_x + high_x))


def _great_vessels(case: Case, grid: Grid, shift: float) -> F32:
    """Draws aortic arch and pulmonary trunk where they extend into the left lung, cm."""
    a = case.anatomy
    # The arch runs from front to back, so its depth is large along the ray.
    knob = 4.2 * a.knob * ball(grid, 1.55 + shift + a.unfolded, -0.4, a.knob * 1.05, a.knob)
    trunk = 5.0 * ball(grid, 1.7 + shift, 3.0, 2.0, 2.1)
    ascending = 3.2 * ball(grid, -0.6 + shift - 0.5 * a.unfolded, 2.6, 2.5, 4.2)
    # The descending aorta; its left edge is visible through the heart.
    x = 1.0 + 0.8 * a.unfolded + shift
    at = grid.window(x - 1.4, x + 1.4, -1, 40)
    aorta = np.zeros(grid.shape, np.float32)
    aorta[at] = 2.6 * root(1 - ((grid.x[at] - x) * (1 / 1.35)) ** 2) * ramp(grid.y[at], -1, 1)
    result: F32 = np.maximum(np.maximum(knob, trunk), np.maximum(ascending, aorta))
    return result


def _mediastinal_edge(case: Case, grid: Grid, fall: F32, is_left: F32, shift: float) -> F32:
    """Returns the distance of each lung's inner border from the midline, cm, `[h, w]`."""
    a = case.anatomy
    apex = 0.35 * a.thorax_half_width
    right = curve(
        fall, [(-0.1, apex), (0, apex), (0.035, 3.1), (0.1, 2.5), (0.22, 2.35), (0.35, 2.5), (0.8, 2.0), (1.2, 1.8)]
    )
    left = curve(
        fall, [(-0.1, apex), (0, apex), (0.035, 3.2), (0.1, 2.6), (0.22, 2.3), (0.35, 2.1), (0.8, 2.2), (1.2, 2.2)]
    )
    moved = shift * ramp(fall, -0.05, 0.15)
    result: F32 = right - moved + is_left * (left + moved - (right - moved)) + (a.unfolded * 0.5)
    return result


def _diaphragm(case: Case, grid: Grid, outwards: F32, is_left: F32, dome: dict[Side, float]) -> F32:
    """Returns y of the hemidiaphragms, cm, `[h, w]`."""
    a = case.anatomy
    wide = a.thorax_half_width
    height = dome["right"] + is_left * (dome["left"] - dome["right"])
    drop = a.angle - height
    peak = (0.46 * wide) + is_left * (0.06 * wide)
    lateral = np.maximum(outwards - peak, 0) / (wide - peak)
    medial = np.maximum(peak - outwards, 0) / peak
    result: F32 = height + drop * lateral**2.3 + 1.7 * medial**2
    return result


def _body(case: Case, grid: Grid) -> F32:
    """Draws trunk, neck, arms and breasts, cm of soft tissue, `[h, w]`."""
    a = case.anatomy
    w, top = a.body_half_width, a.apex
    width = curve(
        grid.rows,
        [
            (top - 8, 6.0), (top - 5.5, 6.3), (top - 4, 7.6), (top - 2.6, 11.0), (top - 1.2, w - 1.5),
            (top + 1.5, w + 3.5), (top + 6, w + 3.6), (top + 10, w + 1.4), (top + 16, w - 0.4), (top + 32, w),
        ],
    )  # fmt: skip
    depth = a.depth * curve(
        grid.rows,
        [
            (top - 7, 0.66),
            (top - 4, 0.66),
            (top - 1, 0.78),
            (top + 3, 0.93),
            (top + 12, 1.02),
            (top + 20, 1.0),
            (top + 26, 1.14),
        ],
    )
    trunk = depth * root(1 - (np.abs(grid.x) / width) ** 4)
    shoulder, elbow = (w + 3.6, top + 4.6), (w + 7.0, top + 28)
    run = ((grid.rows - shoulder[1]) * (1 / (elbow[1] - shoulder[1]))).clip(-0.3, 1.2)
    centre = shoulder[0] + np.maximum(run, 0) ** 1.2 * (elbow[0] - shoulder[0])
    cap = root(1 - (np.minimum(grid.rows - shoulder[1], 0) * (1 / 5.2)) ** 2)
    radius = (0.29 * w) * cap
    arm = 2.7 * root(radius**2 - (np.abs(grid.x) - centre) ** 2)
    # Overlapping arm and trunk count once.
    body = np.sqrt(trunk**2 + arm**2)
    if a.breast > 0:
        wide = 0.46 * w
        for side in (-1, 1):
            body = body + a.breast * ball(grid, side * 0.5 * w, a.dome["right"] - 4.8, wide, 0.42 * w)
    return body
