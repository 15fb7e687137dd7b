"""DICOM files with invented pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

MakeDicom = Callable[..., bytes]


@pytest.fixture(scope="session")
def make_dicom() -> MakeDicom:
    """Makes the bytes of a DICOM file.

    `make(pixels, syntax=..., drop=(...), preamble=True, **elements)`: `pixels` is `[h, w]` or `[h, w, 3]`, bytes that
    are put in as they are, a list of bytes to encapsulate, or None. `elements` are set last, by keyword.
    """
    return _make


def _make(
    pixels: NDArray[Any] | bytes | list[bytes] | None,
    *,
    syntax: str | None = ExplicitVRLittleEndian,
    drop: tuple[str, ...] = (),
    preamble: bool = True,
    **elements: Any,
) -> bytes:
    data = Dataset()
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.SOPInstanceUID = data.StudyInstanceUID = generate_uid(entropy_srcs=["invented"])
    data.PatientID, data.Modality, data.BodyPartExamined, data.ViewPosition = "P1", "CR", "CHEST", "PA"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    little = syntax != "1.2.840.10008.1.2.2"
    compressed = isinstance(pixels, list)
    if isinstance(pixels, np.ndarray):
        data.Rows, data.Columns = pixels.shape[:2]
        if pixels.ndim == 3:
            data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
        bits = 8 * pixels.itemsize
        data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        pixels = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
    for keyword, value in elements.items():
        setattr(data, keyword, value)
        if keyword == "BitsStored" and "HighBit" not in elements:
            data.HighBit = value - 1
    for keyword in drop:
        delattr(data, keyword)
    if pixels is not None:
        wide = data.get("BitsAllocated", 8) > 8 and not compressed
        value = encapsulate(pixels) if isinstance(pixels, list) else pixels + b"\0" * (len(pixels) % 2)
        data.add_new(0x7FE00010, "OW" if wide or syntax == "1.2.840.10008.1.2" else "OB", value)
        data["PixelData"].is_undefined_length = compressed
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = data.SOPClassUID, "1.2"
    buffer = io.BytesIO()
    if syntax is not None:
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(buffer, enforce_file_format=preamble)
    else:
        if preamble:
            data.preamble = b"\0" * 128
        data.save_as(buffer, implicit_vr=False, little_endian=True)
    content = buffer.getvalue()
    return content if preamble else _without_meta(content)


def _without_meta(content: bytes) -> bytes:
    """The data set alone, as old archives wrote it."""
    return content[content.index(b"\x08\x00\x16\x00") :]


@pytest.fixture(scope="session")
def make_jpeg_dicom(make_dicom: MakeDicom) -> MakeDicom:
    """`make(pixels, cut=0, **elements)`: a JPEG baseline file; `cut` takes bytes off the end of the JPEG."""

    def make(pixels: NDArray[Any], cut: int = 0, **elements: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        jpeg = buffer.getvalue()
        height, width = pixels.shape[:2]
        layout = {"Rows": height, "Columns": width, "BitsAllocated": 8, "BitsStored": 8, "PixelRepresentation": 0}
        data = jpeg[: len(jpeg) - cut]
        return make_dicom([data + b"\0" * (len(data) % 2)], syntax=JPEGBaseline8Bit, **(layout | elements))

    return make


@pytest.fixture(scope="session")
def chest(tiny_r2gen: Path) -> NDArray[np.uint8]:
    """A drawn frontal chest, uint8 `[140, 160]`, lungs dark."""
    return np.asarray(Image.open(tiny_r2gen / "images" / "study03" / "0.png"))
