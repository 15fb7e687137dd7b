"""Look-up tables, palettes and padding of DICOM files, whatever VR and byte order they are written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from emrrg_cli.imaging.notes import image_notes
from emrrg_cli.imaging.read import read_image

MakeDicom = Callable[..., bytes]
Array = np.ndarray[Any, Any]

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
SYNTAXES = pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
COLOURS = ("Red", "Green", "Blue")

RAMP = np.tile(np.arange(4096, dtype=np.uint16), (2, 1))
SIGNED = (RAMP.astype(int) - 2048).astype(np.int16)
SQUARE = np.round(65535 * (np.arange(4096) / 4095) ** 2).astype(int)
SHOWN = np.floor(SQUARE / 65535 * 255 + 0.5)


def _row(data: bytes) -> list[int]:
    return np.asarray(read_image(data))[0].tolist()


def _bytes(entries: Array, order: str) -> bytes:
    return entries.astype(f"{order}u2").tobytes()


def _lut(first: int, entries: Array, vr: str, data_vr: str, syntax: str, bits: int = 16) -> Dataset:
    item = Dataset()
    wrapped = first % 65536 if vr == "US" else (first % 65536 ^ 0x8000) - 0x8000
    length = len(entries) % 65536
    if vr == "SS" and length > 32767:
        length -= 65536
    item.add_new(0x00283002, vr, [length, wrapped, bits])
    words = entries.astype(np.uint16)
    value: Any = {"US": words.tolist(), "SS": words.view(np.int16).tolist()}.get(data_vr)
    item.add_new(0x00283006, data_vr, _bytes(words, ">" if syntax == BIG_ENDIAN else "<") if value is None else value)
    return item


@SYNTAXES
@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("data_vr", ["OW", "US", "SS"])
@pytest.mark.parametrize("kind", ["plain", "signed", "rescaled", "behind a modality LUT"])
def test_first_value_and_entries_of_a_lut(make_dicom: MakeDicom, syntax: str, vr: str, data_vr: str, kind: str) -> None:
    pixels, first, more = RAMP, 0, {}
    if kind == "signed":
        pixels, first = SIGNED, -2048
    elif kind == "rescaled":
        first, more = -1024, {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    elif kind != "plain":
        modality = _lut(-2048, np.arange(4096) + 50000, "SS", data_vr, syntax)
        modality.ModalityLUTType = "US"
        pixels, first, more = SIGNED, 50000, {"ModalityLUTSequence": Sequence([modality])}
    voi = _lut(first, SQUARE, vr, data_vr, syntax)
    data = make_dicom(pixels, syntax=syntax, BitsStored=12, VOILUTSequence=Sequence([voi]), **more)
    assert _row(data) == SHOWN.tolist()
    assert image_notes(read_image(data)) == ()


@SYNTAXES
def test_a_lut_of_65536_entries(make_dicom: MakeDicom, syntax: str) -> None:
    entries = 65535 - np.arange(65536)
    data = make_dicom(RAMP * 16, syntax=syntax, VOILUTSequence=Sequence([_lut(0, entries, "US", "OW", syntax)]))
    assert _row(data) == np.floor((65535 - RAMP[0] * 16.0) / 65535 * 255 + 0.5).tolist()


@SYNTAXES
def test_a_lut_whose_entries_are_all_high(make_dicom: MakeDicom, syntax: str) -> None:
    item = _lut(0, 40000 + np.arange(4096) * 6, "US", "SS", syntax)
    data = make_dicom(RAMP, syntax=syntax, BitsStored=12, VOILUTSequence=Sequence([item]))
    assert _row(data) == np.floor((40000 + RAMP[0] * 6.0) / 65535 * 255 + 0.5).tolist()


# Palettes.


def _palette(make_dicom: MakeDicom, syntax: str, bits: int, data: bytes | list[bytes], *, segmented: bool = False,
             first: int = 0, length: int = 256, pixels: Array | None = None, **more: Any) -> bytes:  # fmt: skip
    tables = data if isinstance(data, list) else [data] * 3
    elements: dict[str, Any] = {}
    for colour, table in zip(COLOURS, tables, strict=True):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [length % 65536, first, bits]
        elements[f"{'Segmented' * segmented}{colour}PaletteColorLookupTableData"] = table
    values = np.tile(np.arange(256, dtype=np.uint8), (2, 1)) if pixels is None else pixels
    return make_dicom(values, syntax=syntax, PhotometricInterpretation="PALETTE COLOR", **elements, **more)


@SYNTAXES
@pytest.mark.parametrize("kind", ["bytes", "low byte", "high byte", "both bytes", "16 bits", "16 bits, low"])
def test_palette_entries(make_dicom: MakeDicom, syntax: str, kind: str) -> None:
    entries = 255 - np.arange(256)
    order = ">" if syntax == BIG_ENDIAN else "<"
    pairs = _bytes(np.frombuffer(entries.astype("u1").tobytes(), "<u2"), order)
    words = {"low byte": entries, "high byte": entries << 8, "both bytes": entries * 257, "16 bits": entries << 8,
             "16 bits, low": entries}  # fmt: skip
    data = pairs if kind == "bytes" else _bytes(words[kind], order)
    assert _row(_palette(make_dicom, syntax, 16 if "16" in kind else 8, data)) == entries.tolist()


@SYNTAXES
def test_a_palette_of_an_odd_number_of_entries(make_dicom: MakeDicom, syntax: str) -> None:
    order = ">" if syntax == BIG_ENDIAN else "<"
    entries = np.arange(101, dtype=np.uint8) * 2
    data = _bytes(np.frombuffer(entries.tobytes() + b"\0", "<u2"), order)
    shown = _row(_palette(make_dicom, syntax, 8, data, first=50, length=101))
    assert shown == entries[np.clip(np.arange(256) - 50, 0, 100)].tolist()


@SYNTAXES
def test_a_palette_with_one_colour_in_words(make_dicom: MakeDicom, syntax: str) -> None:
    order = ">" if syntax == BIG_ENDIAN else "<"
    entries = np.arange(256)
    pairs = _bytes(np.frombuffer(entries.astype("u1").tobytes(), "<u2"), order)
    tables = [_bytes(entries, order), pairs, _bytes(entries << 8, order)]
    assert _row(_palette(make_dicom, syntax, 8, tables)) == entries.tolist()


@SYNTAXES
def test_a_segmented_palette(make_dicom: MakeDicom, syntax: str) -> None:
    order = ">" if syntax == BIG_ENDIAN else "<"
    # One entry of 0, then a line of 255 more up to 255 << 8.
    data = _bytes(np.array([0, 1, 0, 1, 255, 255 << 8]), order)
    assert _row(_palette(make_dicom, syntax, 16, data, segmented=True)) == list(range(256))


# Byte order.


@pytest.mark.parametrize("shape", [(1, 9), (3, 3), (1, 9, 3), (5, 5)])
@pytest.mark.parametrize("syntax", [BIG_ENDIAN, None])
def test_bytes_in_big_endian_words(make_dicom: MakeDicom, shape: tuple[int, ...], syntax: str | None) -> None:
    values = np.repeat(np.arange(9 if shape[:2] != (5, 5) else 25, dtype=np.uint8)[:, None] * 10, 3, 1)
    values = (values if len(shape) == 3 else values[:, 0]).reshape(shape)
    expected = np.asarray(read_image(make_dicom(values)))
    content = make_dicom(values, syntax=BIG_ENDIAN)
    plain = values.tobytes() + b"\0" * (values.size % 2)
    at = content.rindex(b"\x7f\xe0\x00\x10OB")
    swapped = np.frombuffer(plain, "<u2").astype(">u2").tobytes()
    content = content[: at + 4] + b"OW" + content[at + 6 : at + 12] + swapped
    if syntax is None:
        content = content.replace(
            b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.2\0", b"\x02\0\x12\0UI\x14\x001.2.840.10008.1.2.2\0"
        )
    np.testing.assert_array_equal(np.asarray(read_image(content)), expected)


# Padding.


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [-2000, -1, -2048])
def test_padding_of_signed_pixels(make_dicom: MakeDicom, bits: int, vr: str, photometric: str, padding: int) -> None:
    values = (RAMP % 2000).astype(np.int16)
    values[:, :300] = padding
    elements = {"BitsStored": bits, "PhotometricInterpretation": photometric}
    plain = _with_padding(make_dicom(values, **elements), "SS", padding)
    shown = np.asarray(read_image(_with_padding(make_dicom(values, **elements), vr, padding)))
    assert not shown[:, :300].any()
    assert {shown[0, 300:].min(), shown[0, 300:].max()} == {0, 255}
    np.testing.assert_array_equal(shown, np.asarray(read_image(plain)))


def _with_padding(content: bytes, vr: str, *values: int) -> bytes:
    """A file with Pixel Padding Value (and Pixel Padding Range Limit) before its pixels."""
    at = content.index(b"\xe0\x7f\x10\0")
    elements = b""
    for element, value in zip((0x20, 0x21), values, strict=False):
        elements += b"\x28\0" + bytes([element, 1]) + vr.encode() + b"\2\0" + (value % 65536).to_bytes(2, "little")
    return content[:at] + elements + content[at:]


@pytest.mark.parametrize("vr", ["US", "SS"])
def test_a_range_of_padding(make_dicom: MakeDicom, vr: str) -> None:
    values = (RAMP % 2000).astype(np.int16)
    values[:, :300] = np.arange(-2000, -1700)
    shown = np.asarray(read_image(_with_padding(make_dicom(values), vr, -2000, -1701)))
    assert not shown[:, :300].any()
    assert shown.max() == 255


def test_padding_of_whole_words_keeps_white(make_dicom: MakeDicom) -> None:
    values = RAMP.copy()
    values[:, :300] = 65535  # beyond the 12 bits stored
    shown = np.asarray(read_image(_with_padding(make_dicom(values, BitsStored=12), "US", 65535)))
    assert not shown[:, :300].any()
    assert shown[0, -1] == 255


def test_padding_of_8_bits(make_dicom: MakeDicom) -> None:
    values = np.tile(np.arange(128, dtype=np.int8), (2, 1))
    values[:, :30] = -100
    for value in (-100, 156, 65436):
        shown = np.asarray(read_image(_with_padding(make_dicom(values), "US", value)))
        assert not shown[:, :30].any(), value
