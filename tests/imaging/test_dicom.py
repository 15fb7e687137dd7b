"""DICOM files of every kind against the pixel values that they must give."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filereader import dcmread
from pydicom.uid import JPEG2000Lossless, RLELossless

from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.dicom.facts import read_dicom_facts
from emrrg_cli.imaging.notes import INVERTED, image_notes, looks_inverted
from emrrg_cli.imaging.read import read_image

MakeDicom = Callable[..., bytes]

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
UNSUPPORTED = "DICOM compression not supported"


def _read(data: bytes) -> np.ndarray[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(data)
    assert image.mode == "L"
    return np.asarray(image)


def _reason(data: bytes, **options: Any) -> tuple[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as error:
            read_image(data, **options)
    assert "\n" not in str(error.value)
    return error.value.reason, error.value.detail


def _film(bits: int, signed: bool = False) -> np.ndarray[Any, Any]:
    """All of a type's range, `[30, 40]`."""
    values = np.linspace(0, 2**bits - 1, 1200).round().reshape(30, 40).astype(np.int64)
    values -= 2 ** (bits - 1) if signed else 0
    return values.astype({False: {8: "u1"}, True: {8: "i1"}}[signed].get(bits, "i2" if signed else "u2"))


def _exact(values: np.ndarray[Any, Any], center: float, width: float) -> np.ndarray[Any, Any]:
    shown = np.clip((values.astype(np.float64) - center) / width + 0.5, 0, 1)
    return np.floor(shown * 255 + 0.5).astype(np.uint8)


# How values are stored.


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
def test_uncompressed(make_dicom: MakeDicom, bits: int, signed: bool, syntax: str) -> None:
    film = _film(bits, signed)
    window = {
        "WindowCenter": 0 if signed else 2 ** (bits - 1),
        "WindowWidth": 2**bits,
        "VOILUTFunction": "LINEAR_EXACT",
    }
    data = make_dicom(film, syntax=syntax, BitsStored=bits, **window)
    np.testing.assert_array_equal(_read(data), _exact(film, window["WindowCenter"], window["WindowWidth"]))


def test_bits_beside_the_stored_ones_are_not_part_of_the_value(make_dicom: MakeDicom) -> None:
    film = _film(12)
    plain = _read(make_dicom(film, BitsStored=12))
    overlay = film | np.uint16(0xF000)  # old files keep an overlay in the bits above
    np.testing.assert_array_equal(_read(make_dicom(overlay, BitsStored=12)), plain)
    shifted = (film << 4) | np.uint16(0x000F)  # and some keep their values in the upper ones
    np.testing.assert_array_equal(_read(make_dicom(shifted, BitsStored=12, HighBit=15)), plain)
    signed = _film(12, signed=True)
    np.testing.assert_array_equal(
        _read(make_dicom((signed & np.int16(0x0FFF)), BitsStored=12)), _read(make_dicom(signed, BitsStored=12))
    )


def test_32_bits(make_dicom: MakeDicom) -> None:
    film = (_film(16).astype(np.uint32) << 15) + 7
    shown = _read(make_dicom(film))
    expected = _exact(film, film.max() / 2, film.max())
    assert np.abs(shown.astype(int) - expected).max() <= 1


