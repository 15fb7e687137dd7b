"""Image files to 8-bit grey, and back to bytes. Imports no torch: decoding runs in many light processes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from emrrg_cli.data.image_notes import add_notes
from emrrg_cli.data.jpeg import MAX_MENDED, mend
from emrrg_cli.errors import RunError

MAX_PIXELS = 100_000_000
ImageFormat = Literal["jpeg", "png"]
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")

NOT_AN_IMAGE = "not an image"
TRUNCATED = "truncated image"

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

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF
_COMPLAINT = re.compile(r"[A-Za-z]\w*(\.\w+)?: \S")  # of libtiff; a progress bar may draw meanwhile
_stderr_lock = threading.Lock()
# Held while Pillow's global size limit is lifted to read a header; `max_pixels` takes its place.
_header_lock = threading.Lock()


class ImageError(RunError):
    """An image that cannot be read.

    Attributes:
        where: The path as it was given, or `<bytes>` or `<image>`.
        reason: One of a few fixed phrases, fit for counting.
        detail: What is particular to this file; may be empty.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        self.where, self.reason, self.detail = where, reason, detail
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str, str]]:
        # Raised in worker processes: an exception's default pickling would call `__init__` with the message alone.
        return type(self), (self.where, self.reason, self.detail)


def read_image(source: Path | str | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a radiograph as an 8-bit grey image.

    The rules, in this order:

    - PNG, JPEG, JPEG 2000, TIFF, BMP, WebP, GIF, PGM/PPM and DICOM are read, by content, whatever the file is called.
      A DICOM file without its preamble is known by its name (`.dcm`, `.dicom`, `.ima`).
    - Width times height above `max_pixels` is refused from the header, before a pixel is decoded.
    - DICOM has rules of its own: `read_dicom` and `dicom_grey`. MONOCHROME1 is inverted, windows are applied, several
      frames are refused.
    - Of any other file with several frames or pages the first is read.
    - A JPEG that lacks its last bytes is read if 95 percent of its rows are there (`mend` says how that is known); the
      others have the last brightness before the cut.
    - The EXIF orientation is applied.
    - More than 8 bits of grey (integer or float) are stretched linearly: the smallest finite value becomes 0, the
      largest 255. Files do not say how many of their 16 bits the detector used, so the range of the type would turn a
      12-bit film almost black. A constant image becomes 0. (Colour with 16 bits a channel is read by its high bytes.)
    - Palette and transparent colours are resolved; what is transparent shows black, as air does.
    - Colour, CMYK included, becomes luma (ITU-R 601: 0.299 R + 0.587 G + 0.114 B).
    - 1-bit images become 0 and 255.

    Args:
        source: A file, its bytes, or an image already opened.
        max_pixels: Largest width times height that is decoded.

    Returns:
        A new image of mode `L`, `[h, w]`, 0 black to 255 white. What should be said about it is in `image_notes`.

    Raises:
        ImageError: With a short reason: missing image, image path is a folder, not a regular file, no permission to
            read, cannot be opened, empty file, not an image, too many pixels, truncated image, broken image; of DICOM
            also file too large, no pixel data, multi-frame DICOM, DICOM compression not supported.
    """
    return to_grey(load_image(source, max_pixels))


def load_image(
    source: Path | str | bytes | Image.Image, max_pixels: int = MAX_PIXELS, enough: int | None = None
) -> Image.Image:
    """The first half of `read_image`: the first frame, decoded, in the file's own mode and orientation.

    Args:
        source: As `read_image`.
        max_pixels: As `read_image`.
        enough: Pixels that the shorter side needs; a JPEG of more is decoded as grey and at the smallest of 1/2, 1/4
            and 1/8 of its size that has them, which costs less than to decode it whole. None: the whole size.

    Raises:
        ImageError: As `read_image`.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "<image>", max_pixels, enough)
    if isinstance(source, bytes):
        return _load(io.BytesIO(source), "<bytes>", len(source), max_pixels, enough)
    where = str(source)
    with open_stream(Path(source), where) as (stream, size):
        return _load(stream, where, size, max_pixels, enough, named_dicom=where.lower().endswith(DICOM_SUFFIXES))


def to_grey(image: Image.Image) -> Image.Image:
    """The second half of `read_image`: upright, mode `L`. The argument is left as it is."""
    turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    mode = upright.mode
    if mode == "L" and "transparency" not in upright.info:
        return upright.convert("L")  # a copy
    if mode.startswith("I") or mode == "F":
        grey = _stretch(upright)
        # Pillow goes by the tag at 8 bits alone.
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
    """The model's input: bicubic to a square without keeping the aspect ratio (SPEC 3).

    Args:
        image: Mode `L`, any size.
        size: Side in pixels.

    Returns:
        uint8 `[size, size]`.
    """
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)


def fit_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Reduction until the shorter side is `size` pixels, keeping the aspect ratio.

    Means of whole pixels down to at least 1.5 times the size, then a Hamming filter: on films it differs from a bicubic
    reduction by half a grey level (51 dB and more), less than a JPEG of quality 95 does, in a third of the time.
    A smaller image is returned as it is: enlarging adds bytes, not detail.
    """
    shorter = min(image.size)
    if shorter <= size:
        return image
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.HAMMING, reducing_gap=1.5)


def encode(image: Image.Image, format: ImageFormat, quality: int = 95) -> bytes:
    """A grey image as the bytes of a file, without metadata.

    Args:
        image: Mode `L`.
        format: `jpeg` (baseline) or `png`.
        quality: Of JPEG, 1 to 100.

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


