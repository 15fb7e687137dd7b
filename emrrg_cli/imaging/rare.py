"""Reads files that Pillow does not read correctly: rare kinds of TIFF, PNG and JPEG, and JPEG 2000.

They are decoded to grey in a separate process (`decoder_process`).
"""

from __future__ import annotations

from typing import IO

from PIL import Image

from emrrg_cli.imaging.base import NOT_AN_IMAGE, TRUNCATED, ImageError, too_many_pixels
from emrrg_cli.imaging.decoder_process import decode_apart
from emrrg_cli.imaging.jpeg import Frame, frame_of, has_end
from emrrg_cli.imaging.jpeg2000 import whole_codestream

# Bytes per pixel, including tags and profiles: larger files are refused before they are read.
_BYTES_PER_PIXEL, _BYTES_BESIDE = 40, 64 * 2**20

_JPEG_KINDS = {
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG is not supported"),
    0xCB: "lossless JPEG with arithmetic coding is not supported",
}
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_START, _JPEG_START, _CODESTREAM_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\x4f\xff\x51"


def rare_codec(image: Image.Image, head: bytes) -> str | None:
    """Returns the codec for a file whose header Pillow has read; None if Pillow reads it correctly.

    Args:
        image: The opened image.
        head: The first bytes of the file.
    """
    if image.format == "JPEG2000":
        return "grey-jpeg-2000"  # broken data can crash this decoder
    if image.format == "PNG":
        depth, colour = head[24], head[25]
        transparent = "transparency" in image.info
        rare = (depth == 16 and colour in (4, 6)) or (transparent and (colour == 0 or depth == 16))
        return "grey-png" if rare else None
    return "grey-tiff" if image.format == "TIFF" and not _pillow_reads(image) else None


def _pillow_reads(image: Image.Image) -> bool:
    """Whether Pillow reads the right values: in TIFF, unsigned samples of up to 8 bits, and most of 12 and 16."""
    tags = getattr(image, "tag_v2", {})
    bits, formats = tags.get(258, (1,)), tags.get(339, (1,))
    samples, planar, photometric = tags.get(277, 1), tags.get(284, 1), tags.get(262, 1)
    if photometric == 3:
        return bool(max(bits) <= 8 and max(tags.get(320, (0,))) > 255)
    if set(formats) <= {1, 4} and max(bits) <= 8:
        return True
    if samples > 1:
        return bool(set(formats) == {1} and set(bits) == {16} and planar == 1 and photometric == 2 and samples == 3)
    return (bits[0], formats[0]) in {(12, 1), (16, 1)}


def read_unidentified(
    stream: IO[bytes], where: str, size: int, max_pixels: int, error: ImageError
) -> Image.Image | None:
    """Reads an image whose header Pillow refused with `error`; None if nothing else can read it.

    Raises:
        ImageError: It cannot be read.
    """
    stream.seek(0)
    head = stream.read(32)
    if head.startswith(_TIFF_STARTS) and size > 8:
        return read_rare("grey-tiff", stream, where, size, max_pixels)
    if head.startswith(_CODESTREAM_START):
        return read_rare("grey-jpeg-2000", stream, where, size, max_pixels)
    if error.reason != NOT_AN_IMAGE or not head.startswith(_JPEG_START):
        return None
    stream.seek(0)
    frame = frame_of(stream.read(2**20))
    return None if frame is None else _read_jpeg(frame, stream, where, size, max_pixels)


def unread_jpeg(stream: IO[bytes]) -> str | None:
    """Returns why this kind of JPEG is not supported; None if it is, or if the file is damaged."""
    stream.seek(0)
    frame = frame_of(stream.read(2**20))
    return _unread(frame) if frame else None


def _unread(frame: Frame) -> str | None:
    if frame.kind in _JPEG_KINDS:
        return _JPEG_KINDS[frame.kind]
    return None if frame.samples in (1, 3, 4) else f"JPEG of {frame.samples} components is not supported"


def _read_jpeg(frame: Frame, stream: IO[bytes], where: str, size: int, max_pixels: int) -> Image.Image:
    if detail := _unread(frame):
        raise ImageError(where, "broken image", detail)
    if frame.width * frame.height > max_pixels:
        raise too_many_pixels(where, frame.width, frame.height, max_pixels)
    return read_rare("grey-jpeg", stream, where, size, max_pixels)


def read_rare(codec: str, stream: IO[bytes], where: str, size: int, max_pixels: int, pixels: int = 0) -> Image.Image:
    """Decodes a whole file in a separate process.

    Args:
        codec: One of `codecs.CODECS`, with grey levels as its result.
        stream: The file, read from its start.
        where: Name of the file for messages.
        size: Size of the stream in bytes.
        max_pixels: Largest width times height.
        pixels: Width times height, if known.

    Returns:
        An upright image of mode `L`.

    Raises:
        ImageError: It cannot be read.
    """
    if size > (limit := _BYTES_PER_PIXEL * max_pixels + _BYTES_BESIDE):
        raise ImageError(where, "file too large", f"{size:,} bytes, limit {limit:,}")
    stream.seek(0)
    data = stream.read(size)
    if codec == "grey-jpeg" and not has_end(data):
        raise ImageError(where, TRUNCATED, "compressed data end too early")
    try:
        grey = decode_apart(codec, data, where, pixels or _pixels_at_most(size, max_pixels), max_pixels)
    except ImageError as error:
        if codec == "grey-jpeg-2000" and error.reason == "broken image" and whole_codestream(data) is None:
            raise ImageError(where, TRUNCATED, "compressed data end too early") from None
        raise
    return Image.fromarray(grey)


def _pixels_at_most(size: int, max_pixels: int) -> int:
    """Returns an upper bound of the pixels, for limits of time and memory if the header has not been read."""
    return min(max_pixels, 1000 * size)
