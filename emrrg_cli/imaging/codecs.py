"""Decoders that run in a process of their own (`decoder_process`), because broken data can crash them.

Each converts the bytes of a file or a codestream to an array. If it cannot read them, it raises an `ImageError` with an
empty `where`, because only the caller knows the file.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emrrg_cli.imaging.base import TRUNCATED, ImageError, short_message, too_many_pixels
from emrrg_cli.imaging.samples import by_type, cmyk_to_rgb, grey_levels, luma

_GREY_KINDS = (0, 1)  # PhotometricInterpretation of TIFF: white is zero, black is zero
_RGB, _PALETTE, _CMYK = 2, 3, 5
_ALPHA = (1, 2)  # ExtraSamples of TIFF


def decode(codec: str, data: bytes, max_pixels: int) -> NDArray[Any]:
    """Decodes `data`.

    Args:
        codec: One of `CODECS`.
        data: A file or a codestream.
        max_pixels: Largest width times height.

    Raises:
        ImageError: truncated image, too many pixels, broken image.
    """
    try:
        return CODECS[codec](data, max_pixels)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("", "broken image", "the decoder needs more memory than such an image should") from None
    except Exception as error:  # decoders raise errors of many types
        raise ImageError("", "broken image", short_message(error)) from None


def _jpeg(data: bytes, max_pixels: int) -> NDArray[Any]:
    """Decodes any JPEG except JPEG-LS, in its own precision: uint8 or uint16, `[h, w]` or `[h, w, samples]`."""
    from imagecodecs import jpeg_decode

    return np.asarray(jpeg_decode(data))


def _jpeg_ls(data: bytes, max_pixels: int) -> NDArray[Any]:
    from imagecodecs import jpegls_decode

    return np.asarray(jpegls_decode(data))


def _jpeg_2000(data: bytes, max_pixels: int) -> NDArray[Any]:
    from imagecodecs import jpeg2k_decode

    return np.asarray(jpeg2k_decode(data))


def _pillow_jpeg_2000(data: bytes, max_pixels: int) -> NDArray[Any]:
    """Decodes a JPEG 2000 file with Pillow, to grey."""
    image = Image.open(io.BytesIO(data), formats=("JPEG2000",))
    image.load()
    if image.mode.startswith("I"):
        return grey_levels(np.asarray(image), 16)
    if image.mode in ("LA", "RGBA"):
        alpha = np.asarray(image.getchannel("A"))
        return grey_levels(np.asarray(image.convert("L")), 8, alpha)
    return np.asarray(image.convert("L"))


def _grey_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    values = _jpeg_ls(data, max_pixels) if _is_jpeg_ls(data) else _jpeg(data, max_pixels)
    return _grey_by_size(values)


def _is_jpeg_ls(data: bytes) -> bool:
    from emrrg_cli.imaging.jpeg import frame_of

    frame = frame_of(data)
    return frame is not None and frame.kind == 0xF7


def _grey_by_size(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.ndim == 3 and values.shape[2] not in (1, 3):
        raise ImageError("", "broken image", f"JPEG of {values.shape[2]} components is not supported")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    bits = 8 if values.dtype.itemsize == 1 else max(9, int(values.max()).bit_length())
    return grey_levels(values, bits)


def _grey_png(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decodes a PNG with transparency or 16 bits per sample."""
    from imagecodecs import png_decode

    values = np.asarray(png_decode(data))
    bits = 8 * values.dtype.itemsize
    if values.ndim == 2:
        return grey_levels(values, bits)
    samples = values.shape[2]
    alpha = values[..., -1] if samples in (2, 4) else None
    return grey_levels(values[..., 0] if samples <= 2 else values[..., :3], bits, alpha)


def _grey_tiff(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decodes the first page of a TIFF that Pillow does not read correctly."""
    from tifffile import TiffFile

    with TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0].aspage()
        if (pixels := page.imagewidth * page.imagelength) > max_pixels:
            raise too_many_pixels("", page.imagewidth, page.imagelength, max_pixels)
        if pixels == 0 or page.imagedepth != 1 or page.samplesperpixel > 8:
            shape = f"{page.imagewidth} x {page.imagelength} x {page.imagedepth}, {page.samplesperpixel} samples"
            raise ImageError("", "broken image", shape)
        if any(at + size > len(data) for at, size in zip(page.dataoffsets, page.databytecounts, strict=False)):
            raise ImageError("", TRUNCATED, "parts of the image are missing at the end of the file")
        kind = f"{page.bitspersample}-bit {_sample_name(page.sampleformat)}"
        try:
            values = page.asarray(maxworkers=1)
        except (ValueError, NotImplementedError, TypeError, KeyError) as error:
            raise ImageError("", "broken image", f"TIFF of {kind} samples: {short_message(error)}") from None
        if values.dtype == bool:  # one bit per sample
            values = values.astype(np.uint8)
        if values.dtype.kind not in "iuf":
            raise ImageError("", "broken image", f"TIFF of {kind} samples is not supported")
        values = values.reshape(_shape(page))
        if page.planarconfig == 2:
            values = np.moveaxis(values, 0, -1)
        alpha = next((values[..., -len(page.extrasamples) + i] for i, extra in enumerate(page.extrasamples)
                      if extra in _ALPHA), None)  # fmt: skip
        return _upright(_tiff_grey(page, values, alpha, kind), page)


def _sample_name(sample_format: int) -> str:
    return {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex"}.get(int(sample_format), "undefined")


def _shape(page: Any) -> tuple[int, int, int]:
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    return (samples, height, width) if page.planarconfig == 2 else (height, width, samples)


def _tiff_grey(page: Any, values: NDArray[Any], alpha: NDArray[Any] | None, kind: str) -> NDArray[np.uint8]:
    photometric, bits, samples = int(page.photometric), int(page.bitspersample), values.shape[-1]
    if photometric in _GREY_KINDS:
        grey = grey_levels(values[..., 0], bits, None if photometric == 0 else alpha)
        return grey if photometric else 255 - grey
    if photometric == _RGB and samples >= 3:
        return grey_levels(values[..., :3], bits, alpha)
    if photometric == _PALETTE and page.colormap is not None and values.dtype.kind == "u":
        table = palette_levels(page.colormap.T)
        return np.asarray(table[np.minimum(values[..., 0], len(table) - 1)])
    if photometric == _CMYK and samples >= 4 and values.dtype.kind in "iu":
        return luma(cmyk_to_rgb(by_type(values[..., :4], bits)))
    raise ImageError("", "broken image", f"TIFF of {kind} samples, photometric interpretation {photometric}, "
                     "is not supported")  # fmt: skip


def palette_levels(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Returns the grey levels of a 16-bit palette `[n, 3]`; without values above 255, it was written in 8 bits."""
    return luma(colours if colours.max(initial=0) <= 255 else colours >> 8)


def _upright(grey: NDArray[np.uint8], page: Any) -> NDArray[np.uint8]:
    orientation = page.tags.valueof(274, 1)
    if not isinstance(orientation, int) or not 2 <= orientation <= 8:
        return grey
    if orientation >= 5:
        grey = grey.T
    flips = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    return np.ascontiguousarray(np.flip(grey, flips))


CODECS: dict[str, Callable[[bytes, int], NDArray[Any]]] = {
    "jpeg": _jpeg,
    "jpeg-ls": _jpeg_ls,
    "jpeg-2000": _jpeg_2000,
    "grey-jpeg": _grey_jpeg,
    "grey-jpeg-2000": _pillow_jpeg_2000,
    "grey-png": _grey_png,
    "grey-tiff": _grey_tiff,
}
