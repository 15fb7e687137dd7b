"""Renders the lateral film: the same patient from the side, with mediastinum, spine and rib cage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.phantom.anatomy import fine_texture
from emrrg_cli.phantom.bones import rib_shapes
from emrrg_cli.phantom.distractors import granuloma_place, letters
from emrrg_cli.phantom.film import expose
from emrrg_cli.phantom.grid import F32, ball, film_grid, generator, noise, ramp, root
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.lateral_findings import diseased_sides, lateral_devices
from emrrg_cli.phantom.parameters import SIDES, Case, Film
from emrrg_cli.phantom.profile import Profile, build_profile
from emrrg_cli.phantom.vessels import branching

_SOFT = 0.115  # attenuation per cm of soft tissue; the beam is harder than for a frontal film
_BONE = 0.2


def render_lateral(case: Case, film: Film, height: int, width: int) -> NDArray[np.uint8]:
    """Renders a synthetic lateral chest radiograph, uint8 `[height, width]`; see `render`."""
    grid = film_grid(
        height, width, field=film.field, centre=(film.shift_x, film.shift_y), tilt=0.5 * case.anatomy.tilt, bend=0.0
    )
    profile = build_profile(case, grid)
    rng = generator(case.texture_seed, 6)
    seen = lateral_attenuation(profile, rng) + letters(film, grid)
    air = profile.air["right"] + profile.air["left"]
    healthy = (profile.body - air * (1 - case.anatomy.lung_density)) * _SOFT + 0.1
    dense = (air < 0.1) & (profile.body > 25)
    return expose(seen, healthy, film, grid, air > 0.55 * float(air.max()), dense, rng)


def lateral_attenuation(profile: Profile, rng: np.random.Generator) -> F32:
    """Computes the exponent of Beer and Lambert's law along every ray, `[h, w]`."""
    a, grid = profile.case.anatomy, profile.grid
    size = a.thorax_half_width / 13.9
    lungs = diseased_sides(profile, rng)
    texture = 1 + noise(rng, grid, (10, 0.02), (40, 0.02), (110, 0.022)) + fine_texture(profile.case, grid)
    soft = profile.body + _mediastinum(profile)
    for side in SIDES:
        air, lung = profile.air[side], lungs[side]
        shown = np.sqrt(np.minimum(air * (1 / (0.3 * a.depth)), 1))
        y = 2.4 if side == "right" else 1.6
        tree = branching(grid, rng, [(1.0, y, 1.0), (-0.4, y, -1.0)], 1.1 * size).total()
        tree = tree * (1.4 * a.vessels) * lung.vessels
        soft = soft - air * lung.aeration * (1 - a.lung_density) * texture + (tree + lung.tissue) * shown
    soft = soft - _gas(profile)
    ink = Ink(grid)  # in units of attenuation
    bone = _spine(profile) + _cage(profile, ink)
    metal = lateral_devices(profile, ink)
    result: F32 = np.maximum(soft, 0) * _SOFT + bone * np.minimum(profile.body, 1) + metal + ink.total()
    return result


def _mediastinum(profile: Profile) -> F32:
    """Draws aorta, pulmonary arteries and nodes, cm in addition to the soft tissue between the lungs, `[h, w]`."""
    case, grid = profile.case, profile.grid
    a, d = case.anatomy, case.distractors
    arch = 1.3 * a.knob * ball(grid, 1.2, -1.6, 1.7 * a.knob, 1.3 * a.knob)
    ascending = 2.6 * ball(grid, -2.8, 2.0, 2.6, 5.6)
    x = profile.spine - 2.4 - 0.6 * a.unfolded
    descending = 1.7 * root(1 - ((grid.x - x) * (1 / 1.3)) ** 2) * ramp(grid.y, -1, 2)
    hila = 2.6 * ball(grid, -0.9, 2.3, 1.3, 1.7) + 2.2 * ball(grid, 1.3, 1.1, 1.5, 1.2)
    total: F32 = np.maximum(arch, ascending) + descending + hila
    if d.granuloma:
        y, behind = granuloma_place(case)
        total = total + 2.8 * ball(grid, behind, y, 0.22, 0.2)
    if d.calcified_nodes:
        total = total + 3.4 * ball(grid, 0.6, 2.6, 0.5, 0.4) + 3.0 * ball(grid, 1.2, 1.6, 0.35, 0.3)
    return total