def _by_gdcm(data: bytes, syntax: int, folder: Path) -> bytes:
    import gdcm

    (folder / "in.dcm").write_bytes(data)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(folder / "in.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(folder / "out.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "out.dcm").read_bytes()


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize(
    "name", ["JPEGLosslessProcess14_1", "JPEGLosslessProcess14", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"]
)
def test_lossless_compression_gives_the_same_image(
    make_dicom: MakeDicom, name: str, bits: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import gdcm

    film = make_dicom(_film(bits), BitsStored=bits, PhotometricInterpretation="MONOCHROME1")
    compressed = _by_gdcm(film, getattr(gdcm.TransferSyntax, name), tmp_path)
    capfd.readouterr()
    np.testing.assert_array_equal(_read(compressed), _read(film))
    assert capfd.readouterr().err == ""


def test_run_lengths_written_by_pydicom(make_dicom: MakeDicom) -> None:
    film = np.tile(_film(12, signed=True), (3, 2))
    data = make_dicom(film, BitsStored=12)
    dataset = dcmread(io.BytesIO(data))
    dataset.compress(RLELossless)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    np.testing.assert_array_equal(_read(buffer.getvalue()), _read(data))


def test_signed_jpeg_2000_written_by_imagecodecs(make_dicom: MakeDicom) -> None:
    film = np.tile(_film(12, signed=True), (3, 2))
    data = make_dicom(film, BitsStored=12)
    dataset = dcmread(io.BytesIO(data))
    codestream = imagecodecs.jpeg2k_encode(film, codecformat="j2k", reversible=True, level=0, bitspersample=12)
    dataset.PixelData = encapsulate([codestream])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    np.testing.assert_array_equal(_read(buffer.getvalue()), _read(data))


def test_jpeg_baseline(make_jpeg_dicom: MakeDicom, chest: np.ndarray[Any, Any]) -> None:
    assert np.abs(_read(make_jpeg_dicom(chest)).astype(int) - chest).max() < 12
    inverted = _read(make_jpeg_dicom(chest, PhotometricInterpretation="MONOCHROME1"))
    assert np.abs(255 - inverted.astype(int) - chest).max() < 12


def test_jpeg_extended_of_12_bits(capfd: pytest.CaptureFixture[str]) -> None:
    path = get_testdata_file("JPGExtended.dcm", download=False)  # comes with pydicom
    shown = np.asarray(read_image(str(path)))
    assert shown.shape == (1024, 256)
    # The values at these places are known from other decoders: 244 and 95.
    assert shown[420, 140] > shown[230, 120] > 60
    assert capfd.readouterr().err == ""


def test_a_jpeg_cut_by_a_few_bytes_is_read_and_noted(make_jpeg_dicom: MakeDicom, chest: np.ndarray[Any, Any]) -> None:
    image = read_image(make_jpeg_dicom(chest, cut=8))
    assert np.abs(np.asarray(image)[:128].astype(int) - chest[:128]).max() < 12
    assert image_notes(image)[0].startswith("truncated: 9")
    assert _reason(make_jpeg_dicom(chest, cut=2500))[0] == "truncated image"


# How values become grey.


def _grey(make_dicom: MakeDicom, values: list[int], **elements: Any) -> list[int]:
    return list(_read(make_dicom(np.array([values], np.uint16), BitsStored=12, **elements)).ravel())


def test_monochrome1_is_inverted(make_dicom: MakeDicom) -> None:
    film = _film(12)
    shown = _read(make_dicom(film, BitsStored=12))
    inverted = _read(make_dicom(film, BitsStored=12, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(255 - inverted.astype(int), shown, atol=1)
    assert inverted[0, 0] == 255


def test_a_narrow_window_ends_half_a_value_from_its_center(make_dicom: MakeDicom) -> None:
    # LINEAR, PS3.3 C.11.2.1.2: (x - (c - 0.5)) / (w - 1) + 0.5. In a wide window the halves do not show.
    assert _grey(make_dicom, [0, 1, 2, 3], WindowCenter=2, WindowWidth=3) == [0, 64, 191, 255]


def test_windows(make_dicom: MakeDicom) -> None:
    values = [0, 1000, 1500, 2000, 4000]
    # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5), here (x - 999.5) / 1001.
    linear = [0, 0, 128, 255, 255]
    assert _grey(make_dicom, values, WindowCenter=1500, WindowWidth=1002) == linear
    assert _grey(make_dicom, values, WindowCenter=[1500, 7], WindowWidth=[1002, 7]) == linear  # the first of several
    assert _grey(make_dicom, values, WindowCenter=1500, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT") == linear
    sigmoid = [round(255 / (1 + np.exp(-4 * (value - 1500) / 1000))) for value in values]
    assert _grey(make_dicom, values, WindowCenter=1500, WindowWidth=1000, VOILUTFunction="SIGMOID") == sigmoid


def test_rescale_comes_before_the_window(make_dicom: MakeDicom) -> None:
    window = {"WindowCenter": 0, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}
    shown = _grey(make_dicom, [0, 250, 500, 1000], RescaleSlope=2, RescaleIntercept=-1000, **window)
    assert shown == [0, 0, 128, 255]
    # A slope of 0 would leave nothing, and is not believed.
    assert _grey(make_dicom, [0, 500], RescaleSlope=0, RescaleIntercept=0, **window) == [128, 255]


def test_narrow_windows_of_rescaled_values(make_dicom: MakeDicom) -> None:
    shown = _grey(make_dicom, [0, 1024, 2048, 4095], RescaleSlope=1 / 4096, WindowCenter=0.25, WindowWidth=0.5)
    assert shown == [0, 128, 255, 255]


@pytest.mark.parametrize(
    "elements",
    [{}, {"WindowCenter": 1500, "WindowWidth": 0}, {"WindowCenter": 1500, "WindowWidth": -5}, {"WindowCenter": 1500}],
)
def test_without_a_usable_window_the_percentiles_are_the_ends(make_dicom: MakeDicom, elements: dict[str, Any]) -> None:
    film = np.linspace(1000, 2000, 10_000).round().astype(np.uint16).reshape(100, 100)
    film[0, :5] = 4095  # a marker
    shown = _read(make_dicom(film, BitsStored=12, **elements))
    assert (shown[0, 0], shown[-1, -1]) == (255, 255)
    assert shown[0, 5] == 0
    assert abs(int(shown[50, 50]) - 128) <= 1
    assert not np.any(_read(make_dicom(np.full((4, 4), 700, np.uint16), BitsStored=12)))  # a constant is black


def test_a_window_outside_the_values_is_ignored_and_noted(make_dicom: MakeDicom) -> None:
    film = _film(12)
    image = read_image(make_dicom(film, BitsStored=12, WindowCenter=30_000, WindowWidth=100))
    np.testing.assert_array_equal(np.asarray(image), _read(make_dicom(film, BitsStored=12)))
    assert "window ignored: it shows nothing of the image" in image_notes(image)


def test_8_bits_keep_their_values(make_dicom: MakeDicom) -> None:
    film = np.array([[10, 100, 200]], np.uint8)
    assert _read(make_dicom(film)).tolist() == film.tolist()
    assert _read(make_dicom(film, PhotometricInterpretation="MONOCHROME1")).tolist() == (255 - film).tolist()
    assert _read(make_dicom(film, RescaleSlope=1, RescaleIntercept=0)).tolist() == film.tolist()
    assert _read(make_dicom(np.array([[-128, 0, 127]], np.int8))).tolist() == [[0, 128, 255]]


def _lut(first: int, entries: list[int], bits: int, *, as_bytes: bool = False) -> list[Dataset]:
    item = Dataset()
    item.add_new(0x00283002, "US", [len(entries), first, bits])
    item.add_new(0x00283006, *(("OW", np.array(entries, "<u2").tobytes()) if as_bytes else ("US", entries)))
    return [item]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_look_up_tables(make_dicom: MakeDicom, as_bytes: bool) -> None:
    voi = _lut(100, [0, 51, 102, 255], 8, as_bytes=as_bytes)
    shown = _grey(make_dicom, [0, 100, 101, 102, 103, 4000], VOILUTSequence=voi, WindowCenter=1, WindowWidth=1)
    assert shown == [0, 0, 51, 102, 255, 255]  # before the window, ends held
    modality = _lut(0, [0, 1000, 2000], 16, as_bytes=as_bytes)
    window = {"WindowCenter": 1000, "WindowWidth": 2000, "VOILUTFunction": "LINEAR_EXACT"}
    assert _grey(make_dicom, [0, 1, 2, 3], ModalityLUTSequence=modality, RescaleSlope=9, **window) == [0, 128, 255, 255]


def test_a_table_below_its_bits_is_white_at_its_top(make_dicom: MakeDicom) -> None:
    voi = _lut(0, [0, 2048, 4095], 16)
    assert _grey(make_dicom, [0, 1, 2], VOILUTSequence=voi) == [0, 128, 255]


def test_broken_tables_fall_back_to_the_window(make_dicom: MakeDicom) -> None:
    empty = [Dataset()]
    window = {"WindowCenter": 1000, "WindowWidth": 2000, "VOILUTFunction": "LINEAR_EXACT"}
    assert _grey(make_dicom, [0, 1000, 2000], VOILUTSequence=empty, ModalityLUTSequence=empty, **window) == [
        0,
        128,
        255,
    ]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_has_no_effect(make_dicom: MakeDicom, photometric: str) -> None:
    film = np.linspace(1000, 2000, 10_000).round().astype(np.uint16).reshape(100, 100)
    framed = np.pad(film, 20, constant_values=4000)
    elements = {"BitsStored": 12, "PhotometricInterpretation": photometric}
    shown = _read(make_dicom(framed, PixelPaddingValue=4000, **elements))
    np.testing.assert_array_equal(shown[20:-20, 20:-20], _read(make_dicom(film, **elements)))
    assert shown[:20].max() == 0
    framed[:10] = 3500
    ranged = _read(make_dicom(framed, PixelPaddingValue=3500, PixelPaddingRangeLimit=4000, **elements))
    np.testing.assert_array_equal(ranged, shown)
    assert not np.any(_read(make_dicom(np.full((4, 4), 9, np.uint16), PixelPaddingValue=9)))


def test_colour_becomes_luma(make_dicom: MakeDicom) -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    assert _read(make_dicom(red)).tolist() == [[76, 76], [76, 76]]
    planes = np.ascontiguousarray(red.transpose(2, 0, 1)).tobytes()
    layout = {"Rows": 2, "Columns": 2, "SamplesPerPixel": 3, "BitsAllocated": 8, "BitsStored": 8}
    layout |= {"PixelRepresentation": 0, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 1}
    assert _read(make_dicom(planes, **layout)).tolist() == [[76, 76], [76, 76]]
    wide = red.astype(np.uint16) << 8
    assert _read(make_dicom(wide)).tolist() == [[76, 76], [76, 76]]
    ybr = np.asarray(Image.fromarray(red).convert("YCbCr"))
    assert abs(int(_read(make_dicom(ybr, PhotometricInterpretation="YBR_FULL"))[0, 0]) - 76) <= 1


def test_palette(make_dicom: MakeDicom) -> None:
    levels = {"Red": [0, 65_535], "Green": [0, 65_535], "Blue": [0, 65_535]}
    table: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, entries in levels.items():
        table[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        table[f"{colour}PaletteColorLookupTableData"] = np.array(entries, "<u2").tobytes()
    assert _read(make_dicom(np.array([[0, 1]], np.uint8), **table)).tolist() == [[0, 255]]


# What is found and what is refused.


def test_the_content_decides_the_kind_not_the_name(make_dicom: MakeDicom, tmp_path: Path) -> None:
    film = _film(8)
    for name, data in (
        ("film", make_dicom(film)),
        ("film.png", make_dicom(film)),
        ("old.dcm", make_dicom(film, preamble=False)),
        ("OLD.IMA", make_dicom(film, preamble=False)),
    ):
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name)), film)
    Image.fromarray(film).save(tmp_path / "png.png")
    (tmp_path / "png.png").rename(tmp_path / "png.dcm")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "png.dcm")), film)
    assert _reason(make_dicom(film, preamble=False))[0] == "not an image"  # without a name nothing speaks for DICOM


