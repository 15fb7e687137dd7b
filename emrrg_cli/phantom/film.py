"""Converts attenuation to the grey values of a film: scatter, blur, quantum noise, exposure, processing, borders."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.phantom.grid import F32, Grid, blurred, resized
from emrrg_cli.phantom.parameters import Film

_TABLE = 8192  # steps of the characteristic curve
_DENSEST = 9.0  # -log of the fewest photons


def expose(
    attenuation: F32,
    healthy: F32,
    film: Film,
    grid: Grid,
    lung: NDArray[np.bool_],
    dense: NDArray[np.bool_],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Exposes a film: converts exponents of Beer and Lambert's law to grey values.

    Args:
        attenuation: Attenuation of the patient, `[h, w]`.
        healthy: Attenuation of the same patient without disease, `[h, w]`. It sets the exposure, so that a white lung
            does not make the other one black.
        film: Exposure and processing.
        grid: Positions of the pixels.
        lung: Pixels of air-filled lung, `[h, w]`; they get the lung grey of `film`.
        dense: Pixels of the mediastinum, `[h, w]`; likewise.
        rng: Random generator of the noise, which is drawn last.

    Returns:
        uint8 `[h, w]`, bone bright.
    """
    attenuation = blurred(attenuation, film.blur * 0.1 / grid.pixel)
    primary = np.exp(-attenuation)
    # Scatter comes from the patient, not from the air around.
    veil = film.scatter * 0.16 * _spread(np.minimum(primary, 0.25), grid, 4.0)
    signal = primary + veil
    grain = rng.standard_normal(signal.shape, dtype=np.float32) * (0.0035 * film.noise)
    signal *= 1 + grain / np.sqrt(signal + 0.004)
    few = (slice(None, None, 3), slice(None, None, 3))  # every third pixel is enough
    density = -np.log(np.exp(-healthy[few]) + veil[few])
    low, high = float(np.quantile(density[lung[few]], 0.4)), float(np.median(density[dense[few]]))
    grey = _developed(-np.log(np.maximum(signal, 1e-6)), film, grid, low, high)
    _borders(grey, film)
    return grey


def _developed(density: F32, film: Film, grid: Grid, low: float, high: float) -> NDArray[np.uint8]:
    """Converts density to grey, uint8 `[h, w]`, by a table.

    Air around the patient becomes black; lung and mediastinum (densities `low` and `high`) get the grey values of
    `film`. Between them is the curve of a wide latitude film, steep for thin parts and flat towards black and white.
    Digital films are processed first: differences over some centimetres are reduced, which enhances small differences.
    """
    middle = (low + high) / 2
    coarse = np.clip(_spread(density, grid, 2.5), low, high)
    density = density - film.equalise * (coarse - middle)
    low, high = low + film.equalise * (middle - low), high - film.equalise * (high - middle)
    steps = np.linspace(0, _DENSEST, _TABLE)
    relative = (steps - low) / max(high - low, 0.3)
    concave = np.where(relative > 0, 1.55 * relative / (0.55 + np.maximum(relative, 0)), 1.7 * relative)
    grey = film.lung_grey + concave * (film.mediastinum_grey - film.lung_grey)
    bright, brightest, dark = 0.78, 0.95, 0.2
    over = (grey - bright) / (brightest - bright)
    grey = np.where(over > 0, bright + (brightest - bright) * np.tanh(over), grey)
    grey = np.where(grey < dark, dark + dark * np.tanh((grey - dark) / (1.3 * dark)), grey)
    table = np.clip(np.rint(grey * 255), 0, 255).astype(np.uint8)
    developed: NDArray[np.uint8] = table[np.clip(density * ((_TABLE - 1) / _DENSEST), 0, _TABLE - 1).astype(np.int16)]
    return developed


def _spread(image: F32, grid: Grid, sigma: float) -> F32:
    """Blurs the image by `sigma` cm."""
    height, width = grid.shape
    coarse = resized(image, 48, 48)
    return resized(blurred(np.maximum(coarse, 0), 48 * sigma / (grid.pixel * min(height, width))), height, width)


def _borders(grey: NDArray[np.uint8], film: Film) -> None:
    """Blackens collimated edges, as most archives display unexposed borders."""
    height, width = grey.shape
    left, top, right, bottom = film.collimation
    grey[:, : round(left * width)] = 2
    grey[: round(top * height)] = 2
    grey[:, width - round(right * width) :] = 2
    grey[height - round(bottom * height) :] = 2
