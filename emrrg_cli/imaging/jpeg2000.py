"""Checks whether JPEG 2000 codestreams are complete, and removes data between their last tile-part and their end.

Source: ITU-T T.800, annex A.
"""

from __future__ import annotations

import struct
from collections import Counter

from emrrg_cli.imaging.jpeg import END, has_end

_START = b"\xff\x4f\xff\x51"  # start of codestream, image and tile size
_TILE_PART = b"\xff\x90"


def whole_codestream(data: bytes) -> bytes | None:
    """Returns the codestream in `data`, ready for a decoder.

    The length of each tile-part gives the start of the next. Data between the last one and the end of the codestream
    are not part of the image and are removed: some vendors write comments there, which decoders reject. A missing end
    marker after the last tile-part is added.

    Args:
        data: A codestream, or a JP2 file; padding may follow.

    Returns:
        The codestream; None if a part of the image is missing.
    """
    start = max(data.find(_START, 0, 4096), 0)
    try:
        end = _end_of_tiles(data, start)
    except (struct.error, ZeroDivisionError):
        end = None
    if end is not None:
        return data[start:end] + END
    # The lengths are wrong, but the end marker shows that nothing was cut off.
    return data[start:] if has_end(data) else None


def _end_of_tiles(data: bytes, start: int) -> int | None:
    """Returns where the last tile-part ends; None if this is unknown or a tile-part is missing."""
    at = start + 2
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", data, at + 6)
    tiles = -(-(right - left) // width) * -(-(bottom - top) // height)
    while data[at : at + 2] != _TILE_PART:
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    seen: Counter[int] = Counter()
    stated: dict[int, int] = {}
    while data[at : at + 2] == _TILE_PART:
        tile, length, _, parts = struct.unpack_from(">HIBB", data, at + 4)
        if length == 0:  # the last one, up to the end marker
            end = data.rfind(END, at)
            return end if end >= 0 else None
        if length < 14 or at + length > len(data):
            return None
        seen[tile] += 1
        stated[tile] = max(parts, stated.get(tile, 0))
        at += length
    whole = len(seen) == tiles and all(stated[tile] in (0, count) for tile, count in seen.items())
    return at if whole else None