def test_missing_elements_that_have_a_usual_value(make_dicom: MakeDicom) -> None:
    film = _film(8)
    drop = ("BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation", "Modality")
    image = read_image(make_dicom(film, drop=drop))
    np.testing.assert_array_equal(np.asarray(image), film)
    assert "no photometric interpretation: read as MONOCHROME2" in image_notes(image)


def test_without_a_transfer_syntax(make_dicom: MakeDicom) -> None:
    film = _film(12)
    image = read_image(make_dicom(film, syntax=None, BitsStored=12))
    np.testing.assert_array_equal(np.asarray(image), _read(make_dicom(film, BitsStored=12)))
    assert "no transfer syntax: read as Explicit VR Little Endian" in image_notes(image)


_SHAPE = {"Rows": 30, "Columns": 40, "BitsAllocated": 8, "BitsStored": 8, "PixelRepresentation": 0}
_RLE = b"\1\0\0\0\x40\0\0\0" + bytes(56) + b"\x81\x07" * 10  # one segment


def test_bits_stored_that_are_absent_follow_the_high_bit(make_dicom: MakeDicom) -> None:
    whole = make_dicom(_film(12), BitsStored=12)
    assert _read(make_dicom(_film(12), BitsStored=12, drop=("BitsStored",))).tolist() == _read(whole).tolist()


