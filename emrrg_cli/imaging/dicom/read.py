"""DICOM radiographs to 8-bit grey images, and the facts in their headers. `read_image` leads here by content.

Which decoder reads what is fixed, so that the same file gives the same pixels everywhere: uncompressed and RLE by
pydicom; JPEG baseline by Pillow; JPEG 2000 by OpenJPEG; lossless and 12-bit JPEG and JPEG-LS by GDCM.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLossless

from emrrg_cli.console import printable
from emrrg_cli.imaging.base import ImageError, caught_stderr, open_stream
from emrrg_cli.imaging.dicom.file import (
    NO_PIXELS,
    UNSUPPORTED,
    DicomFile,
    first_line,
    number,
    read_fragments,
    read_header,
    read_native,
    text,
)
from emrrg_cli.imaging.dicom.grey import grey
from emrrg_cli.imaging.jpeg import Frame, frame_of, has_end, mend
from emrrg_cli.imaging.notes import add_notes

_NATIVE = {ImplicitVRLittleEndian: "", ExplicitVRLittleEndian: "", ExplicitVRBigEndian: ""}
_EXTENDED = UID("1.2.840.10008.1.2.4.51")
_RLE = UID("1.2.840.10008.1.2.5")
_PLUGINS = _NATIVE | {
    _RLE: "pydicom",
    UID("1.2.840.10008.1.2.4.50"): "pillow",
    _EXTENDED: "pillow",
    **{UID(f"1.2.840.10008.1.2.4.{number}"): "gdcm" for number in (57, 70, 80, 81)},
    **{UID(f"1.2.840.10008.1.2.4.{number}"): "pylibjpeg" for number in (90, 91, 201, 202, 203)},
}
_MAX_HEADER = 64 * 2**20

_CHEST = ("CHEST", "THOR", "TORAX", "LUNG", "HEART", "RIB", "STERN", "CLAVIC")
_RADIOGRAPHS = ("", "CR", "DX", "DR", "RG", "RF", "XA", "OT", "SC", "HC")
_LATERAL = ("LL", "RL", "LAT")


@dataclass(frozen=True)
class DicomFacts:
    """What a header says about its image; empty where it does not.

    Attributes:
        study_uid: Study Instance UID, by which files are grouped.
        patient_id: Patient ID.
        view: `PA`, `AP`, `LATERAL`, or what View Position says.
        body_part: Body Part Examined, upper case.
        modality: `CR`, `DX`, ...
        photometric: Photometric Interpretation.
        burned_in: Whether text is said to be part of the pixels.
        orientation: Patient Orientation of rows and columns, such as `L\\F`.
    """

    study_uid: str
    patient_id: str
    view: str
    body_part: str
    modality: str
    photometric: str
    burned_in: bool
    orientation: str

    @property
    def is_chest(self) -> bool:
        """False where the header names another part of the body."""
        return not self.body_part or any(word in self.body_part for word in _CHEST)

    @property
    def is_lateral(self) -> bool:
        """Whether the view is one from the side."""
        return self.view == "LATERAL"

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know before they trust a report for this image."""
        notes = []
        if not self.is_chest:
            notes.append(f"not chest: body part {self.body_part}")
        if self.modality not in _RADIOGRAPHS:
            notes.append(f"not a radiograph: modality {self.modality}")
        if self.burned_in:
            notes.append("annotation burned into the pixels")
        row, _, column = self.orientation.partition("\\")
        # A chest film hangs with the patient's left to the right of the reader, feet down.
        if self.is_chest and column and (not column.startswith("F") or (row.startswith("R") and not self.is_lateral)):
            notes.append(f"may be turned or mirrored: patient orientation {self.orientation}")
        return tuple(printable(note) for note in notes)


def read_dicom_facts(path: Path) -> DicomFacts:
    """Reads the header alone.

    Raises:
        ImageError: The file cannot be opened, is no DICOM, or its header is broken.
    """
    where = str(path)
    with open_stream(path, where) as (stream, size), _no_warnings():
        return _facts(read_header(stream, where, size).header)


