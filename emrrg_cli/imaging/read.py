"""Reads image files as 8-bit grey. Imports no torch, because decoding runs in many light processes."""

from __future__ import annotations

import io
from numbers import Real
from pathlib import Path
from typing import IO

from PIL import Image

from emrrg_cli.errors import UsageError, require_path
from emrrg_cli.imaging.base import (
    DICOM_SUFFIXES,
    MAX_PIXELS,
    NOT_AN_IMAGE,
    TRUNCATED,
    ImageError,
    is_dicom,
    open_stream,
    too_many_pixels,
)
from emrrg_cli.imaging.jpeg import MAX_MENDED, mend, too_many_scans
from emrrg_cli.imaging.notes import add_notes
from emrrg_cli.imaging.rare import rare_codec, read_rare, read_unidentified, unread_jpeg
from emrrg_cli.imaging.raster import decode_image, open_header, to_grey
from emrrg_cli.imaging.signatures import refusal


def read_image(source: Path | str | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a radiograph as an 8-bit grey image.

    The rules, in this order:

    - PNG, JPEG, JPEG 2000, TIFF, BMP, WebP, GIF, PGM/PPM and DICOM are read; the content decides, not the name.
      A DICOM file without its preamble is known by its name (`.dcm`, `.dicom`, `.ima`).
    - If width times height in the header is above `max_pixels`, the image is refused before decoding.
    - DICOM has its own rules (`read_dicom`, `dicom.grey`): MONOCHROME1 is inverted, windows are applied, several
      frames are refused.
    - Of other files with several frames or pages, the first is read.
    - A JPEG without its last bytes is read if it has 95 percent of its rows (see `mend`); the other rows get the last
      brightness before the cut.
    - The EXIF orientation is applied.
    - More than 8 bits of grey (integer or float) are stretched linearly: the smallest finite value becomes 0, the
      largest 255. Files do not say how many of their 16 bits the detector used, and with the range of the type, a
      12-bit film would be almost black. A constant image becomes 0. (16-bit colour is read by its high bytes.)
    - Palettes are converted to colours; transparent pixels become black, like air.
    - Colour, CMYK included, becomes luma (ITU-R 601: 0.299 R + 0.587 G + 0.114 B).
    - 1-bit images become 0 and 255.

    Args:
        source: A file, its bytes, or an image already opened.
        max_pixels: Largest width times height that is decoded.

    Returns:
        A new image of mode `L`, `[h, w]`, 0 black to 255 white. `image_notes` returns the notes about it.

    Raises:
        UsageError: `source` is none of these, or `max_pixels` is not a number above 0.
        ImageError: Its reason is one of: missing image, image path is a folder, not a regular file, no permission to
            read, cannot be opened, empty file, not an image, image format not supported, too many pixels, truncated
            image, broken image; for DICOM also file too large, no pixel data, multi-frame DICOM, DICOM compression not
            supported.
    """
    if not isinstance(max_pixels, Real) or not max_pixels > 0:
        raise UsageError(
            f"max_pixels must be a number above 0, not {max_pixels!r}", hint="Leave it out for the default."
        )
    return to_grey(load_image(source, max_pixels))


def load_image(
    source: Path | str | bytes | Image.Image, max_pixels: int = MAX_PIXELS, enough: int | None = None
) -> Image.Image:
    """The first half of `read_image`: returns the first frame, decoded, in the mode and orientation of the file.

    Args:
        source: As `read_image`.
        max_pixels: As `read_image`.
        enough: Pixels that the shorter side needs; a larger JPEG is decoded faster, as grey at the smallest of 1/2, 1/4
            and 1/8 of its size that has enough. None: the whole size.

    Raises:
        ImageError: As `read_image`.
    """
    if isinstance(source, Image.Image):
        return decode_image(source, "<image>", max_pixels, enough)
    if isinstance(source, bytes):
        return _load(io.BytesIO(source), "<bytes>", len(source), max_pixels, enough)
    where = str(source)
    with open_stream(require_path(source, "an image that is neither bytes nor a PIL image"), where) as (stream, size):
        return _load(stream, where, size, max_pixels, enough, named_dicom=where.lower().endswith(DICOM_SUFFIXES))


def _load(
    stream: IO[bytes], where: str, size: int, max_pixels: int, enough: int | None = None, *, named_dicom: bool = False
) -> Image.Image:
    """Chooses the reader by the first bytes, and by the name only if they do not decide."""
    if size == 0:
        raise ImageError(where, "empty file", "0 bytes")
    if is_dicom(stream):
        return _load_dicom(stream, where, size, max_pixels)
    head = stream.read(32)
    stream.seek(0)
    try:
        image = open_header(stream, where)
    except ImageError as error:
        if named_dicom and error.reason == NOT_AN_IMAGE:
            stream.seek(0)
            return _load_dicom(stream, where, size, max_pixels)
        if (rare := read_unidentified(stream, where, size, max_pixels, error)) is not None:
            return rare
        raise refusal(error, head, size) from None
    if image.format in ("JPEG", "MPO") and (scans := too_many_scans(stream)):
        raise ImageError(where, "broken image", scans)
    if codec := rare_codec(image, head):
        if (pixels := image.width * image.height) > max_pixels:
            raise too_many_pixels(where, image.width, image.height, max_pixels)
        return read_rare(codec, stream, where, size, max_pixels, pixels)
    try:
        return decode_image(image, where, max_pixels, enough)
    except ImageError as error:
        if image.format == "JPEG" and (detail := unread_jpeg(stream)):
            raise ImageError(where, error.reason, detail) from None
        if image.format != "JPEG" or error.reason != TRUNCATED:
            raise
        stream.seek(0)
        if (mended := mend(stream.read(MAX_MENDED + 1))) is None:
            raise
        # A copy has no format, so that its file is not kept unchanged.
        image = decode_image(open_header(io.BytesIO(mended.data), where), where, max_pixels, enough).copy()
        add_notes(image, mended.note)
        return image


def _load_dicom(stream: IO[bytes], where: str, size: int, max_pixels: int) -> Image.Image:
    # Imported on demand: the workers of a training read only JPEG and PNG.
    from emrrg_cli.imaging.dicom.read import read_dicom

    return read_dicom(stream, where, size, max_pixels)
