"""Applies findings to the lungs: remaining air and added tissue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emrrg_cli.phantom.anatomy import Thorax, fluid_level
from emrrg_cli.phantom.grid import F32, Grid, ball, curve, noise, ramp, root
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.parameters import (
    SIDES,
    Atelectasis,
    Case,
    Consolidation,
    Effusion,
    Nodule,
    Pneumothorax,
    Zone,
    sign,
)
from emrrg_cli.phantom.vessels import hilum

# Height of the zones' centres: 0 at the apex, 1 at the dome of the diaphragm.
_ZONE_HEIGHT: dict[Zone, float] = {"upper": 0.3, "mid": 0.58, "lower": 0.84}


@dataclass
class Lungs:
    """State of the lungs, `[h, w]` each.

    Attributes:
        aeration: Air relative to healthy lung: 1 healthy, 0 none, above 1 for air without lung.
        vessels: Visibility of vessels, 1 healthy.
        tissue: Added soft tissue, cm.
    """

    aeration: F32
    vessels: F32
    tissue: F32


def diseased(thorax: Thorax, rng: np.random.Generator) -> Lungs:
    """Returns the lungs of a case."""
    shape, found = thorax.grid.shape, thorax.case.findings
    lungs = Lungs(np.ones(shape, np.float32), np.ones(shape, np.float32), np.zeros(shape, np.float32))
    if found.edema:
        _edema(lungs, thorax, found.edema.strength, rng)
    for consolidation in found.consolidations:
        _consolidation(lungs, thorax, consolidation, rng)
    if found.nodule:
        _nodule(lungs, thorax, found.nodule)
    for collapse in found.atelectases:
        _atelectasis(lungs, thorax, collapse, rng)
    for effusion in found.effusions:
        _effusion(lungs, thorax, effusion, rng)
    if found.pneumothorax:
        _pneumothorax(lungs, thorax, found.pneumothorax)
    return lungs


def place(thorax: Thorax, side: float, zone: Zone, across: float, along: float = 0.5) -> tuple[float, float]:
    """Returns a point in a zone of a lung, cm: `across` 0 (mediastinum) to 1 (chest wall), `along` top to bottom."""
    y = height_of(thorax.case, thorax.dome["right" if side < 0 else "left"], zone, along)
    outer = thorax.width_at(y) - 1.2
    inner = 3.4
    if side > 0:  # the heart occupies the inner part of the left lower zone
        inner = max(inner, min(thorax.heart_span[1] * ramp_scalar(y, 3, 9), outer - 2.5))
    return side * (inner + across * (outer - inner)), y


def height_of(case: Case, dome: float, zone: Zone, along: float) -> float:
    """Returns y of a point in a zone, cm, for a lung that reaches from the apex to `dome`."""
    apex = case.anatomy.apex
    return apex + (_ZONE_HEIGHT[zone] + (along - 0.5) * 0.26) * (dome - apex)


def ramp_scalar(value: float, low: float, high: float) -> float:
    """`ramp` of one number."""
    return float(ramp(np.array([value], np.float32), low, high)[0])


def _edema(lungs: Lungs, thorax: Thorax, strength: float, rng: np.random.Generator) -> None:
    """Adds haze around the hila, blurred and crowded vessels, and septal lines at the bases."""
    case, grid = thorax.case, thorax.grid
    haze = np.zeros(grid.shape, np.float32)
    for side in SIDES:
        x, y = hilum(case, side)
        away = ((grid.x - (x + sign(side) * 1.6)) * (1 / 6.2)) ** 2 + ((grid.y - (y + 2.5)) * (1 / 8.0)) ** 2
        haze = np.maximum(haze, np.exp(-away))
    patchy = 1 + noise(rng, grid, (14, 0.3), (36, 0.22))
    lungs.aeration *= np.clip(1 - airspace_fluid(strength) * haze * np.clip(patchy, 0.3, 1.6), 0.05, 1)
    lungs.vessels *= 1 + 0.6 * strength
    ink = Ink(grid)
    for s in (-1.0, 1.0):
        n = int(10 + 14 * strength)
        t = np.linspace(0, 1, 6, dtype=np.float32)
        for _ in range(n):
            y = thorax.dome["right" if s < 0 else "left"] + rng.uniform(-5.5, 2.5)
            ink.line(s * (thorax.width_at(y) - 0.3 - t * rng.uniform(1.2, 2.4)), y - 0.25 * t, 0.11)
    reticular = np.abs(noise(rng, grid, (90, 0.22 * strength)))
    lungs.tissue += ink.total() * (1.0 + strength) + reticular * haze


def airspace_fluid(strength: float) -> float:
    """Returns the fraction of air that an edema displaces, 0 to 1; small for interstitial edema."""
    return 0.85 * strength * min(1.0, 0.25 + 0.9 * strength)


def _consolidation(lungs: Lungs, thorax: Thorax, c: Consolidation, rng: np.random.Generator) -> None:
    """Adds a cloudy area without a sharp edge; its bronchi stay open as dark branches."""
    grid, s = thorax.grid, sign(c.side)
    x, y = place(thorax, s, c.zone, 0.5)
    cover = cloud(grid, x, y, c.radius, rng) * thorax.on(c.side)
    ink = Ink(grid)
    hx, hy = hilum(thorax.case, c.side)
    heading = np.arctan2(y - hy, x - hx)
    for turn in rng.uniform(-0.7, 0.7, 5):
        t = np.linspace(0, 1, 12, dtype=np.float32)
        reach = c.radius * 1.0
        bend = (heading + turn) + 0.3 * t
        ink.line(
            x + (t - 0.6) * reach * np.cos(bend),
            y + (t - 0.6) * reach * np.sin(bend),
            0.13 - 0.05 * t,
        )
    lungs.aeration *= 1 - c.density * cover
    lungs.tissue -= ink.total() * cover * 1.4
    lungs.vessels *= 1 - (0.8 * c.density) * cover


def cloud(grid: Grid, x: float, y: float, radius: float, rng: np.random.Generator) -> F32:
    """Returns a patchy area around a point, 0 to 1, `[h, w]`."""
    total = np.zeros(grid.shape, np.float32)
    for _ in range(9):
        cx, cy = x + rng.normal(0, 0.5) * radius, y + rng.normal(0, 0.5) * radius
        rx, ry = radius * rng.uniform(0.4, 0.85), radius * rng.uniform(0.35, 0.75)
        total += np.exp(-(((grid.x - cx) * (1 / rx)) ** 2) - ((grid.y - cy) * (1 / ry)) ** 2)
    patchy = np.clip(1 + noise(rng, grid, (18, 0.4), (50, 0.22)), 0.35, 2)
    return 1 - np.exp((-0.62) * total * patchy)


def _nodule(lungs: Lungs, thorax: Thorax, n: Nodule) -> None:
    x, y = place(thorax, sign(n.side), n.zone, n.across, n.along)
    radius = n.diameter_mm / 20
    # Denser than its chord of soft tissue, like nodules with some calcium.
    lungs.tissue += (2 * radius * (1.75 if n.diameter_mm < 16 else 1.35)) * ball(
        thorax.grid, x, y, radius, radius * 0.94
    )


def _atelectasis(lungs: Lungs, thorax: Thorax, a: Atelectasis, rng: np.random.Generator) -> None:
    """Adds plates or a band above the diaphragm, almost horizontal, slightly higher at the outer side."""
    grid, s = thorax.grid, sign(a.side)
    dome = thorax.dome[a.side]
    inner = 3.6 if a.side == "right" else max(3.6, thorax.heart_span[1] - 2.2)
    outer = thorax.width_at(dome - 1.5) - 1.4
    ink = Ink(grid)
    lines = 2 if a.shape == "linear" else 5
    for k in range(lines):
        start, end = inner + rng.uniform(0, 1.5), outer - rng.uniform(0, 2.0)
        y = dome - 1.1 - (1.3 * k if a.shape == "linear" else 0.45 * k) - rng.uniform(0, 0.5)
        rise = rng.uniform(-0.5, 1.6)
        t = np.linspace(0, 1, 16, dtype=np.float32)
        radius = (0.2 + 0.14 * a.strength) * np.sqrt(np.clip(np.sin(np.pi * t), 0.02, 1))
        ink.line(
            s * (start + t * max(end - start, 3.0)),
            y - rise * t + 0.25 * np.sin(t * 5),
            radius,
        )
    lungs.tissue += ink.total() * (2.6 * a.strength)
    if a.shape == "band":
        near = ramp(-thorax.below, -0.5, 0.3) * (1 - ramp(-thorax.below, 1.6, 4.2)) * thorax.on(a.side)
        ragged = np.clip(1 + noise(rng, grid, (24, 0.3)), 0.3, 1.5)
        lungs.aeration *= np.clip(1 - (0.5 * a.strength) * near * ragged, 0.1, 1)


def _effusion(lungs: Lungs, thorax: Thorax, e: Effusion, rng: np.random.Generator) -> None:
    """Adds fluid whose level rises along the chest wall; it is dense below and thin above."""
    grid = thorax.grid
    outer = thorax.outwards / thorax.half_width
    height = fluid_level(thorax.case, e.level)
    climb = 1.4 + 3.2 * min(e.level, 0.5) + 1.0 * e.level
    level = height - climb * (outer**5) - 0.8 * np.maximum(0.35 - outer, 0)
    depth = grid.y - level
    thick = 1.3 + 2.6 * e.level
    cover = np.clip(root((depth + 0.3) / thick), 0, 1) * 0.97
    cover *= thorax.on(e.side)
    lungs.aeration *= 1 - cover
    lungs.vessels *= 1 - cover
    # Some fluid behind the lung reduces contrast above the level.
    lungs.aeration *= 1 - (0.28 * e.level) * ramp(depth, -7, 0) * thorax.on(e.side)


def _pneumothorax(lungs: Lungs, thorax: Thorax, p: Pneumothorax) -> None:
    """Adds air between the chest wall and a thin pleural line, without vessels; the lung inside is slightly denser."""
    grid, a = thorax.grid, thorax.case.anatomy
    large = p.amount == "large"
    fall = (grid.rows - a.apex) * (1 / a.lung_height)
    # The collapsed lung retracts from the apex and the side, least at the base, and never behind the heart.
    top = a.apex + p.gap * (0.7 if large else 1.0)
    gap = p.gap * curve(fall, [(0, 1), (0.5, 1), (0.8, 0.85 if large else 0.6), (1, 0.6 if large else 0)])
    shifted = np.interp(grid.rows[:, 0] - (top - a.apex), grid.rows[:, 0], thorax.half_width[:, 0])
    border = abs(thorax.heart_span[0 if p.side == "right" else 1])
    least = 3.6 + ramp(grid.rows, 1, 8) * max(border - 3.0, 0)
    crown = root((grid.rows - top) / (2.2 + 0.6 * p.gap)) * 5.2
    edge = np.minimum(np.maximum(shifted.astype(np.float32)[:, None] - gap, least), crown)
    edge = np.where(grid.rows > top + 9, np.maximum(edge, least), edge).astype(np.float32)
    steep = np.gradient(edge[:, 0], grid.pixel).astype(np.float32)[:, None]
    away = (thorax.outwards - edge) / np.sqrt(1 + np.minimum(steep**2, 30))
    away = np.where(grid.rows < top, np.maximum(away, top - grid.rows), away).astype(np.float32)
    side = thorax.on(p.side)
    outside = ramp(away, -0.05, 0.08) * side
    # Beyond the line there is only air; the lung inside has lost some air.
    kept = {"small": 0.96, "moderate": 0.86, "large": 0.62}[p.amount]
    lungs.aeration *= 1 - (1 - kept) * side
    lungs.aeration += outside * ((1 / (1 - a.lung_density)) - lungs.aeration)
    lungs.vessels *= 1 - outside
    half = max(0.1, grid.pixel * 0.7)
    line = np.maximum(1 - np.abs(away) / half, 0) * side
    lungs.tissue += line * (1.7 * 0.1 / half)
