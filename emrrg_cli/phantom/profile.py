"""Shape of the chest from the side: how much air and soft tissue a ray from left to right crosses at every pixel.

Lengths and heights are the same as on the frontal film, so that a finding is at the same height in both. Here x is the
distance behind the middle of the chest, cm; the patient faces the left edge of the film.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emrrg_cli.phantom.anatomy import domes, thorax_half_width
from emrrg_cli.phantom.grid import F32, Grid, ball, curve, ramp, root
from emrrg_cli.phantom.parameters import SIDES, Case, Side


@dataclass(frozen=True)
class Profile:
    """A patient from the side.

    Attributes:
        front, back: x of the inner front and back wall of the chest at each row, cm, `[h, 1]`.
        skin: x of the skin, front and back, `[h, 1]` each.
        spine: x of the middle of the vertebral bodies, `[h, 1]`.
        across: -1 at the front wall to 1 at the back wall, `[h, w]`.
        body: Soft tissue if there were no lungs, cm, `[h, w]`.
        air: Width of each lung, cm, `[h, w]`.
        heart: 0 to 1, chord of the heart relative to its largest, `[h, w]`.
        below: Distance of a pixel below each hemidiaphragm, cm, `[h, w]`.
        dome: y of the top of each hemidiaphragm, cm.
    """

    grid: Grid
    case: Case
    front: F32
    back: F32
    skin: tuple[F32, F32]
    spine: F32
    across: F32
    body: F32
    air: dict[Side, F32]
    heart: F32
    below: dict[Side, F32]
    dome: dict[Side, float]

    def at(self, values: F32, y: float) -> float:
        """Returns the value of a curve over rows at a height."""
        return float(np.interp(y, self.grid.rows[:, 0], values[:, 0]))

    def inside(self, y: float, across: float) -> float:
        """Returns x of a point in the chest, cm: `across` 0 at the front wall to 1 at the back wall."""
        front, back = self.at(self.front, y), self.at(self.back, y)
        return front + across * (back - front)


def build_profile(case: Case, grid: Grid) -> Profile:
    """Builds the side view of a case, including findings that move contours (heart size, volume loss)."""
    a, rows = case.anatomy, grid.rows
    top, depth = a.apex, a.depth * 1.12 + 2.2
    front_skin = curve(
        rows,
        [(top - 8, -6.0), (top - 2, -6.0), (top + 3, -0.33 * depth), (top + 10, -0.46 * depth),
         (top + 18, -0.53 * depth), (top + 26, -0.53 * depth), (top + 36, -0.55 * depth)],
    )  # fmt: skip
    back_skin = curve(
        rows,
        [(top - 8, 4.4), (top - 4, 0.3 * depth), (top + 2, 0.44 * depth), (top + 9, 0.52 * depth),
         (top + 17, 0.52 * depth), (top + 26, 0.46 * depth), (top + 36, 0.42 * depth)],
    )  # fmt: skip
    fat = 0.12 * (a.body_half_width - a.thorax_half_width)
    front, back = front_skin + 2.1 + fat, back_skin - 2.6 - 2 * fat
    across = (grid.x - (front + back) / 2) / ((back - front) / 2)
    fall = (rows - top) * (1 / a.lung_height)
    dome = domes(case)
    below: dict[Side, F32] = {side: grid.y - _dome(case, dome[side], across) for side in SIDES}
    # Half of the chest's width at this depth, minus half of the tissue between the lungs.
    half = thorax_half_width(fall, a.thorax_half_width) * root(1 - np.abs(across) ** 2.6)
    middle = curve(across, [(-1, 0.6), (-0.6, 1.6), (0, 2.6), (0.45, 2.4), (0.7, 2.0), (1, 1.0)])
    lung = np.maximum(half - middle, 0) * ramp(rows, top - 0.3, top + 0.6)
    heart = _heart(case, grid, front, dome)
    air: dict[Side, F32] = {}
    for side in SIDES:
        # Two thirds of the heart are on the left.
        share = 0.62 if side == "left" else 0.38
        width = share * 2 * case.findings.ctr * a.thorax_half_width
        left = lung * np.maximum(1 - root(below[side] * (1 / 4.5)), 0)
        air[side] = np.maximum(left - 0.62 * width * heart * ramp(-below[side], -2.5, 0.2), 0)
    spine = back - 2.3
    return Profile(
        grid, case, front, back, (front_skin, back_skin), spine, across,
        _body(case, grid, front_skin, back_skin), air, heart, below, dome,
    )  # fmt: skip


def _dome(case: Case, height: float, across: F32) -> F32:
    """Returns y of a hemidiaphragm, cm, `[h, w]`: lowest at the back, in the posterior costophrenic angle."""
    a = case.anatomy
    drop = a.angle + 1.2 - height
    behind, before = np.maximum(across + 0.25, 0) * (1 / 1.25), np.maximum(-0.25 - across, 0) * (1 / 0.75)
    result: F32 = height + drop * behind**2.4 + 0.45 * drop * before**2
    return result


def _heart(case: Case, grid: Grid, front: F32, dome: dict[Side, float]) -> F32:
    """Draws the heart as an egg on the diaphragm behind the sternum, rising backwards; large ones grow back and up."""
    half = case.findings.ctr * case.anatomy.thorax_half_width
    long, short = 1.02 * half, 0.74 * half
    y = dome["left"] + 1.6 - 0.78 * long
    x = float(np.interp(dome["left"] - 3, grid.rows[:, 0], front[:, 0])) + 0.4 + 0.88 * short
    box = grid.window(x - long, x + long, y - long, y + long)
    dx, dy = grid.x[box] - x, grid.y[box] - y
    along, aside = 0.64 * dx - 0.77 * dy, 0.77 * dx + 0.64 * dy
    chord = np.zeros(grid.shape, np.float32)
    chord[box] = root(1 - (along * (1 / long)) ** 2 - (aside * (1 / short)) ** 2)
    return chord


def _body(case: Case, grid: Grid, front: F32, back: F32) -> F32:
    """Draws trunk, neck, shoulders, raised arms and breasts, cm of soft tissue from side to side, `[h, w]`."""
    a, top = case.anatomy, case.anatomy.apex
    width = 2 * curve(
        grid.rows, [(top - 7, 5.5), (top - 3, 8), (top + 2, 0.9 * a.body_half_width), (top + 8, a.body_half_width)]
    )
    trunk = width * root(1 - np.abs((grid.x - (front + back) / 2) / ((back - front) / 2)) ** 2.8)
    # Shoulders and, forwards and up, the arms.
    shoulder = 17 * ball(grid, 0.5, top - 5.0, 12.0, 12.0) ** 2
    run = (grid.x - 1) * (-1 / 16)
    reach = root(1 - ((grid.y - (top - 4.0 - 7 * np.clip(run, -0.2, 2))) * (1 / 4.6)) ** 2)
    body = np.sqrt((trunk + shoulder) ** 2 + (13 * reach * ramp(run, -0.3, 0.4)) ** 2)
    if a.breast > 0:
        y = a.dome["right"] - 4.0
        x = float(np.interp(y, grid.rows[:, 0], front[:, 0]))
        body = body + 2.4 * a.breast * ball(grid, x + 2.0, y, 3.0 + 0.8 * a.breast, 6.5) ** 2
    result: F32 = body
    return result
