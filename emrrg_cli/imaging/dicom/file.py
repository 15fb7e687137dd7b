"""Reads DICOM files: the header without the pixels, and the stored bytes of the pixels.

Memory is bounded by the size of the file, whatever lengths it claims.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, replace
from typing import IO, Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian

from emrrg_cli.imaging.base import NOT_AN_IMAGE, TRUNCATED, ImageError, is_dicom, short_message

MAX_HEADER = 64 * 2**20  # bytes

UNSUPPORTED = "DICOM compression not supported"
NO_PIXELS = "no pixel data"

_COLOURS = ("Red", "Green", "Blue")
_WANTED = [
    *("SOPClassUID", "Modality", "BodyPartExamined", "ViewPosition", "PatientOrientation", "PatientID"),
    *("PatientAge", "PatientSex", "ReasonForTheRequestedProcedure", "ReasonForStudy", "AdmittingDiagnosesDescription"),
    *(
        "RequestAttributesSequence",
        "StudyInstanceUID",
        "BurnedInAnnotation",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "SamplesPerPixel",
    ),
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
    """A header and the position of the pixels.

    Attributes:
        header: The elements that this package reads.
        syntax: Transfer syntax; None if the file does not have one.
        implicit, little_endian: The encoding that the header was read by.
        pixels_at: Offset of the value of the pixel data; None if there is none.
        length: Length of this value according to the file; None: undefined, the pixels are compressed.
        vr: Its value representation; OF without `pixels_at`: floating-point pixels, which are not read.
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
        """Does nothing: the caller closes the stream."""


def inflated(stream: IO[bytes], where: str, size: int, limit: int, *, cut: bool = False) -> tuple[IO[bytes], int]:
    """Returns the stream and its size; for a deflated DICOM file, a stream of the inflated content.

    Args:
        stream: The file, at its start; its position is restored.
        where: Name of the file for messages.
        size: Size of the stream in bytes.
        limit: Bytes that a data set may inflate to.
        cut: Return the first `limit` bytes of a larger data set instead of refusing it.

    Raises:
        ImageError: file too large, truncated image, broken image.

    Source: PS3.5 A.5. There should be no zlib header, but some programs write one.
    """
    # The transfer syntax is in the first group, within a few hundred bytes.
    head = stream.read(65_536)
    stream.seek(0)
    if DeflatedExplicitVRLittleEndian.encode() not in head or head[128:132] != b"DICM":
        return stream, size
    start = _end_of_file_meta(head)
    if DeflatedExplicitVRLittleEndian.encode() not in head[:start]:
        return stream, size
    if start > size:
        raise ImageError(where, TRUNCATED, "the file ends within its first group")
    stream.seek(start)
    deflated = stream.read(size - start)
    stream.seek(0)
    has_zlib_header = deflated[:1] == b"\x78" and len(deflated) > 1 and int.from_bytes(deflated[:2], "big") % 31 == 0
    try:
        try:
            data, ended = _inflate(deflated, zlib.MAX_WBITS if has_zlib_header else -zlib.MAX_WBITS, limit)
        except zlib.error:
            if not has_zlib_header:
                raise
            data, ended = _inflate(deflated, -zlib.MAX_WBITS, limit)  # data that only look like a header
    except zlib.error as error:
        raise ImageError(where, "broken image", f"deflated data: {error}") from None
    if len(data) > limit and not cut:
        raise ImageError(where, "file too large", f"deflated data of more than {limit:,} bytes")
    if len(data) <= limit and not ended:
        raise ImageError(where, TRUNCATED, "deflated data end too early")
    # The same preamble, and a file meta group that only says that the data set is no longer deflated.
    meta = b"\x02\0\x10\0UI\x14\0" + ExplicitVRLittleEndian.encode().ljust(20, b"\0")
    group = b"\x02\0\0\0UL\x04\0" + len(meta).to_bytes(4, "little")
    content = head[:132] + group + meta + data
    return io.BytesIO(content), len(content)


def _end_of_file_meta(head: bytes) -> int:
    """Returns where the data set begins: after the elements of group 2, which are explicit and little-endian."""
    at = 132
    while head[at : at + 2] == b"\x02\0":
        long_form = head[at + 4 : at + 6] in _LONG_FORM
        length = int.from_bytes(head[at + 8 : at + 12] if long_form else head[at + 6 : at + 8], "little")
        at += (12 if long_form else 8) + length
    return at


def _inflate(data: bytes, window: int, limit: int) -> tuple[bytes, bool]:
    """Returns at most a few more than `limit` bytes, and whether the data ended."""
    inflater = zlib.decompressobj(window)
    content = inflater.decompress(data, limit + 1)
    return content, inflater.eof


