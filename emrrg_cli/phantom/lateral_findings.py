"""Draws findings and devices from the side."""

from __future__ import annotations

import numpy as np

from emrrg_cli.phantom.anatomy import fluid_level
from emrrg_cli.phantom.devices import through, tip_height
from emrrg_cli.phantom.disease import Lungs, airspace_fluid, cloud, height_of
from emrrg_cli.phantom.grid import F32, ball, noise, ramp, root
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.parameters import SIDES, Consolidation, Device, Nodule, Pneumothorax, Side, Zone
from emrrg_cli.phantom.profile import Profile

# Position of the lobes from front (0) to back (1): the middle lobe and the lingula in front, the lower lobes behind.
_DEPTH: dict[Zone, tuple[float, float]] = {"upper": (0.3, 0.6), "mid": (0.16, 0.42), "lower": (0.58, 0.86)}


def diseased_sides(profile: Profile, rng: np.random.Generator) -> dict[Side, Lungs]:
    """Returns both lungs of a case; they overlap on the film."""
    found, shape = profile.case.findings, profile.grid.shape
    lungs = {
        side: Lungs(np.ones(shape, np.float32), np.ones(shape, np.float32), np.zeros(shape, np.float32))
        for side in SIDES
    }
    if found.edema:
        _edema(lungs, profile, found.edema.strength, rng)
    for consolidation in found.consolidations:
        _consolidation(lungs[consolidation.side], profile, consolidation, rng)
    if found.nodule:
        _nodule(lungs[found.nodule.side], profile, found.nodule)
    for collapse in found.atelectases:
        _atelectasis(lungs[collapse.side], profile, collapse.side, collapse.strength, collapse.shape == "band", rng)
    for effusion in found.effusions:
        _effusion(lungs[effusion.side], profile, effusion.level)
    if found.pneumothorax:
        _pneumothorax(lungs[found.pneumothorax.side], profile, found.pneumothorax)
    return lungs


def lateral_place(profile: Profile, side: Side, zone: Zone, along: float, depth: float) -> tuple[float, float]:
    """Returns a point in a zone of a lung, cm: `along` top to bottom, `depth` front to back within the zone."""
    y = height_of(profile.case, profile.dome[side], zone, along)
    front, back = _DEPTH[zone]
    return profile.inside(y, front + depth * (back - front)), y


def _edema(lungs: dict[Side, Lungs], profile: Profile, strength: float, rng: np.random.Generator) -> None:
    """Adds haze around the hila, crowded vessels, thick fissures and septal lines at the bases."""
    grid = profile.grid
    haze = np.exp(-(((grid.x - 0.4) * (1 / 5.2)) ** 2) - ((grid.y - 4.0) * (1 / 7.0)) ** 2)
    patchy = np.clip(1 + noise(rng, grid, (14, 0.3), (36, 0.22)), 0.3, 1.6)
    reticular = np.abs(noise(rng, grid, (90, 0.22 * strength)))
    t = np.linspace(0, 1, 24, dtype=np.float32)
    for side in SIDES:
        lung = lungs[side]
        lung.aeration *= np.clip(1 - airspace_fluid(strength) * haze * patchy, 0.05, 1)
        lung.vessels *= 1 + 0.6 * strength
        ink = Ink(grid)
        y = -3 + t * (profile.dome[side] + 2.5)
        ink.line(5.5 - 10.5 * t, y + 0.4 * np.sin(3 * t), 0.1 + 0.1 * strength)
        for _ in range(int(6 + 8 * strength)):
            row = profile.dome[side] + rng.uniform(-4, 2)
            ink.line(profile.inside(row, 0.97) - t * rng.uniform(1.0, 2.0), row - 0.3 * t, 0.1)
        lung.tissue += ink.total() * (1.0 + strength) + reticular * haze


def _consolidation(lung: Lungs, profile: Profile, c: Consolidation, rng: np.random.Generator) -> None:
    x, y = lateral_place(profile, c.side, c.zone, 0.5, c.depth)
    cover = cloud(profile.grid, x, y, c.radius * 0.92, rng)
    lung.aeration *= 1 - c.density * cover
    lung.vessels *= 1 - (0.8 * c.density) * cover


def _nodule(lung: Lungs, profile: Profile, n: Nodule) -> None:
    x, y = lateral_place(profile, n.side, n.zone, n.along, n.depth)
    radius = n.diameter_mm / 20
    lung.tissue += (2 * radius * 2.1) * ball(profile.grid, x, y, radius, radius * 0.94)


