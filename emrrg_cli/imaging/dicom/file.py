"""A DICOM file as a file: its header, read without its pixels, and the bytes of its pixels, as they are stored.

Everything here is bounded by the size of the file, whatever lengths it claims.
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
    """A header and where the pixels stand.

    Attributes:
        header: The elements that this package looks at.
        syntax: Transfer syntax; None where the file does not say.
        implicit, little_endian: The encoding that the header was read by.
        pixels_at: Offset of the pixel data's value; None where there is none.
        length: Of that value, as claimed; None: undefined, the pixels are compressed.
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
        """The stream belongs to the caller."""


def inflated(stream: IO[bytes], where: str, size: int, limit: int, *, cut: bool = False) -> tuple[IO[bytes], int]:
    """The stream and its size; of a deflated DICOM file, one of the same content that is not deflated.

    Args:
        stream: At its start, where it is left.
        where: For messages.
        size: Of the stream.
        limit: Bytes that a data set may inflate to.
        cut: Return the first `limit` bytes of a larger data set instead of refusing it.

    Raises:
        ImageError: file too large, truncated image, broken image.

    Source: PS3.5 A.5; there should be no zlib header, and some writers have one.
    """
    # The transfer syntax stands in the first group, within a few hundred bytes.
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
    # The same preamble, and a file meta group that says no more than that this is not deflated any longer.
    meta = b"\x02\0\x10\0UI\x14\0" + ExplicitVRLittleEndian.encode().ljust(20, b"\0")
    group = b"\x02\0\0\0UL\x04\0" + len(meta).to_bytes(4, "little")
    content = head[:132] + group + meta + data
    return io.BytesIO(content), len(content)


def _end_of_file_meta(head: bytes) -> int:
    """Where the data set begins: after the elements of group 2, which are explicit and little-endian."""
    at = 132
    while head[at : at + 2] == b"\x02\0":
        long_form = head[at + 4 : at + 6] in _LONG_FORM
        length = int.from_bytes(head[at + 8 : at + 12] if long_form else head[at + 6 : at + 8], "little")
        at += (12 if long_form else 8) + length
    return at


def _inflate(data: bytes, window: int, limit: int) -> tuple[bytes, bool]:
    """At most a little more than `limit` bytes, and whether the data came to their end."""
    inflater = zlib.decompressobj(window)
    content = inflater.decompress(data, limit + 1)
    return content, inflater.eof


def read_header(stream: IO[bytes], where: str, size: int) -> DicomFile:
    """Reads the header, up to the pixels. A file without preamble is given the benefit of the doubt.

    Raises:
        ImageError: not an image, broken image, truncated image.
    """
    has_preamble = is_dicom(stream)
    reader = BoundedReader(stream, size)
    try:
        header = pydicom.dcmread(reader, stop_before_pixels=True, force=True, specific_tags=list(_WANTED))
    except Exception as error:  # a broken file raises whatever its parser met, RecursionError included
        if not has_preamble:
            raise ImageError(where, NOT_AN_IMAGE, "no DICOM in spite of its name") from None
        raise ImageError(where, "broken image", short_message(error)) from None
    if not has_preamble and not any(keyword in header for keyword in _WANTED):
        raise ImageError(where, NOT_AN_IMAGE, "no DICOM in spite of its name")
    syntax = text(getattr(header, "file_meta", Dataset()), "TransferSyntaxUID")
    implicit, little = header.original_encoding
    little_endian = syntax != ExplicitVRBigEndian if syntax else little is not False
    file = DicomFile(header, UID(syntax) if syntax else None, bool(implicit), little_endian)
    if reader.tell() > size:
        raise ImageError(where, TRUNCATED, "the file ends within its header")
    return _find_pixels(reader, file)


def _find_pixels(reader: BoundedReader, file: DicomFile) -> DicomFile:
    """Reads the pixel data's own element header, at which pydicom stopped."""
    order = "<" if file.little_endian else ">"
    start = reader.tell()
    head = reader.read(12)
    tag = struct.unpack_from(order + "2H", head) if len(head) >= 8 else None
    if tag in ((0x7FE0, 0x0008), (0x7FE0, 0x0009)):
        return replace(file, vr="OF")
    if tag != (0x7FE0, 0x0010):
        return file
    # By the bytes, since there are files that change over to implicit representations on the way.
    if head[4:6] in _LONG_FORM and len(head) == 12:
        length, at, vr = struct.unpack_from(order + "I", head, 8)[0], start + 12, head[4:6].decode()
    else:
        length, at, vr = struct.unpack_from(order + "I", head, 4)[0], start + 8, "OW"
    undefined = length == _UNDEFINED
    return replace(file, pixels_at=at, length=None if undefined else length, vr=vr)


def read_native(stream: IO[bytes], size: int, file: DicomFile, expected: int) -> bytes:
    """The first `expected` bytes of uncompressed pixels, rounded up to whole words, or as many as there are."""
    stream.seek(file.pixels_at or 0)
    claimed = expected if file.length is None else file.length
    return BoundedReader(stream, size).read(min(expected + expected % 2, claimed))


def read_fragments(stream: IO[bytes], where: str, size: int, file: DicomFile, *, whole: bool) -> list[bytes]:
    """The fragments of compressed pixels, without the offset table.

    There is to be an offset table, of four bytes or none for one frame; a first item that is longer and begins as
    compressed data do is no table.

    Args:
        whole: Refuse a last fragment that is cut short by the file's end; a missing fill byte is accepted.

    Raises:
        ImageError: broken image, truncated image.
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
        if whole and len(items[-1]) < length - 1:
            raise ImageError(where, TRUNCATED, "compressed data end too early")
    return items if items and len(items[0]) > 4 and _begins_as_data(items[0]) else items[1:]


def _begins_as_data(item: bytes) -> bool:
    if item.startswith((b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        return True
    # RLE: the number of segments, then where they begin, the first right after this header of 64 bytes.
    return len(item) >= 64 and 1 <= int.from_bytes(item[:4], "little") <= 15 and item[4:8] == b"\x40\0\0\0"


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
