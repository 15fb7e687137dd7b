"""Renders synthetic chest radiographs from their parameters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.phantom.anatomy import Thorax, build_thorax, fine_texture
from emrrg_cli.phantom.bones import bones
from emrrg_cli.phantom.devices import devices
from emrrg_cli.phantom.disease import diseased
from emrrg_cli.phantom.distractors import distractors, letters
from emrrg_cli.phantom.film import expose
from emrrg_cli.phantom.grid import F32, Grid, ball, film_grid, generator, noise, ramp, root
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.lateral import render_lateral
from emrrg_cli.phantom.parameters import Case, Film
from emrrg_cli.phantom.vessels import vessels

SOFT = 0.19  # attenuation per cm of soft tissue


def render(case: Case, height: int = 256, width: int | None = None, *, film: Film | None = None) -> NDArray[np.uint8]:
    """Renders a synthetic chest radiograph; a pure function of its arguments.

    Args:
        case: The study.
        height: Height in pixels.
        width: Width in pixels; None: the same as `height`.
        film: One of the case's `films`; None: the frontal one.

    Returns:
        uint8 `[height, width]`: bone and soft tissue bright, lungs dark. On a frontal film the patient's right is at
        the left, on a lateral one the front.
    """
    if film is not None and film.view == "LATERAL":
        return render_lateral(case, film, height, width or height)
    grid = case_grid(case, height, width or height)
    thorax = build_thorax(case, grid)
    # Textures are drawn before the noise, whose draws depend on the size. So the lungs are the same at every size.
    rng = generator(case.texture_seed, 1)
    seen = attenuation(thorax, rng) + letters(case.film, grid)
    return expose(seen, healthy(thorax), case.film, grid, *reference_pixels(thorax), rng)


def reference_pixels(thorax: Thorax) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns the pixels of air-filled lung and of the mediastinum, which set the exposure, `[h, w]` each."""
    lung = (thorax.air > 0.45 * thorax.case.anatomy.depth) & (thorax.outwards > 4)
    return lung, (thorax.outwards < 3) & (thorax.grid.y > -2) & (thorax.grid.y < thorax.dome["right"])


def case_grid(case: Case, height: int, width: int) -> Grid:
    """Returns the grid of a case's frontal film."""
    film = case.film
    return film_grid(
        height,
        width,
        field=film.field,
        centre=(film.shift_x, film.shift_y),
        tilt=case.anatomy.tilt,
        bend=case.anatomy.bend,
    )


def attenuation(thorax: Thorax, rng: np.random.Generator) -> F32:
    """Computes the exponent of Beer and Lambert's law along every ray, `[h, w]`."""
    a = thorax.case.anatomy
    lungs = diseased(thorax, rng)
    # Structures inside the lungs are visible only where the lung is deep enough.
    shown = np.sqrt(np.minimum(thorax.air * (1 / (0.6 * a.depth)), 1))
    tree = vessels(thorax, rng) * (2.2 * a.vessels) * lungs.vessels
    grid = thorax.grid
    texture = 1 + noise(rng, grid, (10, 0.022), (40, 0.02), (110, 0.022)) + fine_texture(thorax.case, grid)
    ink = Ink(grid)  # in units of attenuation
    bone = bones(thorax, ink)
    metal = devices(thorax, ink)
    gas = _airways(thorax, ink) + _abdominal_gas(thorax, rng)
    air = thorax.air * lungs.aeration * (1 - a.lung_density) * texture
    # Structures on the skin are visible everywhere.
    soft = np.maximum(thorax.body - air + (tree + lungs.tissue) * shown + distractors(thorax) - gas, 0)
    result: F32 = soft * SOFT + bone * np.minimum(thorax.body, 1) + metal + ink.total()
    return result


def healthy(thorax: Thorax) -> F32:
    """Approximates the same thorax without disease and texture, `[h, w]`; it sets the exposure."""
    soft = thorax.body - thorax.air * (1 - thorax.case.anatomy.lung_density)
    return soft * SOFT + 0.1


def _airways(thorax: Thorax, ink: Ink) -> F32:
    """Draws trachea and main bronchi, cm of air."""
    grid, shift = thorax.grid, thorax.case.anatomy.rotation
    trachea = root(1 - ((grid.x - 0.8 * shift) / 0.92) ** 2) * ramp(0.4 - grid.rows, 0, 1.2)
    trachea = trachea * (1.5 + 1.2 * ramp(grid.rows, thorax.case.anatomy.apex - 3, thorax.case.anatomy.apex + 3))
    t = np.linspace(0, 1, 10, dtype=np.float32)
    ink.line(0.8 * shift - 0.3 - t * 2.6, t * 2.6 - 0.2, 0.55, -SOFT)
    ink.line(0.8 * shift + 0.3 + t * 3.4, t * 2.4 - 0.2, 0.48, -SOFT)
    return trachea


def _abdominal_gas(thorax: Thorax, rng: np.random.Generator) -> F32:
    """Draws the gastric bubble under the left dome and some gas in the colon, cm of air."""
    a, grid = thorax.case.anatomy, thorax.grid
    total = np.zeros(grid.shape, np.float32)
    if a.bubble > 0:
        x, y = 6.2 + 0.5 * a.rotation, thorax.dome["left"] + 0.8 + a.bubble
        bubble = ball(grid, x, y, a.bubble * 1.45, a.bubble)
        if a.rib_phase < 0.6:  # upright, with a fluid level
            bubble = bubble * (grid.y < y + 0.35 * a.bubble)
        total += bubble * (1.5 * a.bubble)
    for _ in range(4):
        x, y = rng.uniform(-9, 9), thorax.dome["left"] + rng.uniform(6, 11)
        size = rng.uniform(0.6, 1.6)
        total += ball(grid, x, y, size * 1.3, size) * (1.1 * size)
    return total