def _atelectasis(
    lung: Lungs, profile: Profile, side: Side, strength: float, band: bool, rng: np.random.Generator
) -> None:
    """Adds plates above the back half of the diaphragm."""
    grid, ink = profile.grid, Ink(profile.grid)
    t = np.linspace(0, 1, 16, dtype=np.float32)
    radius = (0.2 + 0.14 * strength) * np.sqrt(np.clip(np.sin(np.pi * t), 0.02, 1))
    for k in range(5 if band else 2):
        y = profile.dome[side] - 0.9 - (0.45 if band else 1.3) * k - rng.uniform(0, 0.5)
        start = profile.inside(y, rng.uniform(0.4, 0.5))
        ink.line(start + t * rng.uniform(4, 6), y + rng.uniform(0.5, 2.5) * t, radius)
    lung.tissue += ink.total() * (2.6 * strength)
    if band:
        below = profile.below[side]
        near = ramp(-below, -0.5, 0.3) * (1 - ramp(-below, 1.6, 4.2)) * ramp(grid.x, -2, 1)
        lung.aeration *= np.clip(1 - (0.5 * strength) * near, 0.1, 1)


def _effusion(lung: Lungs, profile: Profile, level: float) -> None:
    """Adds fluid, which fills the posterior angle first and rises along the back wall."""
    grid = profile.grid
    climb = 1.4 + 3.2 * min(level, 0.5)
    surface = fluid_level(profile.case, level) + 0.6 - climb * (0.9 * np.maximum(profile.across, 0) ** 3)
    surface = surface - 0.4 * climb * np.maximum(-profile.across, 0) ** 3
    depth = grid.y - surface
    cover = np.clip(root((depth + 0.3) * (1 / (1.0 + 1.6 * level))), 0, 1)
    lung.aeration *= 1 - cover
    lung.vessels *= 1 - cover
    lung.aeration *= 1 - (0.28 * level) * ramp(depth, -7, 0)


def _pneumothorax(lung: Lungs, profile: Profile, p: Pneumothorax) -> None:
    """Adds air without vessels at the top and the front wall, and a thin pleural line."""
    grid, a = profile.grid, profile.case.anatomy
    wall = np.minimum((1 + profile.across), (1 - profile.across) * 1.6) * (profile.back - profile.front) / 2
    away = 0.6 * p.gap - np.minimum(wall, grid.y - a.apex) * (1 + ramp(grid.y, 4, 14))
    outside = ramp(away, -0.05, 0.08)
    kept = {"small": 0.96, "moderate": 0.86, "large": 0.62}[p.amount]
    lung.aeration *= kept
    lung.aeration += outside * ((1 / (1 - a.lung_density)) - lung.aeration)
    lung.vessels *= 1 - outside
    half = max(0.1, grid.pixel * 0.7)
    lung.tissue += np.maximum(1 - np.abs(away) * (1 / half), 0) * (0.17 / half)


def lateral_devices(profile: Profile, ink: Ink) -> F32:
    """Draws all devices of a case as attenuation, `[h, w]`; lines and tubes go to `ink`."""
    total = np.zeros(profile.grid.shape, np.float32)
    top, dome = profile.case.anatomy.apex, profile.dome["left"]
    for d in profile.case.findings.devices:
        tip = tip_height(d)
        if d.kind == "endotracheal tube":
            x, y = through([(-1.6, top - 12), (-0.9, -9), (0.5 + 0.16 * tip, tip)])
            ink.line(x, y, 0.12, 4.0)
        elif d.kind == "nasogastric tube":
            path = [(-0.6, top - 12), (0.8, -8), (2.2, 0), (2.6, 6)]
            path += [(2.5, tip + 1.0)] if d.misplaced else [(1.6, dome - 1), (-0.5, dome + 3), (-3, dome + 6)]
            ink.line(*through(path), 0.14, 4.5)
        elif d.kind == "central line":
            start = [(-0.5, top - 10), (-1.5, -6)] if d.wander > 0 else [(-5.5, top + 3), (-4.0, -6.5), (-2.4, -4)]
            ink.line(*through([*start, (-1.6, -0.8), (-1.8, tip)]), 0.13, 5.0)
        else:
            total += _pacemaker(profile, ink, d)
    return total


def _pacemaker(profile: Profile, ink: Ink, d: Device) -> F32:
    """Draws the generator on edge under the skin, with leads to the right atrium and the right ventricle in front."""
    top, dome = profile.case.anatomy.apex, profile.dome["left"]
    y = top + 7.2
    x = profile.at(profile.skin[0], y) + 1.4
    enter = [(x, y - 2), (-4.5, top + 1), (-2.6, -3.2), (-2.2, 0.5)]
    right_ventricle = (profile.inside(dome - 1.5, 0.12), dome - 1.5)
    for end in ([(-2.4, 6), (-3.4, 7.4), (-3.8, 5.8)], [(-2.6, 6), (-3.2, dome - 2.5), right_ventricle]):
        ink.line(*through([*enter, *end], 90), 0.1, 5.0)
    return 2.2 * ramp(ball(profile.grid, x, y, 0.65, 2.5), 0, 0.4)
