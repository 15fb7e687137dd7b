"""Draws the predictions of stage 1: films beside target and predicted patches."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from emrrg_cli.files.atomic import atomic_write_bytes

TITLES = ("film", "target", "prediction", "prediction, brightness restored")
CAPTION = (
    "Each 64 x 64 cluster is predicted from earlier clusters, row by row. The first (outlined) is not predicted.",
    "Target, prediction: pixels normalised patch by patch, as in the loss.",
    "Brightness restored: the prediction with mean and variance of the film's patches, which are not predicted.",
)
_SIDE = 192  # of a film as it is shown
_GAP = 8
_LINE = 14
_CLUSTER = 64
_SPREAD = 2.5  # normalised pixels from -2.5 to 2.5 are black to white
_INK, _PAPER, _OUTLINE = (40, 40, 40), (255, 255, 255), (224, 160, 48)

Pictures = NDArray[np.float32]


def draw_predictions(
    films: Pictures, targets: Pictures, predictions: Pictures, restored: Pictures, path: Path, title: str
) -> None:
    """Writes a PNG with one row per film.

    Args:
        films: `[n, h, w]`, grey, 0 to 255.
        targets: `[n, h, w]`, pixels normalised by patch.
        predictions: `[n, h, w]`, likewise.
        restored: `[n, h, w]`, predictions as grey values, 0 to 255.
        path: the PNG to write.
        title: title of the picture.

    Raises:
        RunError: the file cannot be written.
    """
    columns = (films, _visible(targets), _visible(predictions), restored)
    top = 2 * (_LINE + _GAP)
    width = _GAP + len(columns) * (_SIDE + _GAP)
    height = top + len(films) * (_SIDE + _GAP) + len(CAPTION) * _LINE + _GAP
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    font, small = ImageFont.load_default(12), ImageFont.load_default(10)
    draw.text((_GAP, _GAP // 2), title, _INK, font)
    for column, (pictures, name) in enumerate(zip(columns, TITLES, strict=True)):
        left = _GAP + column * (_SIDE + _GAP)
        draw.text((left, _LINE + _GAP), name, _INK, small)
        for row, picture in enumerate(pictures):
            page.paste(_shown(picture), (left, top + row * (_SIDE + _GAP)))
    for line, text in enumerate(CAPTION):
        draw.text((_GAP, top + len(films) * (_SIDE + _GAP) + line * _LINE), text, _INK, small)
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    atomic_write_bytes(path, buffer.getvalue())


def _visible(normalised: Pictures) -> Pictures:
    return ((normalised / _SPREAD + 1) * np.float32(127.5)).astype(np.float32)


def _shown(picture: Pictures) -> Image.Image:
    side = round(_SIDE * _CLUSTER / picture.shape[0])
    grey = Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))
    shown = grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).convert("RGB")
    ImageDraw.Draw(shown).rectangle((0, 0, side - 1, side - 1), outline=_OUTLINE)
    return shown