def read_header(stream: IO[bytes], where: str, size: int) -> DicomFile:
    """Reads the header, up to the pixels. A file without preamble may still be DICOM, so it is tried.

    Raises:
        ImageError: not an image, broken image, truncated image.
    """
    has_preamble = is_dicom(stream)
    reader = BoundedReader(stream, size)
    try:
        header = pydicom.dcmread(reader, stop_before_pixels=True, force=True, specific_tags=list(_WANTED))
    except Exception as error:  # a broken file raises errors of many types, also RecursionError
        if not has_preamble:
            raise ImageError(where, NOT_AN_IMAGE, "not DICOM despite its name") from None
        raise ImageError(where, "broken image", short_message(error)) from None
    if not has_preamble and not any(keyword in header for keyword in _WANTED):
        raise ImageError(where, NOT_AN_IMAGE, "not DICOM despite its name")
    syntax = text(getattr(header, "file_meta", Dataset()), "TransferSyntaxUID")
    implicit, little = header.original_encoding
    little_endian = syntax != ExplicitVRBigEndian if syntax else little is not False
    file = DicomFile(header, UID(syntax) if syntax else None, bool(implicit), little_endian)
    if reader.tell() > size:
        raise ImageError(where, TRUNCATED, "the file ends within its header")
    return _find_pixels(reader, file)


def _find_pixels(reader: BoundedReader, file: DicomFile) -> DicomFile:
    """Reads the element header of the pixel data, where pydicom stopped."""
    order = "<" if file.little_endian else ">"
    start = reader.tell()
    head = reader.read(12)
    tag = struct.unpack_from(order + "2H", head) if len(head) >= 8 else None
    if tag in ((0x7FE0, 0x0008), (0x7FE0, 0x0009)):
        return replace(file, vr="OF")
    if tag != (0x7FE0, 0x0010):
        return file
    # Decided by the bytes, because some files change to implicit representations in the middle.
    if head[4:6] in _LONG_FORM and len(head) == 12:
        length, at, vr = struct.unpack_from(order + "I", head, 8)[0], start + 12, head[4:6].decode()
    else:
        length, at, vr = struct.unpack_from(order + "I", head, 4)[0], start + 8, "OW"
    undefined = length == _UNDEFINED
    return replace(file, pixels_at=at, length=None if undefined else length, vr=vr)


def read_native(stream: IO[bytes], size: int, file: DicomFile, expected: int) -> bytes:
    """Returns the first `expected` bytes of uncompressed pixels, rounded up to whole words, or all if fewer exist."""
    stream.seek(file.pixels_at or 0)
    claimed = expected if file.length is None else file.length
    return BoundedReader(stream, size).read(min(expected + expected % 2, claimed))


def read_fragments(stream: IO[bytes], where: str, size: int, file: DicomFile, *, whole: bool) -> list[bytes]:
    """Returns the fragments of compressed pixels, without the offset table.

    For one frame, the offset table has four bytes or none. A longer first item that begins like compressed data is no
    table.

    Args:
        whole: Whether to refuse a last fragment that the end of the file cuts; a missing fill byte is accepted.

    Raises:
        ImageError: broken image, truncated image.
    """
    reader = BoundedReader(stream, size)
    reader.seek(file.pixels_at or 0)
    items: list[bytes] = []
    while len(head := reader.read(8)) == 8:  # some programs omit the delimiter at the end of the file
        group, element, length = struct.unpack("<HHI", head)
        tag = group << 16 | element
        if tag == _DELIMITER:
            break
        if tag != _ITEM or length == _UNDEFINED:
            raise ImageError(where, "broken image", "compressed pixels are not in fragments")
        items.append(reader.read(length))
        if whole and len(items[-1]) < length - 1:
            raise ImageError(where, TRUNCATED, "compressed data end too early")
    return items if items and len(items[0]) > 4 and _begins_as_data(items[0]) else items[1:]


def _begins_as_data(item: bytes) -> bool:
    if item.startswith((b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        return True
    # RLE: the number of segments, then their offsets; the first begins after this header of 64 bytes.
    return len(item) >= 64 and 1 <= int.from_bytes(item[:4], "little") <= 15 and item[4:8] == b"\x40\0\0\0"


def text(header: Dataset, keyword: str) -> str:
    """Returns the first value of an element as text; "" if it is absent or cannot be read."""
    value = first_value(header, keyword)
    return "" if value is None else str(value).strip().strip("\0")


def number(header: Dataset, keyword: str) -> float | None:
    """Returns the first value of an element as a finite number; None if it is not one."""
    try:
        value = float(first_value(header, keyword))
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < 1e300 else None  # also excludes NaN


def first_value(header: Dataset, keyword: str) -> Any:
    """Returns the first value of an element, or None."""
    try:
        value = header.get(keyword)
    except Exception:  # values are parsed on access, with errors of many types
        return None
    if isinstance(value, str | bytes) or not hasattr(value, "__getitem__"):
        return value
    return value[0] if len(value) else None