@pytest.mark.parametrize(
    ("pixels", "elements", "reason", "detail"),
    [
        (_film(8), {"NumberOfFrames": 12}, "multi-frame DICOM", "12 frames"),
        (None, _SHAPE, "no pixel data", "the file ends before the pixels, or they were removed"),
        (None, _SHAPE | {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "no pixel data", "Basic Text SR"),
        (None, _SHAPE | {"FloatPixelData": bytes(4800)}, "no pixel data", "floating-point pixels are not supported"),
        (_film(8), {"drop": ("Rows",)}, "broken image", "no Rows"),
        (_film(8), {"drop": ("BitsAllocated",)}, "broken image", "no BitsAllocated"),
        (_film(8), {"Columns": 0}, "broken image", "0 x 30"),
        (_film(8), {"Rows": 60_000, "Columns": 60_000}, "too many pixels", "3,600,000,000"),
        (_film(8), {"Rows": 3000}, "truncated image", "1,200 of 120,000 bytes"),
        (_film(8), {"BitsAllocated": 12}, "broken image", "in 12 bits"),
        (_film(8), {"BitsStored": 12}, "broken image", "12 bits"),
        (_film(8), {"SamplesPerPixel": 2}, "broken image", "2 samples"),
        (_film(8), {"syntax": "1.2.840.10008.1.2.4.102", "compressed": True}, UNSUPPORTED, "MPEG"),
        (_film(8), {"syntax": None, "compressed": True}, UNSUPPORTED, "without a transfer syntax"),
        ([b"no JPEG at all.."], _SHAPE | {"syntax": "1.2.840.10008.1.2.4.50"}, "broken image", "no JPEG Baseline"),
        ([b"no JPEG at all.."], _SHAPE | {"syntax": "1.2.840.10008.1.2.4.90"}, "broken image", "no JPEG 2000"),
        ([b"\x01\0\0\0" + b"\0" * 60], _SHAPE | {"syntax": "1.2.840.10008.1.2.5"}, "broken image", ""),
        ([_RLE, _RLE], _SHAPE | {"syntax": "1.2.840.10008.1.2.5", "cut": 40}, "truncated image", "end too early"),
    ],
)  # fmt: skip
def test_refused(make_dicom: MakeDicom, pixels: Any, elements: dict[str, Any], reason: str, detail: str) -> None:
    elements = dict(elements)
    if elements.pop("compressed", False):
        pixels, elements = [b"\xff\xd8\xff\xd9"], _SHAPE | elements
    cut = elements.pop("cut", 0)
    data = make_dicom(pixels, **elements)
    found = _reason(data[: len(data) - cut])
    assert found[0] == reason
    assert detail in found[1]


def test_lengths_of_pixels_that_fit_no_encoding(make_dicom: MakeDicom) -> None:
    data = make_dicom(_film(8))
    at = data.rindex(b"\xe0\x7f\x10\x00OB") + 8
    undefined = data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]
    assert _reason(undefined) == ("broken image", "compressed pixels under Explicit VR Little Endian")
    item = b"\xfe\xff\x00\xe0\x04\0\0\0"  # of the offset table, and of the data
    data = make_dicom([b"1234"], syntax="1.2.840.10008.1.2.4.50", **_SHAPE)
    assert _reason(data[: data.index(item) + 12]) == ("truncated image", "no compressed data")
    assert _reason(data.replace(item, b"abcdefgh")) == ("broken image", "compressed pixels are not in fragments")