def _gas(profile: Profile) -> F32:
    """Draws the trachea, the upper lobe bronchi in cross-section and the gastric bubble, cm of air."""
    a, grid = profile.case.anatomy, profile.grid
    trachea = 1.7 * root(1 - ((grid.x - 0.5 - 0.16 * grid.rows) / 0.95) ** 2) * ramp(0.8 - grid.rows, 0, 1.5)
    bronchi = 1.8 * ball(grid, 0.7, 0.9, 0.6, 0.65) + 1.5 * ball(grid, 0.9, 2.7, 0.5, 0.55)
    total: F32 = trachea + bronchi
    if a.bubble > 0:
        y = profile.dome["left"] + 0.9 + a.bubble
        bubble = ball(grid, -2.2, y, 1.4 * a.bubble, a.bubble)
        if a.rib_phase < 0.6:  # upright, with a fluid level
            bubble = bubble * (grid.y < y + 0.35 * a.bubble)
        total = total + bubble * (3.4 * a.bubble)
    return total


def _spine(profile: Profile) -> F32:
    """Draws vertebral bodies with end plates, dark discs and foramina, and arches, as attenuation, `[h, w]`."""
    a, grid = profile.case.anatomy, profile.grid
    size = a.thorax_half_width / 13.9
    down, period = grid.rows - a.apex, 2.05 * size
    number = down / period - 0.0062 * (down / period) * np.abs(down / period) + a.rib_phase
    tilted = number + 0.05 * (grid.x - profile.spine)
    place = tilted - np.floor(tilted)
    rim = np.minimum(place, 1 - place)
    half = size * (1.5 + 0.015 * down)
    across = (grid.x - profile.spine) / half
    inside = np.clip((1 - np.abs(across)) * 8, 0, 1)
    plate = np.maximum(1 - np.abs(rim - 0.14) * 14, 0) + np.maximum(1 - np.abs(np.abs(across) - 0.94) * 10, 0)
    body = inside * ramp(rim, 0.05, 0.14) * (0.75 + 0.35 * np.minimum(plate, 1))
    behind = ramp(across, 1.0, 1.2) * (1 - ramp(across, 2.0, 2.5))
    arches = behind * (0.35 + 0.4 * ramp(np.abs(place - 0.75), 0.12, 0.3))
    result: F32 = (body * 0.26 + arches * 0.3) * ramp(grid.rows, a.apex - 8, a.apex + 6)
    return result


def _cage(profile: Profile, ink: Ink) -> F32:
    """Draws the borders of ribs, sternum and scapulae to `ink`, and the posterior ribs along their length."""
    case, grid = profile.case, profile.grid
    a = case.anatomy
    shapes = rib_shapes(case)
    t = np.linspace(0, 1, 30, dtype=np.float32)
    for side, shift in (("right", 0.5), ("left", 0.0)):
        for rib in range(1, 10):
            offset, slope, thick = shapes[0, :, rib + 12 * (side == "left")]
            start = a.apex + 0.6 * a.rib_phase + (rib + 0.3 + float(offset)) * 0.92 * a.rib_spacing
            # From the back wall downwards and forwards; the last part is cartilage.
            y = start + (7.5 + 12 * float(slope)) * np.sin(t * 1.5) ** 1.2 + shift - 1.6 * np.exp(-t * 9)
            front = np.interp(y, grid.rows[:, 0], profile.front[:, 0])
            back = np.interp(y, grid.rows[:, 0], profile.back[:, 0]) + 0.5
            x = back + (front - back) * 0.86 * t
            for border in (-0.55, 0.55):
                ink.line(
                    x.astype(np.float32),
                    (y + border * (1 + float(thick))).astype(np.float32),
                    0.1,
                    _BONE * a.rib_density,
                )
    y = np.linspace(a.apex + 4.5, a.apex + 17, 40, dtype=np.float32)
    sternum = np.interp(y, grid.rows[:, 0], profile.front[:, 0]).astype(np.float32) - 0.5
    for away in (0.0, -1.1):
        ink.line(sternum + away + 0.15 * np.sin(y * 1.9), y, 0.16, 0.5)
    for x0 in (3.6, 5.2):
        ink.line(x0 + 3.6 * t + 0.5 * np.sin(t * 3), a.apex + 1 + 11 * t, 0.16, 0.4)
    wall = np.exp(-(((profile.across - 1.02) * 14) ** 2)) * (grid.rows > a.apex + 1)
    level = (grid.y - a.apex) / (0.92 * a.rib_spacing) + a.rib_phase
    result: F32 = wall * 0.16 * (0.4 + 0.6 * np.abs(np.sin(np.pi * level)))
    return result
