"""Files that Pillow does not read, or not rightly: TIFF, PNG and JPEG of rarer kinds, and JPEG 2000.

They are decoded in a process of their own (`decoder_process`), to grey at once.
"""

from __future__ import annotations

from typing import IO

from PIL import Image

from emrrg_cli.imaging.base import NOT_AN_IMAGE, TRUNCATED, ImageError, too_many_pixels
from emrrg_cli.imaging.decoder_process import decode_apart
from emrrg_cli.imaging.jpeg import Frame, frame_of, has_end
from emrrg_cli.imaging.jpeg2000 import whole_codestream

# Bytes a pixel, with room for tags and profiles: larger files are refused before they are read.
_BYTES_PER_PIXEL, _BYTES_BESIDE = 40, 64 * 2**20

_JPEG_KINDS = {
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG is not read"),
    0xCB: "lossless JPEG with arithmetic coding is not read",
}
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_START, _JPEG_START, _CODESTREAM_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\x4f\xff\x51"


def rare_codec(image: Image.Image, head: bytes) -> str | None:
    """The codec for a file whose header Pillow read, None where Pillow reads it rightly.

    Args:
        image: As it was opened.
        head: The first bytes of the file.
    """
    if image.format == "JPEG2000":
        return "grey-jpeg-2000"  # a decoder that broken data can crash
    if image.format == "PNG":
        depth, colour = head[24], head[25]
        transparent = "transparency" in image.info
        rare = (depth == 16 and colour in (4, 6)) or (transparent and (colour == 0 or depth == 16))
        return "grey-png" if rare else None
    return "grey-tiff" if image.format == "TIFF" and not _pillow_reads(image) else None


def _pillow_reads(image: Image.Image) -> bool:
    """Whether Pillow gives the right values: of TIFF, unsigned samples of up to 8 bits, and most of 12 and 16."""
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
    """An image whose header Pillow refused with `error`; None where that is all there is to say.

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
    """What kind of JPEG nobody reads this is; None: one that is read, or is damaged."""
    stream.seek(0)
    frame = frame_of(stream.read(2**20))
    return _unread(frame) if frame else None


def _unread(frame: Frame) -> str | None:
    if frame.kind in _JPEG_KINDS:
        return _JPEG_KINDS[frame.kind]
    return None if frame.samples in (1, 3, 4) else f"JPEG of {frame.samples} components is not read"


def _read_jpeg(frame: Frame, stream: IO[bytes], where: str, size: int, max_pixels: int) -> Image.Image:
    if detail := _unread(frame):
        raise ImageError(where, "broken image", detail)
    if frame.width * frame.height > max_pixels:
        raise too_many_pixels(where, frame.width, frame.height, max_pixels)
    return read_rare("grey-jpeg", stream, where, size, max_pixels)


def read_rare(codec: str, stream: IO[bytes], where: str, size: int, max_pixels: int, pixels: int = 0) -> Image.Image:
    """A whole file, decoded in a process of its own.

    Args:
        codec: One of `codecs.CODECS` that give grey levels.
        stream: Read from its start.
        where: For messages.
        size: Of the stream, in bytes.
        max_pixels: Largest width times height.
        pixels: Width times height, where that is known.

    Returns:
        Mode `L`, upright.

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
    """A bound for limits of time and memory where the header has not been read."""
    return min(max_pixels, 1000 * size)