def test_the_size_of_compressed_data_is_checked_first(
    make_dicom: MakeDicom, make_jpeg_dicom: MakeDicom, chest: np.ndarray[Any, Any]
) -> None:
    detail = "header says 40 x 30 x 1, compressed data 160 x 140 x 1"
    assert _reason(make_jpeg_dicom(chest, Rows=30, Columns=40)) == ("broken image", detail)
    assert _reason(make_jpeg_dicom(chest), max_pixels=1000)[0] == "too many pixels"
    # A JPEG 2000 of 60,000 x 60,000 pixels in a file that says 30 x 40.
    size = b"\xff\x4f\xff\x51\x00\x29\x00\x00" + b"\x00\x00\xea\x60" * 2 + b"\0" * 8 + b"\x00\x00\xea\x60" * 2
    codestream = size + b"\0" * 8 + b"\x00\x01\x07\x01\x01\xff\xd9"
    data = make_dicom([codestream + b"\0" * (len(codestream) % 2)], syntax=JPEG2000Lossless, **_SHAPE)
    assert _reason(data) == ("broken image", "header says 40 x 30 x 1, compressed data 60,000 x 60,000 x 1")


def test_deflated_data_are_inflated_up_to_the_limit(make_dicom: MakeDicom) -> None:
    data = make_dicom(np.zeros((3000, 3000), np.uint8), syntax=DEFLATED)
    assert len(data) < 100_000
    assert not _read(data).any()
    assert _reason(data, max_pixels=10)[0] == "too many pixels"


