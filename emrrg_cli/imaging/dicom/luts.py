"""Look-up tables and palettes of DICOM: reads their entries in any VR and byte order.

Sources: PS3.3 C.11.1.1 (modality LUT), C.11.2.1.1 (VOI LUT), C.7.6.3.1.5 and C.7.6.3.1.6 (palettes); PS3.5 7.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from emrrg_cli.imaging.dicom.file import first_value
from emrrg_cli.imaging.samples import luma

Levels = NDArray[np.float64]

_LEVELS = 65_536
_COLOURS = ("Red", "Green", "Blue")


@dataclass(frozen=True)
class Lut:
    """A look-up table: values below and above it take its first and last entry."""

    first: int
    entries: Levels
    white: float

    def apply(self, values: Levels) -> Levels:
        """Returns the entry of each value."""
        index = np.clip(np.floor(values - self.first), 0, len(self.entries) - 1).astype(np.int64)
        return self.entries[index]


def first_lut(header: Dataset, keyword: str, *, signed: bool) -> Lut | None:
    """Returns the first item of a LUT sequence; None if there is none that can be read.

    Args:
        header: Header of the file.
        keyword: Keyword of the sequence.
        signed: Whether its input may be negative. The first value of the descriptor then is signed, whatever its VR;
            the numbers of entries and of bits and the entries are unsigned.
    """
    item = first_value(header, keyword)
    if not isinstance(item, Dataset):
        return None
    big_endian = header.original_encoding[1] is False
    try:
        length, first, bits = _descriptor(item["LUTDescriptor"].value, big_endian)
        entries = _entries(item["LUTData"].value, length, big_endian)
    except Exception:  # absent, of another length, not numbers
        return None
    if not len(entries):
        return None
    # The bits of the descriptor are often those of the type, and the entries are much smaller.
    white = float(2**bits - 1) if 1 <= bits <= 16 else 65_535.0
    if entries.max() > white or entries.max() < white / 2:
        white = float(max(entries.max(), 1.0))
    return Lut(_with_sign(first, signed), entries.astype(np.float64), white)


def _descriptor(value: Any, big_endian: bool) -> tuple[int, int, int]:
    """Returns the number of entries, the first value and the bits, all as unsigned words."""
    length, first, bits = _words(value, big_endian)[:3].tolist()
    return length or _LEVELS, first, bits


def _with_sign(word: int, signed: bool) -> int:
    return word - _LEVELS if signed and word >= _LEVELS // 2 else word


def _words(value: Any, big_endian: bool) -> NDArray[np.int64]:
    """Returns words as unsigned numbers, whether their VR is bytes, unsigned or signed."""
    if isinstance(value, bytes):
        even = value[: len(value) // 2 * 2]
        return np.frombuffer(even, ">u2" if big_endian else "<u2").astype(np.int64)
    return np.atleast_1d(np.asarray(value, np.int64)) & 0xFFFF


def _entries(value: Any, length: int, big_endian: bool) -> NDArray[np.int64]:
    """Returns the first `length` entries; short data have two entries in a word."""
    words = _words(value, big_endian)
    if len(words) >= length or not isinstance(value, bytes):
        return words[:length]
    # The first of two is in the low byte of a word, in either byte order.
    return np.frombuffer(words.astype("<u2").tobytes() + value[len(words) * 2 :], np.uint8)[:length].astype(np.int64)


def palette_levels(header: Dataset, values: NDArray[Any]) -> NDArray[np.uint8]:
    """Returns the grey level of each value of a PALETTE COLOR image.

    Entries have 8 bits if the descriptor says so, or if no entry of the three colours exceeds 255. Some programs write
    them as words, with the value in the low byte, the high byte or both.

    Raises:
        Exception: The palette is missing or incomplete.
    """
    big_endian = header.original_encoding[1] is False
    tables: list[NDArray[np.int64]] = []
    bits = first = 0
    for colour in _COLOURS:
        length, first, bits = _descriptor(header[f"{colour}PaletteColorLookupTableDescriptor"].value, big_endian)
        keyword = f"{colour}PaletteColorLookupTableData"
        if keyword in header:
            tables.append(_entries(header[keyword].value, length, big_endian))
        else:
            tables.append(_expanded(header, colour, length, bits, big_endian))
    highest = [int(table.max(initial=0)) for table in tables]
    if bits > 8:  # a dark colour of a palette of 16 bits may have no high value
        highest = [max(highest)] * len(highest)
    tables = [table if top <= 255 else table >> 8 for table, top in zip(tables, highest, strict=True)]
    shortest = min(map(len, tables))
    levels = luma(np.stack([table[:shortest] for table in tables], axis=-1))
    first = _with_sign(first, values.dtype.kind == "i")
    return levels[np.clip(values.astype(np.int64) - first, 0, shortest - 1)]


def _expanded(header: Dataset, colour: str, length: int, bits: int, big_endian: bool) -> NDArray[np.int64]:
    """Returns the entries of a segmented palette from pydicom, which expects little-endian data of one colour."""
    item = Dataset()
    words = _words(header[f"Segmented{colour}PaletteColorLookupTableData"].value, big_endian)
    item.RedPaletteColorLookupTableDescriptor = [length % _LEVELS, 0, 8 if bits <= 8 else 16]
    for other in _COLOURS:
        setattr(item, f"Segmented{other}PaletteColorLookupTableData", words.astype("<u2").tobytes())
    item.set_original_encoding(False, True)
    table = apply_color_lut(np.arange(length).reshape(1, -1), item)
    return np.asarray(table[0, :, 0], np.int64)
