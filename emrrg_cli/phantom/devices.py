"""Draws tubes, catheters and pacemakers as attenuation, `[h, w]`."""

from __future__ import annotations

import numpy as np

from emrrg_cli.phantom.anatomy import Thorax
from emrrg_cli.phantom.grid import F32, curve, ramp
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.parameters import Device, sign


def devices(thorax: Thorax, ink: Ink) -> F32:
    """Draws all devices of a case; lines and tubes go to `ink`."""
    total = np.zeros(thorax.grid.shape, np.float32)
    for device in thorax.case.findings.devices:
        if device.kind == "endotracheal tube":
            _endotracheal_tube(ink, thorax, device)
        elif device.kind == "nasogastric tube":
            _nasogastric_tube(ink, thorax, device)
        elif device.kind == "central line":
            _central_line(ink, thorax, device)
        else:
            total += _pacemaker(ink, thorax, device)
    return total


def tip_height(d: Device) -> float:
    """Returns y of the tip of a tube or line, cm from the carina; for a nasogastric tube only in the oesophagus."""
    if d.kind == "endotracheal tube":
        return 1.2 if d.misplaced else -4.5 + 1.5 * d.wander
    if d.kind == "nasogastric tube":
        return 6.5 + 1.5 * d.wander
    return 7.6 + d.wander if d.misplaced else 2.6 + 1.2 * d.wander


def through(points: list[tuple[float, float]], n: int = 60) -> tuple[F32, F32]:
    """Returns a smooth path through points (x, y), `[n]` each; it follows the points, so it may turn back."""
    at = np.linspace(0, len(points) - 1, n, dtype=np.float32)
    x = curve(at, [(float(i), p[0]) for i, p in enumerate(points)])
    y = curve(at, [(float(i), p[1]) for i, p in enumerate(points)])
    return x, y


def _endotracheal_tube(ink: Ink, thorax: Thorax, d: Device) -> None:
    """Draws two faint walls and a radio-opaque stripe to 3 to 6 cm above the carina or into the right main bronchus."""
    shift, top = thorax.case.anatomy.rotation, thorax.case.anatomy.apex - 12
    tip = tip_height(d)
    end = [(-0.2 + shift, -0.6), (-1.7 + shift, tip)] if d.misplaced else [(0.15 * d.wander + shift, tip)]
    x, y = through([(0.25 * d.wander, top), (0.1, -9), *end])
    ink.line(x - 0.42, y, 0.09, 2.2)
    ink.line(x + 0.42, y, 0.12, 5.0)


def _nasogastric_tube(ink: Ink, thorax: Thorax, d: Device) -> None:
    """Draws a tube down the oesophagus into the stomach, unless it ends above."""
    shift, dome = thorax.case.anatomy.rotation, thorax.dome["left"]
    path = [(-0.2, thorax.case.anatomy.apex - 12), (0.5 + 0.2 * d.wander, -4), (0.6 + shift, 4)]
    if d.misplaced:
        path += [(0.8 + shift, tip_height(d))]
    else:
        path += [
            (1.3 + shift, dome - 1.5),
            (3.2, dome + 2.5),
            (5.6 + d.wander, dome + 4.6),
            (6.5 + d.wander, dome + 6.5),
        ]
    x, y = through(path)
    ink.line(x, y, 0.14, 5.5)


def _central_line(ink: Ink, thorax: Thorax, d: Device) -> None:
    """Draws a line from the neck or under the clavicle into the superior vena cava or the right atrium."""
    a = thorax.case.anatomy
    tip = (-2.1 + a.rotation, tip_height(d))
    neck = d.wander > 0
    if d.side == "right":
        start = (
            [(-4.2, a.apex - 10), (-3.6, a.apex - 1), (-2.6, -4)]
            if neck
            else [(-13.5, -1.5), (-9.5, a.apex + 2.2), (-5, a.apex + 2.8), (-2.4, -3.5)]
        )
    else:
        start = (
            [(4.4, a.apex - 10), (3.6, a.apex + 0.5), (1.2, -3.2)]
            if neck
            else [(13.5, -1.5), (9.5, a.apex + 2.2), (5, a.apex + 3.0), (0.6, -3.6)]
        )
    x, y = through([*start, (-1.9 + a.rotation, -0.8), tip])
    ink.line(x, y, 0.13, 6.5)


def _pacemaker(ink: Ink, thorax: Thorax, d: Device) -> F32:
    """Draws a generator below the clavicle with leads to the right atrium and the right ventricle."""
    a, grid, s = thorax.case.anatomy, thorax.grid, sign(d.side or "left")
    cx, cy = s * (a.thorax_half_width - 1.9 + 0.6 * d.wander), a.apex + 7.2
    dx, dy = np.abs(grid.x - cx), np.abs(grid.y - cy)
    corner = np.maximum(dx - 1.3, 0) ** 2 + np.maximum(dy - 1.0, 0) ** 2
    box = ramp(1.2 - np.sqrt(corner), 0, max(0.12, grid.pixel))
    base = thorax.dome["left"]
    apex_x = thorax.heart_span[1] * 0.62
    enter = [
        (cx - s * 1.2, cy - 1.4),
        (cx - s * 3.5, a.apex + 2.8),
        (s * 4.6, a.apex + 3.1),
        (-0.9 + s * 0.9 + a.rotation, -3.2),
        (-2.0 + a.rotation, 0.5),
    ]
    for end in (
        [(-2.6, 5.5), (-3.2, 7.8), (-2.0, 7.2), (-1.4, 5.6)],
        [(-2.3, 6), (-0.8, base - 2.2), (2.2, base - 1.6), (apex_x, base - 1.9)],
    ):
        x, y = through([*enter, *end], 90)
        ink.line(x, y, 0.1, 6.0)
        ink.line(x[-4:], y[-4:], 0.16, 7.0)
    return box * 2.2
