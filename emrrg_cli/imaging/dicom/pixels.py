"""Reads the pixels of a DICOM file: stored values, as the header and the compressed data describe them."""

from __future__ import annotations

import io
import math
import struct
from itertools import pairwise
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from emrrg_cli.console import counted, printable
from emrrg_cli.imaging.base import TRUNCATED, ImageError, too_many_pixels
from emrrg_cli.imaging.decoder_process import decode_apart
from emrrg_cli.imaging.dicom.file import (
    NO_PIXELS,
    UNSUPPORTED,
    DicomFile,
    number,
    read_fragments,
    read_native,
    text,
)
from emrrg_cli.imaging.dicom.grey import Samples, grey
from emrrg_cli.imaging.dicom.luts import palette_levels
from emrrg_cli.imaging.dicom.rle import runs_exceed
from emrrg_cli.imaging.jpeg import Frame, frame_of, has_end, mend, too_many_scans
from emrrg_cli.imaging.jpeg2000 import whole_codestream

_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_RLE = UID("1.2.840.10008.1.2.5")
_JPEG = tuple(UID(f"1.2.840.10008.1.2.4.{number}") for number in (50, 51, 57, 70))
_JPEG_LS = tuple(UID(f"1.2.840.10008.1.2.4.{number}") for number in (80, 81))
_JPEG_2000 = tuple(UID(f"1.2.840.10008.1.2.4.{number}") for number in (90, 91, 201, 202, 203))
_UNCHECKED = 4 * 2**20  # bytes of RLE, which hold at most 256 MB
_BASELINE = (0xC0, 0xC1, 0xC2)  # markers of frames that Pillow reads if samples have 8 bits


