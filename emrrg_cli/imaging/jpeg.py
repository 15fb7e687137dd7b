"""Reads facts from JPEG, JPEG-LS and JPEG 2000 data without decoding, completes truncated JPEGs, and removes the
metadata of JPEGs."""

from __future__ import annotations

import io
import math
import struct
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

END = b"\xff\xd9"  # end of image (JPEG, JPEG-LS), end of codestream (JPEG 2000)

# Start of frame: baseline, extended, progressive, lossless and their arithmetic forms; JPEG-LS.
_FRAMES = (set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xF7}
_SCAN = b"\xff\xda"
_MOST_SCANS = 100  # progressive images have about ten
# Compressed data escape 0xff and contain restart markers; any other marker ends them.
_WITHIN_SCAN = {0x00, *range(0xD0, 0xD8)}
_J2K_SIZE = b"\xff\x4f\xff\x51"

MAX_MENDED = 256 * 2**20
_ROWS_NEEDED = 0.95
_ROWS_NEEDED_REFINED = 0.7


class Frame(NamedTuple):
    """Width, height, samples per pixel and bits per sample according to the compressed data.

    Attributes:
        kind: Marker of the frame: 0xc0 to 0xcf for JPEG, 0xf7 for JPEG-LS, 0x51 for JPEG 2000.
        signed: Whether samples are signed; possible only in JPEG 2000.
    """

    width: int
    height: int
    samples: int
    bits: int
    kind: int
    signed: bool = False


def too_many_scans(stream: IO[bytes]) -> str:
    """Returns a sentence if a JPEG has more scans than encoders write, else "". Keeps the position of the stream.

    A scan of a few bytes takes as much time as the whole image.
    """
    place, last, scans = stream.tell(), b"", 0
    stream.seek(0)
    while block := stream.read(2**20):
        scans += (last + block).count(_SCAN)
        last = block[-1:]
    stream.seek(place)
    return f"{scans:,} scans, limit {_MOST_SCANS}" if scans > _MOST_SCANS else ""


def frame_of(data: bytes) -> Frame | None:
    """Returns the frame that compressed data declare; None if there is none that can be read."""
    try:
        if (at := data.find(_J2K_SIZE, 0, 4096)) >= 0:
            right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
            samples, depth = struct.unpack_from(">HB", data, at + 40)
            return Frame(right - left, bottom - top, samples, (depth & 0x7F) + 1, 0x51, bool(depth & 0x80))
        return _jpeg_frame(data)
    except (struct.error, IndexError):
        return None


def _jpeg_frame(data: bytes) -> Frame | None:
    if not data.startswith(b"\xff\xd8"):
        return None
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _FRAMES:
            bits, height, width, samples = struct.unpack_from(">BHHB", data, at + 4)
            return Frame(width, height, samples, bits, marker)
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def without_metadata(data: bytes) -> bytes | None:
    """Returns a JPEG without data that may identify a person; the compressed pixels are unchanged.

    Removed are EXIF, XMP, IPTC, ICC profiles and all other application segments except JFIF (without its thumbnail) and
    Adobe's (how colours are stored), comments, and all data after the end of the image. The orientation in EXIF is
    removed too, so the image should be upright.

    Args:
        data: The bytes of the file.

    Returns:
        The JPEG; None if the data are not a JPEG that can be parsed from start to end.

    Source: ITU-T T.81, annex B.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    kept, at = [data[:2]], 2
    try:
        while data[at] == 0xFF:
            marker = data[at + 1]
            if marker == 0xFF:  # a fill byte
                at += 1
                continue
            if marker == END[1]:
                return b"".join([*kept, END])
            length = struct.unpack_from(">H", data, at + 2)[0]
            segment = data[at : at + 2 + length]
            if length < 2 or len(segment) < 2 + length:
                return None
            at += len(segment)
            kept.append(_bare(marker, segment))
            if marker == _SCAN[1]:
                start = at
                at = _end_of_scan(data, at)
                if at < 0:
                    return None
                kept.append(data[start:at])
    except (struct.error, IndexError):
        pass
    return None


def _end_of_scan(data: bytes, at: int) -> int:
    """Returns where the marker after a scan begins, else -1; several times as fast as a regular expression."""
    while (at := data.find(b"\xff", at)) >= 0:
        behind = at + 1
        while data[behind] == 0xFF:  # fill bytes
            behind += 1
        if data[behind] not in _WITHIN_SCAN:
            return at
        at = behind + 1
    return -1


def _bare(marker: int, segment: bytes) -> bytes:
    """Returns the part of a segment that is kept: all, some, or b""."""
    if marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) >= 18:
        return segment[:2] + b"\x00\x10" + segment[4:16] + b"\x00\x00"  # a thumbnail without rows and columns
    if marker == 0xEE and segment[4:9] == b"Adobe":
        return segment
    return b"" if marker == 0xFE or 0xE0 <= marker <= 0xEF else segment


def has_end(data: bytes) -> bool:
    """Whether compressed data have their end marker, which cannot occur inside them; padding may follow."""
    return END in data[-64:]


class Mended(NamedTuple):
    """A truncated JPEG with an added end, and the fraction of its rows (0 to 1) that it has."""

    data: bytes
    rows: float

    @property
    def note(self) -> str:
        """A note for people."""
        return f"truncated: {math.floor(100 * self.rows)} percent of its rows exist"


def mend(data: bytes) -> Mended | None:
    """Adds an end to a truncated JPEG if nearly all of it exists.

    The decoder fills missing rows with the last brightness. To find how much is missing, the data are decoded twice,
    with an end and with noise after them: the rows before the cut are equal. 95 percent of the rows are required. If
    only the last refinement of a progressive image was cut, the rows below the cut lack only the last bit of their
    coefficients, and 70 percent are enough.

    Args:
        data: The bytes of the file; its size in pixels has been checked.

    Returns:
        The JPEG; None if more is missing, or for other data.
    """
    if not data.startswith(b"\xff\xd8") or len(data) > MAX_MENDED:
        return None
    data = data.removesuffix(b"\xff")  # half a marker or half an escaped byte
    try:
        scan = data.rindex(_SCAN)
        last_frequency, precision = data[(at := scan + 5 + 2 * data[scan + 4] + 1)], data[at + 1]
    except (ValueError, IndexError):
        return None
    if last_frequency != 63 or precision & 0x0F:  # a later scan with further coefficients or bits is missing
        return None
    noise = np.random.default_rng(0).integers(0, 255, 8192, dtype=np.uint8).tobytes()  # 255 would be a marker
    try:
        ended, noisy = (np.asarray(_decoded(data + tail + END)) for tail in (b"", noise))
    except Exception:  # decoders raise OSError, SyntaxError, struct.error, ...
        return None
    same = (ended == noisy).reshape(len(ended), -1).all(axis=1)
    rows = 1.0 if same.all() else float(np.argmin(same)) / len(same)
    needed = _ROWS_NEEDED_REFINED if precision >> 4 else _ROWS_NEEDED
    return Mended(data + END, rows) if rows >= needed else None


def _decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    image.load()
    return image
