"""From attenuation to the grey of a film: scatter, blur, quantum noise, exposure, borders, a side marker."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.phantom.anatomy import Thorax
from emrrg_cli.phantom.grid import F32, Grid, blurred, resized
from emrrg_cli.phantom.parameters import Film

_TABLE = 8192  # steps of the characteristic curve
_DENSEST = 9.0  # -log of the fewest photons


def expose(attenuation: F32, healthy: F32, thorax: Thorax, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A film: exponents of Beer and Lambert's law to grey.

    Args:
        attenuation: Of the patient, `[h, w]`.
        healthy: Of the same patient without disease, `[h, w]`: a white lung must not make the other one black.
        thorax: Its geometry.
        rng: For the noise, the last draws of a film.

    Returns:
        uint8 `[h, w]`, bone bright.
    """
    grid, film = thorax.grid, thorax.case.film
    attenuation = blurred(attenuation, film.blur * 0.1 / grid.pixel)
    primary = np.exp(-attenuation)
    veil = film.scatter * 0.16 * _veil(primary, grid)
    signal = primary + veil
    grain = rng.standard_normal(signal.shape, dtype=np.float32) * (0.0035 * film.noise)
    signal *= 1 + grain / np.sqrt(signal + 0.004)
    low, high = _references(healthy, veil, thorax)
    grey = _developed(signal, film, low, high)
    _borders(grey, film)
    if film.marker:
        _marker(grey, grid, thorax)
    return grey


def _developed(signal: F32, film: Film, low: float, high: float) -> NDArray[np.uint8]:
    """Photons to grey, uint8 `[h, w]`, by a table over their logarithm.

    Air around the patient becomes black, lung and mediastinum (densities `low` and `high`) the greys asked for; in
    between runs the curve of a wide latitude film, steep where the patient is thin, flat towards black and white.
    """
    density = np.linspace(0, _DENSEST, _TABLE)
    relative = (density - low) / max(high - low, 0.3)
    concave = np.where(relative > 0, 2.1 * relative / (1.1 + np.maximum(relative, 0)), 2.1 / 1.1 * relative)
    grey = film.lung_grey + concave * (film.mediastinum_grey - film.lung_grey)
    bright, dark = 0.85, 0.16
    grey = np.where(grey > bright, bright + (1 - bright) * np.tanh((grey - bright) / (1.35 * (1 - bright))), grey)
    grey = np.where(grey < dark, dark + dark * np.tanh((grey - dark) / (1.3 * dark)), grey)
    table = np.clip(np.rint(grey * 255), 0, 255).astype(np.uint8)
    index = np.log(np.maximum(signal, 1e-9)) * (-(_TABLE - 1) / _DENSEST)
    return table[np.clip(index, 0, _TABLE - 1).astype(np.int16)]


def _veil(primary: F32, grid: Grid) -> F32:
    """Scattered photons: the primary picture, spread over some 4 cm."""
    height, width = grid.shape
    coarse = resized(primary, 48, 48)
    return resized(blurred(np.maximum(coarse, 0), 48 * 4.0 / (grid.pixel * min(height, width))), height, width)


def _references(healthy: F32, veil: F32, thorax: Thorax) -> tuple[float, float]:
    """Density of air-filled lung and of the mediastinum, which the exposure is set by; every third pixel will do."""
    few = (slice(None, None, 3), slice(None, None, 3))
    density = -np.log(np.exp(-healthy[few]) + veil[few])
    outwards, y = thorax.outwards[few], thorax.grid.y[few]
    lung = density[(thorax.air[few] > 0.45 * thorax.case.anatomy.depth) & (outwards > 4)]
    centre = density[(outwards < 3) & (y > -2) & (y < thorax.dome["right"])]
    return float(np.quantile(lung, 0.4)), float(np.median(centre))


def _borders(grey: NDArray[np.uint8], film: Film) -> None:
    """Collimated edges are unexposed: dark on the displayed film, as most archives show them."""
    height, width = grey.shape
    left, top, right, bottom = film.collimation
    grey[:, : round(left * width)] = 2
    grey[: round(top * height)] = 2
    grey[:, width - round(right * width) :] = 2
    grey[height - round(bottom * height) :] = 2


def _marker(grey: NDArray[np.uint8], grid: Grid, thorax: Thorax) -> None:
    """A lead letter L beside the patient's left shoulder."""
    height, width = grey.shape
    unit = 1 / grid.pixel
    column = round(width * 0.9 + thorax.case.film.shift_x * 6 / grid.pixel * 0.1)
    row = round(height * 0.06 + 0.3 * unit)
    long, short, thick = (max(1, round(v * unit)) for v in (1.9, 1.1, 0.32))
    column = min(column, width - short - 2)
    grey[row : row + long, column : column + thick] = 246
    grey[row + long - thick : row + long, column : column + short] = 246
