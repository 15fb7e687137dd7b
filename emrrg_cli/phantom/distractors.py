"""Draws structures that look like findings (skin folds, nipples, calcified nodes), and the lead letters of a film."""

from __future__ import annotations

import numpy as np

from emrrg_cli.phantom.anatomy import Thorax
from emrrg_cli.phantom.grid import F32, Grid, ball, generator, ramp
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.parameters import Case, Film, sign
from emrrg_cli.phantom.vessels import hilum

_LEAD = 40.0  # attenuation per cm
# Strokes of lead letters on a grid two wide and four high, y downwards.
_LETTERS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "A": (((0, 4), (1, 0), (2, 4)), ((0.5, 2.6), (1.5, 2.6))),
    "D": (((0, 0), (0, 4), (1.2, 4), (2, 3), (2, 1), (1.2, 0), (0, 0)),),
    "E": (((2, 0), (0, 0), (0, 4), (2, 4)), ((0, 2), (1.6, 2))),
    "J": (((2, 0), (2, 3.2), (1.2, 4), (0.4, 3.6), (0, 3)),),
    "K": (((0, 0), (0, 4)), ((2, 0), (0, 2.2), (2, 4))),
    "L": (((0, 0), (0, 4), (2, 4)),),
    "M": (((0, 4), (0, 0), (1, 2), (2, 0), (2, 4)),),
    "P": (((0, 4), (0, 0), (1.6, 0), (2, 1), (1.6, 2), (0, 2)),),
    "R": (((0, 4), (0, 0), (1.6, 0), (2, 1), (1.6, 2), (0, 2)), ((0.9, 2), (2, 4))),
    "T": (((0, 0), (2, 0)), ((1, 0), (1, 4))),
}


def distractors(thorax: Thorax) -> F32:
    """Draws the soft tissue and calcium of a case's distractors, cm of soft tissue, `[h, w]`."""
    case, grid = thorax.case, thorax.grid
    d, a = case.distractors, case.anatomy
    rng = generator(case.texture_seed, 4)
    total = np.zeros(grid.shape, np.float32)
    if d.skin_fold:
        total += _skin_fold(thorax)
    if d.nipples:
        for s in (-1.0, 1.0):
            x, y = s * (0.5 * a.body_half_width + rng.normal(0, 0.5)), a.dome["right"] - 1.5 + rng.normal(0, 0.8)
            total += d.nipples * ball(grid, x, y, 0.55, 0.5)
    if d.granuloma:
        s = sign(d.granuloma)
        x = s * rng.uniform(5.5, 0.8 * a.thorax_half_width)
        total += 2.4 * ball(grid, x, granuloma_place(case)[0], 0.22, 0.2)
    if d.calcified_nodes:
        x, y = hilum(case, d.calcified_nodes)
        for _ in range(4):
            size = rng.uniform(0.25, 0.5)
            total += 2.6 * ball(grid, x + rng.normal(0.3, 0.7), y + rng.normal(0.5, 1.1), size, 0.8 * size)
    return total


def granuloma_place(case: Case) -> tuple[float, float]:
    """Returns y of the calcified node in the lung, and its distance behind the middle of the chest, cm."""
    a, rng = case.anatomy, generator(case.texture_seed, 7)
    return float(rng.uniform(a.apex + 7, a.dome["right"] - 2)), float(rng.uniform(-4, 5))


def _skin_fold(thorax: Thorax) -> F32:
    """Draws a skin fold: dense with a sharp edge, fading inwards; it continues beyond the lung."""
    case, grid = thorax.case, thorax.grid
    side = case.distractors.skin_fold or "left"
    rng = generator(case.texture_seed, 5)
    top, lean = case.anatomy.apex + rng.uniform(0, 5), rng.uniform(0.1, 0.4)
    edge = 4.5 + 6.0 * case.distractors.skin_fold_at + lean * (grid.rows - top) - 0.012 * (grid.rows - top) ** 2
    away = edge - thorax.outwards
    length = ramp(grid.rows, top, top + 2) * (1 - ramp(grid.rows, top + 10, top + 16))
    fold: F32 = np.clip(1 - away * (1 / 3.5), 0, 1) * ramp(away, -0.03, 0.06) * length * thorax.on(side) * 1.5
    return fold


def letters(film: Film, grid: Grid) -> F32:
    """Draws the lead letters of a film as attenuation, `[h, w]`."""
    ink = Ink(grid)
    height, width = grid.shape
    cosine, sine = np.cos(film.marker_turn), np.sin(film.marker_turn)
    for place, letter in enumerate(film.marker):
        for stroke in _LETTERS.get(letter, ()):
            x, y = (np.array([point[k] for point in stroke], np.float32) for k in range(2))
            x, y = (x + 2.8 * place) * 0.5, (y - 2) * 0.45
            across, down = cosine * x - sine * y, sine * x + cosine * y
            column, row = film.marker_x * width + across / grid.pixel, film.marker_y * height + down / grid.pixel
            ink.line(*grid.place(column, row), 0.13, _LEAD)
    return ink.total()
