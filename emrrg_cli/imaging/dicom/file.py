"""A DICOM file as a file: its header, read without its pixels, and the bytes of its pixels, as they are stored.

Everything here is bounded by the size of the file, whatever lengths it claims.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO, Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from emrrg_cli.imaging.base import NOT_AN_IMAGE, ImageError, is_dicom

UNSUPPORTED = "DICOM compression not supported"
NO_PIXELS = "no pixel data"

_COLOURS = ("Red", "Green", "Blue")
_WANTED = [
    *("SOPClassUID", "Modality", "BodyPartExamined", "ViewPosition", "PatientOrientation", "PatientID"),
    *("StudyInstanceUID", "BurnedInAnnotation", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope"),
    *("RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in _COLOURS),
    *(f"{colour}PaletteColorLookupTableData" for colour in _COLOURS),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in _COLOURS),
]

_LONG_FORM = (b"OB", b"OW", b"OF", b"OD", b"OV", b"UN")
_UNDEFINED = 0xFFFFFFFF
_ITEM, _DELIMITER = 0xFFFEE000, 0xFFFEE0DD


@dataclass(frozen=True)
class DicomFile:
    """A header and where the pixels stand.

    Attributes:
        header: The elements that this package looks at.
        syntax: Transfer syntax; None where the file does not say.
        implicit, little_endian: The encoding that the header was read by.
        pixels_at: Offset of the pixel data's value; None where there is none.
        length: Of that value, as claimed; None: undefined, the pixels are compressed.
        vr: Its value representation.
    """

    header: Dataset
    syntax: UID | None
    implicit: bool
    little_endian: bool
    pixels_at: int | None = None
    length: int | None = None
    vr: str = "OW"


class BoundedReader:
    """A stream that never allocates more than the file holds: `read(2**32 - 2)` of a small file is a small read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size = stream, size

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._stream.tell())
        return self._stream.read(left if count is None or count < 0 else min(count, left))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        """The stream belongs to the caller."""


def read_header(stream: IO[bytes], where: str, size: int) -> DicomFile:
    """Reads the header, up to the pixels. A file without preamble is given the benefit of the doubt.

    Raises:
        ImageError: not an image, broken image, DICOM compression not supported.
    """
    # The whole data set would be inflated at once, to any size; radiographs are not stored so. The transfer syntax
    # stands in the first group, within a few hundred bytes.
    if DeflatedExplicitVRLittleEndian.encode() in stream.read(65_536):
        raise ImageError(where, UNSUPPORTED, "Deflated Explicit VR Little Endian")
    stream.seek(0)
    has_preamble = is_dicom(stream)
    reader = BoundedReader(stream, size)
    try:
        header = pydicom.dcmread(reader, stop_before_pixels=True, force=True, specific_tags=list(_WANTED))
    except Exception as error:  # a broken file raises whatever its parser met, RecursionError included
        if not has_preamble:
            raise ImageError(where, NOT_AN_IMAGE, "no DICOM in spite of its name") from None
        raise ImageError(where, "broken image", first_line(error)) from None
    if not has_preamble and not any(keyword in header for keyword in _WANTED):
        raise ImageError(where, NOT_AN_IMAGE, "no DICOM in spite of its name")
    syntax = text(getattr(header, "file_meta", Dataset()), "TransferSyntaxUID")
    implicit, little = header.original_encoding
    little_endian = syntax != ExplicitVRBigEndian if syntax else little is not False
    file = DicomFile(header, UID(syntax) if syntax else None, bool(implicit), little_endian)
    if reader.tell() > size:
        raise ImageError(where, "truncated image", "the file ends within its header")
    return _find_pixels(reader, file)


def _find_pixels(reader: BoundedReader, file: DicomFile) -> DicomFile:
    """Reads the pixel data's own element header, at which pydicom stopped."""
    order = "<" if file.little_endian else ">"
    start = reader.tell()
    head = reader.read(12)
    if len(head) < 8 or struct.unpack_from(order + "2H", head) != (0x7FE0, 0x0010):
        return file
    # By the bytes, since there are files that change over to implicit representations on the way.
    if head[4:6] in _LONG_FORM and len(head) == 12:
        length, at, vr = struct.unpack_from(order + "I", head, 8)[0], start + 12, head[4:6].decode()
    else:
        length, at, vr = struct.unpack_from(order + "I", head, 4)[0], start + 8, "OW"
    undefined = length == _UNDEFINED
    return DicomFile(file.header, file.syntax, file.implicit, file.little_endian, at, None if undefined else length, vr)


def read_native(stream: IO[bytes], size: int, file: DicomFile, expected: int) -> bytes:
    """The first `expected` bytes of uncompressed pixels, or as many as there are."""
    stream.seek(file.pixels_at or 0)
    claimed = expected if file.length is None else file.length
    return BoundedReader(stream, size).read(min(expected, claimed))


def read_fragments(stream: IO[bytes], where: str, size: int, file: DicomFile) -> list[bytes]:
    """The fragments of compressed pixels, without the offset table; the last one may be cut short by the file's end.

    Raises:
        ImageError: broken image.
    """
    reader = BoundedReader(stream, size)
    reader.seek(file.pixels_at or 0)
    items: list[bytes] = []
    while len(head := reader.read(8)) == 8:  # some writers leave the delimiter out at the end of the file
        group, element, length = struct.unpack("<HHI", head)
        tag = group << 16 | element
        if tag == _DELIMITER:
            break
        if tag != _ITEM or length == _UNDEFINED:
            raise ImageError(where, "broken image", "compressed pixels are not in fragments")
        items.append(reader.read(length))
    return items[1:]


def text(header: Dataset, keyword: str) -> str:
    """The first value of an element as text; empty where it is absent or cannot be read."""
    value = first_value(header, keyword)
    return "" if value is None else str(value).strip().strip("\0")


def number(header: Dataset, keyword: str) -> float | None:
    """The first value of an element as a finite number; None where it is none."""
    try:
        value = float(first_value(header, keyword))
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < 1e300 else None  # also sorts out NaN


def first_value(header: Dataset, keyword: str) -> Any:
    """The first value of an element, or None."""
    try:
        value = header.get(keyword)
    except Exception:  # values are parsed when they are looked at, and raise whatever is wrong with them
        return None
    if isinstance(value, str | bytes) or not hasattr(value, "__getitem__"):
        return value
    return value[0] if len(value) else None


def first_line(error: Exception) -> str:
    """The first line of an error, for a reason."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