class PixelReader:
    """Reads the single frame of a DICOM file.

    Args:
        stream: The file.
        where: Name of the file for messages.
        size: Size of the stream in bytes.
        file: Its header.
        max_pixels: Largest rows times columns.

    Attributes:
        notes: Notes for people; complete after the pixels are read.

    Raises:
        ImageError: The header does not describe an image that can be read.
    """

    def __init__(self, stream: IO[bytes], where: str, size: int, file: DicomFile, max_pixels: int) -> None:
        self._stream, self._where, self._size, self._file = stream, where, size, file
        self._max_pixels = max_pixels
        self.notes: list[str] = []
        self._describe(file.header)

    def grey(self) -> NDArray[np.uint8]:
        """Returns the image, uint8 `[h, w]`, 0 black to 255 white.

        Raises:
            ImageError: It cannot be read.
            Exception: A decoder failed.
        """
        header = self._file.header
        samples = self._samples(*self._decode())
        values = samples.values
        if self._photometric == "PALETTE COLOR":
            return palette_levels(header, values)
        if values.ndim == 3:
            return self._colour(values, samples.bits)
        if not text(header, "PhotometricInterpretation"):
            self.notes.append("no photometric interpretation: read as MONOCHROME2")
        shown, notes = grey(samples, header)
        self.notes += notes
        return shown

    # The header.

    def _describe(self, header: Dataset) -> None:
        """Reads the description of the pixels from the header, checks it and completes missing values."""
        if self._file.pixels_at is None:
            raise self._error(NO_PIXELS, self._why_no_pixels(text(header, "SOPClassUID")))
        if (frames := self._whole("NumberOfFrames", 1)) > 1:
            raise self._error("multi-frame DICOM", f"{frames} frames")
        self._rows, self._columns = self._whole("Rows"), self._whole("Columns")
        if self._rows <= 0 or self._columns <= 0:
            raise self._error("broken image", f"{self._columns} x {self._rows} pixels")
        if self._rows * self._columns > self._max_pixels:
            raise too_many_pixels(self._where, self._columns, self._rows, self._max_pixels)
        photometric = text(header, "PhotometricInterpretation").upper()
        self._per_pixel = samples = self._whole("SamplesPerPixel", 3 if photometric[:3] in ("RGB", "YBR") else 1)
        self._photometric = photometric or ("RGB" if samples == 3 else "MONOCHROME2")
        self._planar = self._whole("PlanarConfiguration", 0) if samples == 3 else 0
        self._allocated = allocated = self._whole("BitsAllocated")
        self._stored = stored = self._whole("BitsStored", self._whole("HighBit", allocated - 1) + 1)
        self._high = high = self._whole("HighBit", stored - 1)
        self._signed = self._whole("PixelRepresentation", 0) == 1
        if samples not in (1, 3) or allocated not in (1, 8, 16, 32) or not 1 <= stored <= high + 1 <= allocated:
            detail = f"{counted(samples, 'sample')} of {stored} bits, high bit {high}, in {allocated} bits"
            raise self._error("broken image", detail)

    def _why_no_pixels(self, kind: str) -> str:
        if self._file.vr == "OF":
            return "floating-point pixels are not supported"
        # A UID has at most 64 characters; in a damaged file this may be anything.
        name = printable(UID(kind).name[:64])
        if not name or "Image Storage" in name:
            return "the file ends before the pixels, or they were removed"
        return f"DICOM file without an image: {name}"

    def _whole(self, keyword: str, otherwise: int | None = None) -> int:
        value = number(self._file.header, keyword)
        if value is not None and value == math.floor(value):
            return int(value)
        if otherwise is None:
            raise self._error("broken image", f"no {keyword} in the header")
        return otherwise

    def _error(self, reason: str, detail: str = "") -> ImageError:
        return ImageError(self._where, reason, detail)

    def _layout(self, bits: int | None = None) -> Dataset:
        """Returns the description for pydicom: whole unsigned words, because pydicom always reads the lowest bits; or
        with `bits` of the compressed data."""
        layout = Dataset()
        layout.Rows, layout.Columns = self._rows, self._columns
        layout.SamplesPerPixel = self._per_pixel
        if self._per_pixel == 3:
            layout.PlanarConfiguration = self._planar
        layout.BitsAllocated = layout.BitsStored = bits or self._allocated
        layout.HighBit = layout.BitsStored - 1
        layout.PixelRepresentation = 0
        layout.PhotometricInterpretation = self._photometric
        layout.file_meta = FileMetaDataset()
        return layout

    # Decoding.

    def _decode(self) -> tuple[NDArray[Any], Frame | None]:
        """Returns the stored words, `[h, w]` or `[h, w, 3]`, and the frame of compressed data if they have one."""
        syntax = self._syntax()
        if syntax in _NATIVE:
            return self._native(syntax), None
        data = b"".join(read_fragments(self._stream, self._where, self._size, self._file, whole=syntax == _RLE))
        if not data:
            raise self._error(TRUNCATED, "no compressed data")
        if syntax == _RLE:
            self._check_runs(data)
            return self._by_pydicom(syntax, data, "pydicom"), None
        frame = self._frame(syntax, data)
        if syntax in _JPEG and (detail := too_many_scans(io.BytesIO(data))):
            raise self._error("broken image", detail)
        data = self._whole_data(syntax, data)
        if syntax in _JPEG and frame.bits == 8 and frame.kind in _BASELINE:
            return self._by_pydicom(_JPEG[0], data, "pillow", bits=8), frame
        codec = "jpeg-2000" if syntax in _JPEG_2000 else "jpeg-ls" if frame.kind == 0xF7 else "jpeg"
        values = decode_apart(codec, data, self._where, self._rows * self._columns, self._max_pixels)
        expected = (self._rows, self._columns, 3)[: 2 if self._per_pixel == 1 else 3]
        if values.shape != expected or values.dtype.kind not in "iu":
            raise self._error("broken image", f"decoded as {values.dtype} of shape {values.shape}")
        if values.ndim == 3 and self._photometric.startswith("YBR_FULL") and frame.kind not in _BASELINE:
            values = values[..., 0]  # the luma; these decoders do not convert colours
        return values, frame

    def _syntax(self) -> UID:
        file = self._file
        syntax = file.syntax
        if syntax is None and file.length is not None:
            encoded = (file.implicit, file.little_endian)
            syntax = {(True, True): ImplicitVRLittleEndian, (False, False): ExplicitVRBigEndian}.get(
                encoded, ExplicitVRLittleEndian
            )
            self.notes.append(f"no transfer syntax: read as {syntax.name}")
        if syntax is None or syntax not in (*_NATIVE, _RLE, *_JPEG, *_JPEG_LS, *_JPEG_2000):
            name = syntax.name if syntax else "compressed, without a transfer syntax"
            raise self._error(UNSUPPORTED, printable(name))
        if syntax in _NATIVE and file.length is None:
            raise self._error("broken image", f"compressed pixels under {syntax.name}")
        return syntax

    def _native(self, syntax: UID) -> NDArray[Any]:
        samples = self._rows * self._columns * self._per_pixel
        expected = -(-samples * self._allocated // 8)
        if self._photometric == "YBR_FULL_422":
            expected = expected // 3 * 2
        data = read_native(self._stream, self._size, self._file, expected)
        if len(data) < expected:
            raise self._error(TRUNCATED, f"{len(data):,} of {expected:,} bytes of pixels")
        layout = self._layout()
        layout.file_meta.TransferSyntaxUID = syntax
        vr = "OB" if self._file.vr == "OB" and self._allocated <= 8 else "OW"
        layout.add_new(0x7FE00010, vr, data + b"\0" * (len(data) % 2))
        return pixel_array(layout)

    def _by_pydicom(self, syntax: UID, data: bytes, plugin: str, bits: int | None = None) -> NDArray[Any]:
        layout = self._layout(bits)
        layout.file_meta.TransferSyntaxUID = syntax
        layout.add_new(0x7FE00010, "OB", encapsulate([data]))
        layout["PixelData"].is_undefined_length = True
        return pixel_array(layout, decoding_plugin=plugin)

    def _check_runs(self, data: bytes) -> None:
        """Refuses an RLE segment that is longer than its plane: pydicom could decode gigabytes."""
        segments, *offsets = struct.unpack_from("<16I", data.ljust(64, b"\0"))
        plane = self._rows * self._columns
        for start, end in pairwise([*offsets[:segments], len(data)]):
            if end - start > _UNCHECKED and runs_exceed(memoryview(data)[start:end], plane):
                raise self._error("broken image", f"RLE data of more than {plane:,} bytes for {plane:,} pixels")

    def _frame(self, syntax: UID, data: bytes) -> Frame:
        """Returns the frame of the compressed data; its size must be that of the header."""
        frame = frame_of(data)
        if frame is None:
            raise self._error("broken image", f"no {syntax.name} data")
        if (frame.width, frame.height, frame.samples) != (self._columns, self._rows, self._per_pixel):
            stated = f"{self._columns:,} x {self._rows:,} x {self._per_pixel}"
            found = f"{frame.width:,} x {frame.height:,} x {frame.samples}"
            raise self._error("broken image", f"header says {stated}, compressed data {found}")
        return frame

    def _whole_data(self, syntax: UID, data: bytes) -> bytes:
        """Returns the complete data; a JPEG without its last rows is completed."""
        if syntax in _JPEG_2000:
            whole = whole_codestream(data)
        elif has_end(data):
            whole = data
        elif (mended := mend(data)) is not None:
            whole = mended.data
            self.notes.append(mended.note)
        else:
            whole = None
        if whole is None:
            raise self._error(TRUNCATED, "compressed data end too early")
        return whole

    # Values.

    def _samples(self, words: NDArray[Any], frame: Frame | None) -> Samples:
        """Returns the stored bits of each word, with their sign.

        The other bits of a word are most often overlays of old files. Compressed data with fewer bits than the header
        says, or more than its words have, are not changed.
        """
        bits = self._allocated if frame is None else frame.bits
        stored, shift = self._stored, self._high + 1 - self._stored
        if frame is not None and (bits < stored or bits > self._allocated):
            self.notes.append(f"header says {stored} bits in {self._allocated}, compressed data {bits}")
            stored, shift = bits, 0
        elif frame is not None and bits <= self._high:
            shift = 0  # compressed without the lower bits
        native = words.astype(words.dtype.newbyteorder("="), copy=False)
        if native.dtype.kind == "i":  # JPEG 2000 has its own sign
            if not self._signed or stored >= bits:
                return Samples(native, native, stored, signed=True)
            native = native.view(native.dtype.str.replace("i", "u"))
        values = native
        if bits > 1 and (stored < 8 * native.itemsize or self._signed):
            # Shifted up and down again: the second shift extends the sign of signed values.
            top = 8 * native.itemsize - stored - shift
            values = native << top
            if self._signed:
                values = values.view(values.dtype.str.replace("u", "i"))
            values = values >> (top + shift)
        return Samples(np.asarray(values), native, stored, self._signed)

    def _colour(self, values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
        if bits > 8:
            values = values >> (bits - 8)
        return np.asarray(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("L"))
