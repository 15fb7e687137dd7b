"""Draws a contact sheet: a few studies with their images and reports in one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emrrg_cli.files.atomic import atomic_write_bytes

_COLUMNS = 4
_WIDTH = 380  # of a study, pixels
_PICTURE = 300  # height of its images
_GAP = 24
_LINES = 9  # of its report
_INK, _MUTED, _PAPER, _DARK = "#1c1c1c", "#767676", "#ffffff", "#101010"


@dataclass(frozen=True)
class Tile:
    """One study: name, short description, images (None: cannot be decoded), and report."""

    title: str
    about: str
    images: Sequence[Image.Image | None]
    report: str


def draw_contact_sheet(path: Path, title: str, note: str, tiles: Sequence[Tile]) -> None:
    """Draws studies in rows of four under a title and writes a PNG.

    Args:
        path: The file to write.
        title: Title in large letters.
        note: Small text below the title: the kind of images, and a disclaimer.
        tiles: Studies, at least one.

    Raises:
        RunError: The file cannot be written.
    """
    columns = min(_COLUMNS, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    text = [[_wrapped(tile.report or "(no report)", _font(15), _WIDTH, _LINES) for tile in row] for row in rows]
    line, head = 20, 96
    heights = [_PICTURE + 54 + line * max(map(len, lines)) + _GAP for lines in text]
    width = max(columns * (_WIDTH + _GAP) + _GAP, 720)
    sheet = Image.new("RGB", (width, head + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    (shown,) = _wrapped(title, _font(28, bold=True), width - 2 * _GAP, 1)
    draw.text((_GAP, 18), shown, _INK, _font(28, bold=True))
    (shown,) = _wrapped(note, _font(15), width - 2 * _GAP, 1)
    draw.text((_GAP, 56), shown, _MUTED, _font(15))
    top = head
    for row, lines, height in zip(rows, text, heights, strict=True):
        for column, (tile, report) in enumerate(zip(row, lines, strict=True)):
            left = _GAP + column * (_WIDTH + _GAP)
            _place_images(sheet, tile.images, left, top)
            (name,) = _wrapped(tile.title, _font(14, bold=True), _WIDTH, 1)
            draw.text((left, top + _PICTURE + 8), name, _INK, _font(14, bold=True))
            (about,) = _wrapped(tile.about, _font(13), _WIDTH, 1)
            draw.text((left, top + _PICTURE + 28), about, _MUTED, _font(13))
            ink = _INK if tile.report else _MUTED
            for number, words in enumerate(report):
                draw.text((left, top + _PICTURE + 52 + number * line), words, ink, _font(15))
        top += height
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    atomic_write_bytes(path, stream.getvalue())


def _place_images(sheet: Image.Image, images: Sequence[Image.Image | None], left: int, top: int) -> None:
    """Places the first two images side by side on black, and writes the number of further images."""
    sheet.paste(_DARK, (left, top, left + _WIDTH, top + _PICTURE))
    draw = ImageDraw.Draw(sheet)
    shown = images[:2]
    share = _WIDTH // max(1, len(shown))
    for number, image in enumerate(shown):
        if image is None:
            draw.text((left + number * share + 12, top + 12), "cannot be decoded", "#c8c8c8", _font(14))
            continue
        small = image.convert("L")
        scale = min((share - 2) / small.width, _PICTURE / small.height)
        size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
        small = small.resize(size, Image.Resampling.LANCZOS)
        corner = (left + number * share + (share - size[0]) // 2, top + (_PICTURE - size[1]) // 2)
        sheet.paste(small, corner)
    if more := len(images) - len(shown):
        draw.text((left + _WIDTH - 8, top + _PICTURE - 8), f"+{more}", "#ffffff", _font(15, bold=True), anchor="rs")


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, limit: int) -> list[str]:
    """Wraps text into at most `limit` lines of at most `width` pixels; an ellipsis marks cut text."""
    words = text.split() or [""]
    lines: list[str] = []
    while words and len(lines) < limit:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        line, words = " ".join(words[:count]), words[count:]
        if font.getlength(line) > width:  # a single very long word
            fits = next(n for n in range(len(line) - 1, -1, -1) if n == 0 or font.getlength(line[:n]) <= width)
            line, words = line[: max(1, fits)], [line[max(1, fits) :], *words]
        lines.append(line)
    if words:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # This font comes with matplotlib and has more letters than Pillow's font.
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)
