"""Reads PNG, JPEG, TIFF and the other formats that Pillow decodes as 8-bit grey, and writes JPEG and PNG."""

from __future__ import annotations

import io
import re
import threading
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from emrrg_cli.imaging.base import (
    NOT_AN_IMAGE,
    ImageError,
    caught_stderr,
    decoding_error,
    too_many_pixels,
)
from emrrg_cli.imaging.notes import add_notes
from emrrg_cli.imaging.samples import stretch
from emrrg_cli.vocabulary import ImageFormat

# An allow-list: Pillow also opens formats that run programs (EPS calls Ghostscript) or that hold no radiographs.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "JPEG2000")


_ORIENTATION = 0x0112


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_JPEG_MAX_SIDE = 65_500  # libjpeg's own limit


_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # tag and value of TIFF


_COMPLAINT = re.compile(r"[A-Za-z]\w*(\.\w+)?: \S")  # a message of libtiff; a progress bar may write to stderr too


# Held while Pillow's global size limit is off to read a header; `max_pixels` is the limit instead.
_header_lock = threading.Lock()


def to_grey(image: Image.Image) -> Image.Image:
    """The second half of `read_image`: returns an upright image of mode `L`. The argument is unchanged."""
    turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    mode = upright.mode
    if mode == "L" and "transparency" not in upright.info:
        return upright.convert("L")  # a copy
    if mode.startswith("I") or mode == "F":
        grey = Image.fromarray(stretch(np.asarray(upright)))
        # Pillow uses the tag only for 8 bits.
        white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        return ImageOps.invert(grey) if white_is_zero else grey
    if mode == "LAB":
        return upright.getchannel("L")
    if mode in {"RGBa", "La", "PA"}:
        upright = upright.convert("LA" if mode == "La" else "RGBA")
    elif "transparency" in upright.info and mode in {"1", "L", "P", "RGB"}:
        upright = upright.convert("RGBA")
    if upright.mode in {"LA", "RGBA"}:
        grey = upright.convert("L")
        return Image.composite(grey, Image.new("L", grey.size, 0), upright.getchannel("A"))
    if upright.mode in {"1", "L", "RGB"}:
        return upright.convert("L")
    return upright.convert("RGB").convert("L")  # P, CMYK, YCbCr, HSV


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether a loaded image came from an upright, grey, baseline JPEG, which needs no second compression."""
    return (
        image.format == "JPEG" and image.mode == "L" and not image.info.get("progressive") and _orientation(image) == 1
    )


def resize_square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Returns the input of the model: resized bicubically to a square, without keeping the aspect ratio.

    Args:
        image: Mode `L`, any size.
        size: Side in pixels.

    Returns:
        uint8 `[size, size]`.
    """
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)


def fit_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Reduces an image until its shorter side has `size` pixels, keeping the aspect ratio.

    Means of whole pixels down to at least 1.5 times the size, then a Hamming filter: on films it differs from a bicubic
    reduction by half a grey level (51 dB and more), less than a JPEG of quality 95 does, in a third of the time.
    A smaller image is returned unchanged: enlarging adds bytes, not detail.
    """
    shorter = min(image.size)
    if shorter <= size:
        return image
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.HAMMING, reducing_gap=1.5)


def encode(image: Image.Image, format: ImageFormat, quality: int = 95) -> bytes:
    """Encodes a grey image as a file without metadata.

    Args:
        image: Mode `L`.
        format: `jpeg` (baseline) or `png`.
        quality: JPEG quality, 1 to 100.

    Raises:
        ImageError: A side is too long for JPEG.
    """
    if format == "jpeg" and max(image.size) > _JPEG_MAX_SIDE:
        raise ImageError("<image>", "too long for JPEG", f"{image.width} x {image.height}")
    buffer = io.BytesIO()
    if format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, comment=None)
    else:
        image.save(buffer, "PNG", icc_profile=None)
    return buffer.getvalue()


def open_header(stream: IO[bytes], where: str) -> Image.Image:
    """Reads only the header."""
    with _header_lock:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=_FORMATS)
        except UnidentifiedImageError:
            raise ImageError(where, NOT_AN_IMAGE) from None
        except Exception as error:  # a broken header raises errors of many types
            raise decoding_error(where, error) from None
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


def decode_image(image: Image.Image, where: str, max_pixels: int, enough: int | None = None) -> Image.Image:
    if (pixels := image.width * image.height) > max_pixels:
        raise too_many_pixels(where, image.width, image.height, max_pixels)
    if pixels == 0:
        raise ImageError(where, "broken image", f"{image.width} x {image.height} pixels")
    try:
        reduced = enough is not None and image.format == "JPEG" and min(image.size) > enough
        if enough is not None and reduced:
            image.draft("L", (enough, enough))
        if image.format == "TIFF":
            with caught_stderr() as messages:
                image.load()
            if any(
                _COMPLAINT.match(line) and "warning" not in line.lower() for line in messages
            ):  # libtiff continues after an error
                add_notes(image, "damaged: part of it may be missing")
        else:
            image.load()
        if reduced:
            image.format = None  # otherwise its file could be kept unchanged
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise decoding_error(where, error) from None
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels may be fine if EXIF is unreadable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