def read_dicom(stream: IO[bytes], where: str, size: int, max_pixels: int) -> Image.Image:
    """Reads the image of a DICOM file; `dicom_grey` says how values become grey.

    - One frame; overlays, burned-in or not, are left as they are: those beside the pixels are not drawn.
    - Rows times columns is checked against `max_pixels` from the header, and the size that compressed data state
      against rows and columns, before anything is decoded.
    - Without a transfer syntax, uncompressed pixels are read by the encoding of the header.
    - Colour becomes luma.
    - A JPEG that lacks its last rows is mended as an ordinary JPEG file is.

    Args:
        stream: At its start.
        where: For messages.
        size: Of the stream, in bytes.
        max_pixels: As for `read_image`.

    Returns:
        Mode `L`, with notes (`image_notes`).

    Raises:
        ImageError: not an image, broken image, truncated image, too many pixels, file too large, no pixel data,
            multi-frame DICOM, DICOM compression not supported.
    """
    if size > (limit := 8 * max_pixels + _MAX_HEADER):
        raise ImageError(where, "file too large", f"{size:,} bytes, limit {limit:,}")
    with _no_warnings():
        file = read_header(stream, where, size)
        facts = _facts(file.header)
        layout = _layout(file, where, max_pixels, facts)
        notes: list[str] = list(facts.notes)
        try:
            image = _to_image(_decode(stream, where, size, file, layout, notes), file.header, layout, notes)
        except ImageError:
            raise
        except Exception as error:  # decoders raise whatever they meet
            raise ImageError(where, "broken image", first_line(error)) from None
    add_notes(image, *notes, frontal_chest=facts.is_chest and not facts.is_lateral)
    return image


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """pydicom warns of every value against the standard; a file is read, or refused with a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _facts(header: Dataset) -> DicomFacts:
    view = text(header, "ViewPosition").upper()
    try:
        orientation = "\\".join(str(value).upper() for value in header.get("PatientOrientation") or ())
    except Exception:  # not readable: not said
        orientation = ""
    return DicomFacts(
        study_uid=text(header, "StudyInstanceUID"),
        patient_id=text(header, "PatientID"),
        view="LATERAL" if view.startswith(_LATERAL) else view,
        body_part=text(header, "BodyPartExamined").upper(),
        modality=text(header, "Modality").upper(),
        photometric=text(header, "PhotometricInterpretation").upper(),
        burned_in=text(header, "BurnedInAnnotation").upper() == "YES",
        orientation=orientation,
    )


def _layout(file: DicomFile, where: str, max_pixels: int, facts: DicomFacts) -> Dataset:
    """The description of the pixels that decoders go by: checked, and complete where files leave things out."""
    header = file.header
    if file.pixels_at is None:
        what = text(header, "SOPClassUID")
        detail = UID(what).name if what else ""
        raise ImageError(where, NO_PIXELS, f"DICOM file without an image: {printable(detail)}" if detail else "")

    def whole(keyword: str, otherwise: int | None = None) -> int:
        value = number(header, keyword)
        if value is None or value != math.floor(value):
            if otherwise is None:
                raise ImageError(where, "broken image", f"no {keyword} in the header")
            return otherwise
        return int(value)

    if (frames := whole("NumberOfFrames", 1)) > 1:
        raise ImageError(where, "multi-frame DICOM", f"{frames} frames")
    rows, columns = whole("Rows"), whole("Columns")
    if rows <= 0 or columns <= 0:
        raise ImageError(where, "broken image", f"{columns} x {rows} pixels")
    if (pixels := rows * columns) > max_pixels:
        raise ImageError(where, "too many pixels", f"{columns:,} x {rows:,} = {pixels:,}, limit {max_pixels:,}")
    layout = Dataset()
    layout.Rows, layout.Columns = rows, columns
    layout.SamplesPerPixel = samples = whole("SamplesPerPixel", 3 if facts.photometric[:3] in ("RGB", "YBR") else 1)
    layout.BitsAllocated = allocated = whole("BitsAllocated")
    layout.BitsStored = stored = whole("BitsStored", allocated)
    layout.HighBit = high = whole("HighBit", stored - 1)
    layout.PixelRepresentation = whole("PixelRepresentation", 0)
    layout.PhotometricInterpretation = facts.photometric or ("RGB" if samples == 3 else "MONOCHROME2")
    if samples == 3:
        layout.PlanarConfiguration = whole("PlanarConfiguration", 0)
    if samples not in (1, 3) or allocated not in (1, 8, 16, 32) or not 1 <= stored <= high + 1 <= allocated:
        raise ImageError(
            where, "broken image", f"{samples} samples of {stored} bits, high bit {high}, in {allocated} bits"
        )
    return layout


def _decode(
    stream: IO[bytes], where: str, size: int, file: DicomFile, layout: Dataset, notes: list[str]
) -> NDArray[Any]:
    """Stored values `[h, w]`, or colours `[h, w, 3]`."""
    syntax = file.syntax
    if syntax is None and file.length is not None:
        encoded = (file.implicit, file.little_endian)
        syntax = {(True, True): ImplicitVRLittleEndian, (False, False): ExplicitVRBigEndian}.get(
            encoded, ExplicitVRLittleEndian
        )
        notes.append(f"no transfer syntax: read as {syntax.name}")
    if syntax is None or (plugin := _PLUGINS.get(syntax)) is None:
        name = syntax.name if syntax else "compressed, without a transfer syntax"
        raise ImageError(where, UNSUPPORTED, printable(name))
    layout.file_meta = FileMetaDataset()
    layout.file_meta.TransferSyntaxUID = syntax
    if syntax in _NATIVE:
        if file.length is None:
            raise ImageError(where, "broken image", f"compressed pixels under {syntax.name}")
        _add_native(stream, where, size, file, layout)
        return _native_values(layout)
    frame = _add_compressed(stream, where, size, file, layout, notes)
    if syntax == _EXTENDED and frame is not None and frame.bits > 8:
        # GDCM goes by the data; pydicom keeps it from them under this name only.
        layout.file_meta.TransferSyntaxUID, plugin = JPEGLossless, "gdcm"
    with caught_stderr() if plugin in ("gdcm", "pylibjpeg") else contextlib.nullcontext():
        return pixel_array(layout, decoding_plugin=plugin)


def _add_native(stream: IO[bytes], where: str, size: int, file: DicomFile, layout: Dataset) -> None:
    samples = layout.Rows * layout.Columns * layout.SamplesPerPixel
    expected = -(-samples * layout.BitsAllocated // 8)
    if layout.PhotometricInterpretation == "YBR_FULL_422":
        expected = expected // 3 * 2
    data = read_native(stream, size, file, expected)
    if len(data) < expected:
        raise ImageError(where, "truncated image", f"{len(data):,} of {expected:,} bytes of pixels")
    vr = "OB" if file.vr == "OB" and layout.BitsAllocated <= 8 else "OW"
    layout.add_new(0x7FE00010, vr, data + b"\0" * (len(data) % 2))


def _add_compressed(
    stream: IO[bytes], where: str, size: int, file: DicomFile, layout: Dataset, notes: list[str]
) -> Frame | None:
    fragments = read_fragments(stream, where, size, file)
    if not (data := b"".join(fragments)):
        raise ImageError(where, "truncated image", "no compressed data")
    frame = None
    if file.syntax == _RLE:
        data = fragments[0]  # one fragment a frame
    else:
        frame = frame_of(data)
        if frame is None:
            raise ImageError(where, "broken image", f"no {file.syntax.name if file.syntax else ''} data")
        if (frame.width, frame.height, frame.samples) != (layout.Columns, layout.Rows, layout.SamplesPerPixel):
            stated = f"{layout.Columns:,} x {layout.Rows:,} x {layout.SamplesPerPixel}"
            found = f"{frame.width:,} x {frame.height:,} x {frame.samples}"
            raise ImageError(where, "broken image", f"header says {stated}, compressed data {found}")
        if not has_end(data):
            if (mended := mend(data)) is None:
                raise ImageError(where, "truncated image", "compressed data end too early")
            data = mended.data
            notes.append(mended.note)
    layout.add_new(0x7FE00010, "OB", encapsulate([data]))
    layout["PixelData"].is_undefined_length = True
    return frame


def _native_values(layout: Dataset) -> NDArray[Any]:
    """Uncompressed values without what stands beside them in their words (overlays of old files, most often)."""
    allocated, stored, shift = layout.BitsAllocated, layout.BitsStored, layout.HighBit + 1 - layout.BitsStored
    layout.BitsStored = allocated  # pydicom would take the lowest bits, wherever the highest is
    values = pixel_array(layout)
    layout.BitsStored = stored
    if allocated == 1 or values.ndim == 3 or stored == allocated:
        return values
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    # Shifted to the top and back again: the second shift spreads the sign where there is one.
    top = allocated - stored - shift
    return np.asarray((native << top) >> (top + shift))


def _to_image(values: NDArray[Any], header: Dataset, layout: Dataset, notes: list[str]) -> Image.Image:
    if layout.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
        stored = 8 * values.itemsize
    else:
        stored = layout.BitsStored
    if values.ndim == 3:
        if stored > 8:
            values = values >> (stored - 8)
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("L")
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise ValueError(f"unexpected pixels: {values.dtype} of shape {values.shape}")
    if not text(header, "PhotometricInterpretation"):
        notes.append("no photometric interpretation: taken as MONOCHROME2")
    shown, more = grey(values, header, stored, bool(layout.PixelRepresentation))
    notes += more
    return Image.fromarray(shown)