@contextlib.contextmanager
def open_stream(path: Path, where: str) -> Iterator[tuple[IO[bytes], int]]:
    """A regular file, open, and its size in bytes.

    Raises:
        ImageError: missing image, image path is a folder, not a regular file, no permission to read, cannot be opened.
    """
    try:
        # Looked at first: opening a pipe would wait for ever.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            readable = os.access(path, os.R_OK | os.X_OK)
            raise ImageError(where, "image path is a folder" if readable else "no permission to read")
        if not stat.S_ISREG(mode):
            raise ImageError(where, "not a regular file")
        stream = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(where, "missing image") from None
    except PermissionError:
        raise ImageError(where, "no permission to read") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(where, "cannot be opened", getattr(error, "strerror", None) or str(error)) from None
    with stream:
        try:
            yield stream, os.fstat(stream.fileno()).st_size
        except OSError as error:  # a network share that comes and goes
            raise ImageError(where, "cannot be opened", error.strerror or str(error)) from None


def _load(
    stream: IO[bytes], where: str, size: int, max_pixels: int, enough: int | None = None, *, named_dicom: bool = False
) -> Image.Image:
    """Chooses the reader by the first bytes; a name counts only where they say nothing."""
    if size == 0:
        raise ImageError(where, "empty file", "0 bytes")
    if is_dicom(stream):
        return _load_dicom(stream, where, size, max_pixels)
    try:
        image = _open_header(stream, where)
    except ImageError as error:
        if not named_dicom or error.reason != NOT_AN_IMAGE:
            raise
        stream.seek(0)
        return _load_dicom(stream, where, size, max_pixels)
    try:
        return _decode(image, where, max_pixels, enough)
    except ImageError as error:
        if image.format != "JPEG" or error.reason != TRUNCATED:
            raise
        stream.seek(0)
        if (mended := mend(stream.read(MAX_MENDED + 1))) is None:
            raise
        # A copy has no format: its file must not be taken for one that can be kept as it is.
        image = _decode(_open_header(io.BytesIO(mended.data), where), where, max_pixels, enough).copy()
        add_notes(image, mended.note)
        return image


def is_dicom(stream: IO[bytes]) -> bool:
    """Whether a stream begins with DICOM's preamble. It is left at its start."""
    head = stream.read(132)
    stream.seek(0)
    return head[128:] == b"DICM"


def _load_dicom(stream: IO[bytes], where: str, size: int, max_pixels: int) -> Image.Image:
    # Imported where it is needed: the workers of a training read nothing but JPEG and PNG.
    from emrrg_cli.data.dicom import read_dicom

    return read_dicom(stream, where, size, max_pixels)


def _open_header(stream: IO[bytes], where: str) -> Image.Image:
    """Reads the header alone."""
    with _header_lock:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=_FORMATS)
        except UnidentifiedImageError:
            raise ImageError(where, NOT_AN_IMAGE) from None
        except Exception as error:  # a broken header raises whatever its plug-in met
            raise ImageError(where, "broken image", _short(error)) from None
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


@contextlib.contextmanager
def caught_stderr() -> Iterator[list[str]]:
    """Keeps what C libraries print about broken data from the terminal; at the end of the block it is in the list."""
    said: list[str] = []
    with _stderr_lock:
        try:
            saved = os.dup(2)
        except OSError:  # no stderr at all
            yield said
            return
        with _scratch_file() as caught:
            try:
                os.dup2(caught.fileno(), 2)
                yield said
            finally:
                os.dup2(saved, 2)
                os.close(saved)
                caught.seek(0)
                said += caught.read(10_000).decode("utf-8", "replace").splitlines()


def _scratch_file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError:  # a full disk is no reason not to read an image
        return Path(os.devnull).open("w+b")


def _decode(image: Image.Image, where: str, max_pixels: int, enough: int | None = None) -> Image.Image:
    if (pixels := image.width * image.height) > max_pixels:
        raise ImageError(
            where, "too many pixels", f"{image.width:,} x {image.height:,} = {pixels:,}, limit {max_pixels:,}"
        )
    if pixels == 0:
        raise ImageError(where, "broken image", f"{image.width} x {image.height} pixels")
    try:
        reduced = enough is not None and image.format == "JPEG" and min(image.size) > enough
        if enough is not None and reduced:
            image.draft("L", (enough, enough))
        if image.format == "TIFF":
            with caught_stderr() as said:
                image.load()
            if any(_COMPLAINT.match(line) and "warning" not in line.lower() for line in said):  # after which it goes on
                add_notes(image, "damaged: part of it may be missing")
        else:
            image.load()
        if reduced:
            image.format = None  # or its file could be taken for one that can be kept as it is
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        detail = _short(error)
        reason = TRUNCATED if "truncated" in detail.lower() else "broken image"
        raise ImageError(where, reason, detail) from None
    return image


def _short(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:200] or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _stretch(image: Image.Image) -> Image.Image:
    """Linear from [min, max] to [0, 255], in float64, rounded to nearest."""
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    values = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    span = high - low
    scaled = (values - low) / span * 255 if span > 0 else np.zeros_like(values)
    return Image.fromarray(np.floor(scaled + 0.5).astype(np.uint8))
