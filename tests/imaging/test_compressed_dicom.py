"""Compressed DICOM: damaged data, data unlike their header, bits that are no pixels, and parts that nobody needs."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagecodecs import htj2k_encode, jpeg2k_encode, jpeg_encode, jpegls_encode
from PIL import Image

from emrrg_cli.app import main
from emrrg_cli.datasets.manifest import read_manifest
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.dicom.facts import read_dicom_facts
from emrrg_cli.imaging.dicom.rle import runs_exceed
from emrrg_cli.imaging.notes import image_notes
from emrrg_cli.imaging.read import read_image

MakeDicom = Callable[..., bytes]
Array = np.ndarray[Any, Any]

NATIVE, BIG_ENDIAN, RLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"
DEFLATED = "1.2.840.10008.1.2.1.99"
BASELINE, LOSSLESS, LS, J2K, HTJ2K = (f"1.2.840.10008.1.2.4.{n}" for n in (50, 70, 80, 90, 201))

RAMP = np.tile(np.linspace(0, 4095, 256).round().astype(np.uint16), (16, 1))
GREY = (RAMP >> 4).astype(np.uint8)
SHOWN = np.floor(np.linspace(0, 4095, 256).round() / 4095 * 255 + 0.5)


def _encode(values: Array, syntax: str) -> bytes:
    bits = 8 * values.itemsize
    words = np.ascontiguousarray(values.view(values.dtype.str.replace("i", "u")))
    if syntax == LOSSLESS:
        return bytes(jpeg_encode(words, bitspersample=bits, lossless=True))
    if syntax == LS:
        return bytes(jpegls_encode(words))
    return bytes(htj2k_encode(words) if syntax == HTJ2K else jpeg2k_encode(words, level=0, codecformat="j2k"))


def _layout(values: Array, stored: int, **elements: Any) -> dict[str, Any]:
    allocated = 8 * values.itemsize
    layout = {
        "Rows": values.shape[0],
        "Columns": values.shape[1],
        "BitsAllocated": allocated,
        "BitsStored": stored,
        "PixelRepresentation": int(values.dtype.kind == "i"),
    }
    if values.ndim == 3:
        layout |= {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    return layout | elements


def _dicom(make_dicom: MakeDicom, data: bytes, values: Array, stored: int, syntax: str, **elements: Any) -> bytes:
    even = data + b"\0" * (len(data) % 2)
    return make_dicom([even], syntax=syntax, **_layout(values, stored, **elements))


def _row(data: bytes) -> list[int]:
    return np.asarray(read_image(data))[8].tolist()


def _refused(data: bytes) -> tuple[str, str]:
    with pytest.raises(ImageError) as error:
        read_image(data)
    return error.value.reason, error.value.detail


# Damage.


def _outcome(data: bytes) -> tuple[str, str]:
    try:
        return "read", str(read_image(data).size)
    except ImageError as error:
        return error.reason, error.detail


@pytest.mark.parametrize("syntax", [LOSSLESS, LS, J2K, HTJ2K])
def test_damage_affects_only_one_file(make_dicom: MakeDicom, syntax: str) -> None:
    rng = np.random.default_rng(0)
    whole = bytearray(_encode(RAMP, syntax))
    for _ in range(60):
        data = bytearray(whole)
        at = int(rng.integers(2, min(len(data), 160)))
        data[at] = int(rng.integers(256))
        reason, detail = _outcome(_dicom(make_dicom, bytes(data), RAMP, 12, syntax))
        assert reason in {"read", "broken image", "truncated image"}
        assert detail
        assert not detail.endswith(":")
    assert _row(_dicom(make_dicom, bytes(whole), RAMP, 12, syntax)) == SHOWN.tolist()


def test_preprocess_counts_damaged_films(make_dicom: MakeDicom, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for number in range(3):
        values = np.roll(RAMP, number * 20, 1)
        content = _dicom(make_dicom, _encode(values, LS), values, 12, LS, StudyInstanceUID=f"1.2.{number}")
        (films / f"good{number}.dcm").write_bytes(content)
    broken = bytearray(_encode(RAMP, LOSSLESS))
    broken[broken.index(b"\xff\xc4") + 1] = 0
    (films / "bad.dcm").write_bytes(_dicom(make_dicom, bytes(broken), RAMP, 12, LOSSLESS, StudyInstanceUID="1.3"))
    assert main(["preprocess", "folder", str(films), str(tmp_path / "out"), "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["studies_written"], manifest["skipped"]["broken image"]["count"]) == (3, 1)
    assert manifest["skipped"]["broken image"]["examples"][0]["path"] == "bad.dcm"


# Bits.


@pytest.mark.parametrize("syntax", [NATIVE, BIG_ENDIAN, RLE, LOSSLESS, LS, J2K, HTJ2K])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("stored", "bit"), [(12, 12), (12, 15), (10, 13)])
def test_bits_above_the_stored_ones(make_dicom: MakeDicom, syntax: str, signed: bool, stored: int, bit: int) -> None:
    values = RAMP >> (12 - stored)
    if signed:
        values = (values.astype(int) - 2 ** (stored - 1)).astype(np.int16) & (2**stored - 1)
    values = values.astype(np.uint16)
    values[4:12, 20:200:3] |= 1 << bit
    words = values.view(np.int16) if signed else values
    layout = {"BitsStored": stored, "HighBit": stored - 1}
    if syntax in (NATIVE, BIG_ENDIAN):
        data = make_dicom(words, syntax=syntax, **layout)
    elif syntax == RLE:
        planes = words.view(np.uint8).reshape(16, 256, 2)
        segments = [b"".join(_rle_row(planes[row, :, byte]) for row in range(16)) for byte in (1, 0)]
        header = np.zeros(16, "<u4")
        header[:3] = 2, 64, 64 + len(segments[0])
        data = _dicom(make_dicom, header.tobytes() + b"".join(segments), words, stored, syntax, **layout)
    else:
        data = _dicom(make_dicom, _encode(words, syntax), words, stored, syntax, **layout)
    plain = (RAMP >> (12 - stored)).astype(np.float64)[0]
    assert _row(data) == np.floor(plain / plain.max() * 255 + 0.5).tolist()


def _rle_row(row: Array) -> bytes:
    """PackBits in literal runs of 128 bytes."""
    return b"".join(bytes([127]) + row[at : at + 128].tobytes() for at in range(0, len(row), 128))


@pytest.mark.parametrize("first", [2, 5])  # with empty segments before it
def test_runs_beyond_the_image_are_not_decoded(make_dicom: MakeDicom, first: int) -> None:
    header = np.zeros(16, "<u4")
    header[:first] = [first - 1, *[64] * (first - 1)]
    data = header.tobytes() + b"\x81\0" * (3 * 2**20)  # 6 MB that decode to 384 MB
    with pytest.raises(ImageError, match=r"broken image .RLE data of more than 4,096 bytes for 4,096 pixels"):
        read_image(_dicom(make_dicom, data, GREY, 8, RLE))


def test_long_runs_of_a_large_image_are_read() -> None:
    assert not runs_exceed(memoryview(b"\x81\0" * 1000 + b"\x80\3abcd"), 128_004)
    assert not runs_exceed(memoryview(b"\x81\0" * 1001), 128_000)  # the fill of a last run
    assert runs_exceed(memoryview(b"\x81\0" * 1002), 128_000)
    assert runs_exceed(memoryview(b"\x7f" * 1000), 500)


@pytest.mark.parametrize(("stored", "allocated"), [(8, 8), (8, 16), (12, 16), (16, 16)])
def test_a_header_with_room_for_more_bits(make_dicom: MakeDicom, stored: int, allocated: int) -> None:
    grey = (RAMP >> 4).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=100)
    for data, syntax in ((buffer.getvalue(), BASELINE), (_encode(grey, LS), LS), (_encode(grey, J2K), J2K)):
        elements = {"BitsAllocated": allocated, "BitsStored": stored}
        row = _row(_dicom(make_dicom, data, grey, stored, syntax, **elements))
        assert np.abs(np.array(row) - grey[8]).max() <= 1


@pytest.mark.parametrize("syntax", [LOSSLESS, LS, J2K])
def test_a_header_with_room_for_fewer_bits(make_dicom: MakeDicom, syntax: str) -> None:
    data = _dicom(make_dicom, _encode(RAMP, syntax), RAMP, 8, syntax, BitsAllocated=8)
    assert _row(data) == SHOWN.tolist()
    assert image_notes(read_image(data))[0] == "header says 8 bits in 8, compressed data 16"


def test_jpeg_ls_of_6_bits(make_dicom: MakeDicom) -> None:
    values = (RAMP >> 6).astype(np.uint8)
    data = bytearray(_encode(values, LS))
    at = data.index(b"\xff\xf7") + 4
    assert data[at] in (6, 8)
    shown = _row(_dicom(make_dicom, bytes(data), values, 6, LS))
    assert shown == np.floor(values[8] / 63 * 255 + 0.5).tolist()


def test_jpeg_2000_with_its_own_sign(make_dicom: MakeDicom) -> None:
    values = (RAMP.astype(int) - 2048).astype(np.int16)
    data = bytes(jpeg2k_encode(values, level=0, codecformat="j2k"))
    assert _row(_dicom(make_dicom, data, values, 16, J2K)) == SHOWN.tolist()
    assert _row(_dicom(make_dicom, data, values, 16, J2K, PixelRepresentation=0)) == SHOWN.tolist()


@pytest.mark.parametrize("syntax", [LOSSLESS, LS, J2K, RLE])
def test_colour_becomes_luma(make_dicom: MakeDicom, syntax: str) -> None:
    colours = np.zeros((16, 256, 3), np.uint8)
    colours[..., 1] = np.arange(256)
    if syntax == RLE:
        segments = [b"".join(_rle_row(colours[row, :, sample]) for row in range(16)) for sample in range(3)]
        header = np.zeros(16, "<u4")
        header[:4] = 3, 64, 64 + len(segments[0]), 64 + 2 * len(segments[0])
        data = header.tobytes() + b"".join(segments)
    else:
        data = _encode(colours, syntax)
    shown = np.array(_row(_dicom(make_dicom, data, colours, 8, syntax)))
    assert np.abs(shown - 0.587 * np.arange(256)).max() <= 1


# Parts of codestreams.


def _tiled(tile: tuple[int, int] | None) -> bytes:
    """Of 8 bits: Pillow does not write tiles of more rightly."""
    buffer = io.BytesIO()
    options = {} if tile is None else {"tile_size": tile[::-1]}
    Image.fromarray(GREY).save(buffer, "JPEG2000", no_jp2=True, irreversible=False, **options)
    return buffer.getvalue()


def _tail(kind: str) -> bytes:
    comment = b"\xff\x64\0\x0b\0\1PADDING"
    long = b"\xff\x64\xea\x60" + b"x" * 59998
    tails = {"comment": comment, "comments": comment * 3, "fill": b"\xff" * 5, "long": long}
    return (tails | {"none": b"", "unknown": b"\xff\x30" + comment})[kind]


@pytest.mark.parametrize("kind", ["none", "comment", "comments", "fill", "long", "unknown"])
@pytest.mark.parametrize("end", [b"\xff\xd9", b""])
@pytest.mark.parametrize("tile", [None, (16, 64)])
@pytest.mark.parametrize("high_throughput", [False, True])
def test_segments_before_the_end(
    make_dicom: MakeDicom, kind: str, end: bytes, tile: tuple[int, int] | None, high_throughput: bool
) -> None:
    if high_throughput:
        stream, syntax = bytes(htj2k_encode(GREY)), HTJ2K
    else:
        stream, syntax = _tiled(tile), J2K
    assert stream.endswith(b"\xff\xd9")
    data = stream[:-2] + _tail(kind) + end
    assert _row(_dicom(make_dicom, data, GREY, 8, syntax)) == GREY[8].tolist()


def test_a_tile_part_without_its_length(make_dicom: MakeDicom) -> None:
    stream = bytearray(jpeg2k_encode(RAMP, level=0, codecformat="j2k"))
    at = stream.rindex(b"\xff\x90\0\x0a")
    stream[at + 6 : at + 10] = bytes(4)
    assert _row(_dicom(make_dicom, bytes(stream), RAMP, 12, J2K)) == SHOWN.tolist()
    assert _refused(_dicom(make_dicom, bytes(stream[:-40]), RAMP, 12, J2K))[0] == "truncated image"


@pytest.mark.parametrize("tile", [None, (16, 64)])
def test_a_cut_codestream_is_truncated(make_dicom: MakeDicom, tile: tuple[int, int] | None) -> None:
    stream = _tiled(tile)
    last = stream.rindex(b"\xff\x90\0\x0a")
    for length in (len(stream) - 6, len(stream) // 2, *([last] if tile else [])):
        assert _refused(_dicom(make_dicom, stream[:length], GREY, 8, J2K))[0] == "truncated image"


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("table", ["empty", "four", "none"])
@pytest.mark.parametrize("syntax", [RLE, LS, J2K])
def test_one_frame_in_fragments(make_dicom: MakeDicom, parts: int, table: str, syntax: str) -> None:
    if syntax == RLE:
        planes = RAMP.view(np.uint8).reshape(16, 256, 2)
        segments = [b"".join(_rle_row(planes[row, :, byte]) for row in range(16)) for byte in (1, 0)]
        header = np.zeros(16, "<u4")
        header[:3] = 2, 64, 64 + len(segments[0])
        data = header.tobytes() + b"".join(segments)
    else:
        data = _encode(RAMP, syntax)
    size = max(len(data) // parts // 2 * 2, 2)
    fragments = [data[i * size : (i + 1) * size] for i in range(parts - 1)] + [b"", data[(parts - 1) * size :]]
    tables = {"empty": [b""], "four": [bytes(4)], "none": []}[table]
    items = [b"\xfe\xff\x00\xe0" + len(part).to_bytes(4, "little") + part for part in (*tables, *fragments)]
    whole = make_dicom([b"??"], syntax=syntax, **_layout(RAMP, 12))
    content = whole[: whole.rindex(b"\xfe\xff\x00\xe0", 0, whole.rindex(b"??"))]
    content = content[: content.rindex(b"\xe0\x7f\x10\0OB") + 12] + b"".join(items) + b"\xfe\xff\xdd\xe0\0\0\0\0"
    assert _row(content) == SHOWN.tolist()


# Deflated.


def _deflated(make_dicom: MakeDicom, values: Array) -> tuple[bytes, bytes]:
    """What stands before the deflated data set, and the data set."""
    content = make_dicom(values, syntax=DEFLATED, BitsStored=8 * values.itemsize)
    start = 132 + 12 + int.from_bytes(content[140:144], "little")
    return content[:start], zlib.decompress(content[start:], -15)


def _raw(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflater.compress(data) + deflater.flush()


def test_deflated(make_dicom: MakeDicom, tmp_path: Path) -> None:
    head, body = _deflated(make_dicom, RAMP)
    for data in (_raw(body), _raw(body) + b"\0", zlib.compress(body)):
        assert _row(head + data) == SHOWN.tolist()
        (tmp_path / "film.dcm").write_bytes(head + data)
        assert read_dicom_facts(tmp_path / "film.dcm").view == "PA"
    assert _refused(head + _raw(body)[:-40])[0] == "truncated image"
    assert _refused(head + b"\xff" * 400)[0] == "broken image"


def test_a_damaged_deflated_file_is_an_image_error(make_dicom: MakeDicom, tmp_path: Path) -> None:
    head, body = _deflated(make_dicom, RAMP)
    whole = head + _raw(body)
    place = whole.index(b"\x02\0\x10\0UI") + 6  # the length of the transfer syntax
    claims_more = whole[:place] + b"\xff\xff" + whole[place + 2 :]
    for number, data in enumerate((claims_more, *(whole[:end] for end in range(132, len(whole) - 40, 7)))):
        (tmp_path / f"{number}.dcm").write_bytes(data)
        with pytest.raises(ImageError):
            read_image(tmp_path / f"{number}.dcm")


@pytest.mark.slow
def test_a_deflated_bomb_is_too_large(make_dicom: MakeDicom, tmp_path: Path) -> None:
    head, body = _deflated(make_dicom, RAMP)
    bomb = head + _raw(body + bytes(200_000_000))
    assert len(bomb) < 300_000
    with pytest.raises(ImageError) as error:
        read_image(bomb, max_pixels=1_000_000)
    assert error.value.reason == "file too large"
    (tmp_path / "bomb.dcm").write_bytes(bomb)
    assert read_dicom_facts(tmp_path / "bomb.dcm").view == "PA"