def test_every_cut_is_refused_with_a_reason(make_dicom: MakeDicom, tmp_path: Path) -> None:
    import gdcm

    plain = make_dicom(_film(12), BitsStored=12)
    for data in (plain, _by_gdcm(plain, gdcm.TransferSyntax.JPEGLosslessProcess14_1, tmp_path)):
        for length in [*range(1, 600, 13), *range(600, len(data) - 12, 131)]:
            assert _reason(data[:length])[0] in {
                "not an image", "broken image", "truncated image", "no pixel data", "DICOM compression not supported",
            }  # fmt: skip


def test_wrong_lengths_take_no_memory(make_dicom: MakeDicom) -> None:
    data = bytearray(make_dicom(_film(8)))
    at = data.rindex(b"\xe0\x7f\x10\x00OB") + 8
    data[at : at + 4] = b"\xfe\xff\xff\xff"  # 4 GB of pixels
    np.testing.assert_array_equal(_read(bytes(data)), _film(8))
    at = data.index(b"CHEST")
    data[at - 2 : at] = b"\xf0\xff"
    assert _reason(bytes(data))[0] in {"truncated image", "no pixel data", "broken image"}


def test_sequences_nested_too_deep(make_dicom: MakeDicom) -> None:
    data = make_dicom(_film(8))
    at = data.index(b"\x10\x00\x20\x00LO")  # Patient ID
    nested = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5000
    assert _reason(data[:at] + nested + data[at:])[0] in {"broken image", "no pixel data", "truncated image"}


def test_too_large_a_file(make_dicom: MakeDicom, tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(make_dicom(_film(8)))
    os.truncate(path, 200_000_000)  # sparse
    with pytest.raises(ImageError, match="file too large"):
        read_image(path, max_pixels=10_000)
    np.testing.assert_array_equal(np.asarray(read_image(path)), _film(8))  # trailing bytes do not matter


# Facts and notes.


def test_facts(make_dicom: MakeDicom, tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(make_dicom(_film(8), StudyInstanceUID="1.2.3", ViewPosition="LL", BurnedInAnnotation="YES"))
    facts = read_dicom_facts(path)
    assert (facts.study_uid, facts.patient_id, facts.view, facts.is_lateral) == ("1.2.3", "P1", "LATERAL", True)
    assert (facts.body_part, facts.modality, facts.photometric) == ("CHEST", "CR", "MONOCHROME2")
    assert facts.burned_in
    assert facts.notes == ("annotation burned into the pixels",)
    path.write_bytes(b"a text")
    with pytest.raises(ImageError, match="not an image"):
        read_dicom_facts(path)


def test_notes(make_dicom: MakeDicom) -> None:
    def notes(**elements: Any) -> tuple[str, ...]:
        return image_notes(read_image(make_dicom(_film(8), **elements)))

    assert notes() == ()
    assert notes(BodyPartExamined="KNEE") == ("not chest: body part KNEE",)
    assert notes(BodyPartExamined="THORAX", PatientOrientation=["L", "F"]) == ()
    assert notes(Modality="CT") == ("not a radiograph: modality CT",)
    turned = "may be turned or mirrored: patient orientation"
    assert notes(PatientOrientation=["R", "F"]) == (f"{turned} R\\F",)
    assert notes(PatientOrientation=["L", "H"]) == (f"{turned} L\\H",)
    assert notes(PatientOrientation=["A", "F"], ViewPosition="LL") == ()


def test_an_inverted_film_is_noted_and_not_changed(make_dicom: MakeDicom, chest: np.ndarray[Any, Any]) -> None:
    wrong = read_image(make_dicom(chest, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(np.asarray(wrong), 255 - chest)
    assert image_notes(wrong) == (INVERTED,)
    assert image_notes(read_image(make_dicom(chest))) == ()
    right = make_dicom(255 - chest, PhotometricInterpretation="MONOCHROME1")
    assert image_notes(read_image(right)) == ()
    lateral = read_image(make_dicom(255 - chest, ViewPosition="LATERAL"))
    assert image_notes(lateral) == ()
    assert looks_inverted(Image.fromarray(255 - chest))
    assert not looks_inverted(Image.new("L", (50, 50), 255))


def test_plain_images_need_no_pydicom() -> None:
    code = (
        "import io, sys; from PIL import Image; from emrrg_cli.imaging.read import read_image; b = io.BytesIO();"
        "Image.new('L', (4, 4)).save(b, 'PNG'); read_image(b.getvalue()); print('pydicom' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_real_files(shared_data: Path) -> None:
    read: dict[str, Image.Image] = {}
    reasons: dict[str, str] = {}
    for path in sorted((shared_data / "dicom").glob("*.dcm")):
        try:
            read[path.name] = read_image(path)
        except ImageError as error:
            reasons[path.name] = error.reason
    assert reasons == {"chrJapMulti.dcm": "no pixel data"}
    # 15-bit MONOCHROME1, lossless and lossy: lungs darker than mediastinum and abdomen.
    for name in ("RG1_J2KR.dcm", "RG1_J2KI.dcm"):
        film = np.asarray(read[name].resize((64, 64), Image.Resampling.BOX)).astype(int)
        lungs, mediastinum = film[14:26, [*range(14, 22), *range(42, 50)]], film[22:48, 28:36]
        assert np.median(lungs) < np.median(mediastinum) - 50
        assert image_notes(read[name]) == ()
    wrong, right = read["Fake_MONOHR1.dcm"], read["1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"]
    assert image_notes(wrong) == (INVERTED,)
    assert image_notes(right) == ()
    assert np.abs(255 - np.asarray(wrong).astype(int) - np.asarray(right)).max() <= 1
    assert image_notes(read["RG3_J2KI.dcm"]) == ("not chest: body part EXTREMITY",)


def test_real_films_are_not_reported_as_inverted(shared_data: Path) -> None:
    files = sorted(
        f for name in ("nih_fullres", "iu_sample", "nih_64px") for f in (shared_data / name).glob("images/*")
    )
    assert sum(looks_inverted(read_image(path)) for path in files[::10]) <= 1


def test_patient_facts_are_read(make_dicom: MakeDicom, tmp_path: Path, chest: Any) -> None:
    def facts(**elements: Any) -> Any:
        (tmp_path / "film.dcm").write_bytes(make_dicom(chest, **elements))
        return read_dicom_facts(tmp_path / "film.dcm")

    bare = facts()
    assert (bare.age, bare.sex, bare.indication) == ("", "", "")
    found = facts(PatientAge="058Y", PatientSex="F", AdmittingDiagnosesDescription=["Fever", "Cough"])
    assert (found.age, found.sex, found.indication) == ("058Y", "F", "Fever")
    assert facts(ReasonForStudy="Fall", AdmittingDiagnosesDescription="Fever").indication == "Fall"
    request = Dataset()
    request.ReasonForTheRequestedProcedure = "Dyspnoea"
    assert facts(RequestAttributesSequence=[request], ReasonForStudy="Fall").indication == "Dyspnoea"
    assert facts(RequestAttributesSequence=[]).indication == ""
