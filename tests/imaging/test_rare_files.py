"""TIFF, PNG and JPEG of rarer kinds: the same picture as their common neighbours, or a reason that names the kind."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagecodecs import jpeg2k_encode, jpeg_encode, jpegls_encode, png_encode
from PIL import Image
from tifffile import imwrite

from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.read import read_image

Array = np.ndarray[Any, Any]

SHARE = np.tile(np.linspace(0, 1, 256), (32, 1))
SHOWN = list(range(256))


def _row(data: bytes) -> list[int]:
    return np.asarray(read_image(data))[16].tolist()


def _refused(data: bytes, **options: Any) -> tuple[str, str]:
    with pytest.raises(ImageError) as error:
        read_image(data, **options)
    return error.value.reason, error.value.detail


def _ramp(dtype: str) -> Array:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return SHARE.astype(kind)
    info = np.iinfo(kind)
    levels = np.arange(256, dtype=np.float64) / 255
    values = [int(info.min) + int(level * 255) * ((int(info.max) - int(info.min)) // 255) for level in levels]
    return np.tile(np.array(values, dtype=kind), (32, 1))


def _tiff(values: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    imwrite(buffer, values, metadata=None, **({"photometric": "minisblack"} | options))
    return buffer.getvalue()


# TIFF.

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "stored", [{}, {"compression": "zlib"}, {"compression": "lzw"}, {"tile": (16, 64)}, {"rowsperstrip": 5}]
)
def test_tiff_of_every_type(dtype: str, order: str, stored: dict[str, Any]) -> None:
    assert _row(_tiff(_ramp(dtype), byteorder=order, **stored)) == SHOWN


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "f4", "f8", "u8"])
def test_tiff_where_white_is_zero(dtype: str) -> None:
    assert _row(_tiff(_ramp(dtype), photometric="miniswhite")) == SHOWN[::-1]


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4", "f8", "i1"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("stored", [{}, {"compression": "zlib"}, {"rowsperstrip": 5}])
def test_colour_tiff(dtype: str, planes: str, stored: dict[str, Any]) -> None:
    axis = 0 if planes == "separate" else 2
    colours = np.stack([_ramp(dtype)] * 3, axis)
    assert _row(_tiff(colours, photometric="rgb", planarconfig=planes, **stored)) == SHOWN


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_tiff_of_four_samples(dtype: str, planes: str) -> None:
    axis = 0 if planes == "separate" else 2
    ramp = _ramp(dtype)
    alpha = np.where(np.arange(256) < 100, 0, np.iinfo(dtype).max).astype(dtype) * np.ones_like(ramp)
    data = _tiff(
        np.stack([ramp] * 3 + [alpha], axis), photometric="rgb", planarconfig=planes, extrasamples=["unassalpha"]
    )
    assert _row(data) == [0] * 100 + SHOWN[100:]
    ink = (np.iinfo(dtype).max - ramp).astype(dtype)
    data = _tiff(np.stack([np.zeros_like(ramp)] * 3 + [ink], axis), photometric="separated", planarconfig=planes)
    assert np.abs(np.array(_row(data)) - SHOWN).max() <= 1


def test_tiff_of_packed_bits() -> None:
    for bits in (2, 4, 6, 10, 12, 14):
        levels = np.arange(2**bits) if bits <= 8 else np.linspace(0, 2**bits - 1, 256).round().astype(int)
        values = np.tile(levels.astype(np.uint16 if bits > 8 else np.uint8), (32, 1))
        spread = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(spread.astype(np.uint8).reshape(32, -1), axis=1).tobytes()
        for photometric in (0, 1):
            data = _plain_tiff(packed, values.shape[1], 32, bits, photometric)
            expected = np.floor(levels / levels.max() * 255 + 0.5)
            assert _row(data) == (expected if photometric else 255 - expected).tolist(), bits


def _plain_tiff(content: bytes, width: int, height: int, bits: int, photometric: int, *more: tuple[int, int]) -> bytes:
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, height), (279, 4, len(content)), *((tag, 3, value) for tag, value in more)]
    rows = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    content += b"\0" * (len(content) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(entries)) + rows + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("map_bits", [8, 16])
@pytest.mark.parametrize("colour", [False, True])
def test_colour_map_of_8_bits(order: str, compression: str | None, map_bits: int, colour: bool) -> None:
    table = np.stack([np.arange(256)] * 3)
    if colour:
        table[0] = 0
    written = table if map_bits == 8 else table * 257
    data = _tiff(_ramp("u1"), photometric="palette", colormap=written.astype(np.uint16), byteorder=order,
                 compression=compression)  # fmt: skip
    expected = np.floor(table.T @ [0.299, 0.587, 0.114] + 0.5)
    assert np.abs(np.array(_row(data)) - expected).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1, 257])
def test_colour_map_of_few_colours(bits: int, scale: int) -> None:
    count = 2**bits
    levels = np.linspace(0, 255, count).round().astype(int)
    values = np.tile(np.repeat(np.arange(count), 256 // count), (32, 1))
    spread = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(spread.astype(np.uint8).reshape(32, -1), axis=1).tobytes()
    data = bytearray(_plain_tiff(packed, 256, 32, bits, 3, (320, 0)))
    table = np.tile(levels * scale, 3).astype("<u2").tobytes()
    at = data.rindex(b"\x40\x01\x03\x00")
    data[at + 4 : at + 12] = struct.pack("<II", 3 * count, len(data))
    assert _row(bytes(data) + table) == levels[values[0]].tolist()


def test_a_big_tiff_and_its_orientation() -> None:
    assert _row(_tiff(_ramp("f8"), bigtiff=True)) == SHOWN
    turned = _tiff(_ramp("f8"), extratags=[(274, 3, 1, 2, True)])
    assert _row(turned) == SHOWN[::-1]
    assert read_image(_tiff(_ramp("f8"), extratags=[(274, 3, 1, 6, True)])).size == (32, 256)


def test_a_tiff_that_is_not_read_says_which_kind() -> None:
    reason, detail = _refused(_tiff(SHARE.astype(np.complex64)))
    assert (reason, detail) == ("broken image", "TIFF of 64-bit complex samples is not supported")
    data = _plain_tiff(bytes(32 * 256 * 2), 256, 32, 16, 32803)
    assert "photometric interpretation 32803" in _refused(data)[1]


def test_a_large_or_cut_rare_tiff() -> None:
    data = _tiff(_ramp("f8"), rowsperstrip=4)
    assert _refused(data, max_pixels=100)[0] == "too many pixels"
    at = data.index(_ramp("f8").astype("<f8").tobytes()[:4096])
    assert at >= 0
    moved = _plain_tiff(_ramp("f8").tobytes(), 256, 32, 64, 1, (339, 3))
    directory = struct.unpack_from("<I", moved, 4)[0]
    cut = moved[:4] + struct.pack("<I", 8) + moved[directory:]
    assert _refused(cut)[0] == "truncated image"


def test_not_a_number_in_a_rare_tiff() -> None:
    values = _ramp("f8")
    values[:8, :40] = np.nan
    values[0, 50] = np.inf
    assert _row(_tiff(values)) == SHOWN


# PNG.


def _png(samples: Array, depth: int, kind: int, transparent: bytes, palette: bytes = b"") -> bytes:
    height, width = samples.shape[:2]
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    elif depth == 8:
        rows = samples.astype(np.uint8).reshape(height, -1)
    else:
        bits = (samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.astype(np.uint8).reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), (b"PLTE", palette),
              (b"tRNS", transparent), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]  # fmt: skip
    body = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
        if data or name == b"IEND"
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("which", ["lowest", "middle", "highest"])
def test_transparent_grey(depth: int, which: str) -> None:
    top = 2**depth - 1
    levels = np.linspace(0, top, 256).round().astype(int)
    value = {"lowest": 0, "middle": int(levels[128]), "highest": top}[which]
    data = _png(np.tile(levels, (32, 1)), depth, 0, struct.pack(">H", value))
    kept = levels[levels != value]
    low, high = (kept.min(), kept.max()) if depth == 16 else (0, top)
    expected = np.floor((levels - low) / max(high - low, 1) * 255 + 0.5)
    assert _row(data) == np.where(levels == value, 0, expected).tolist()


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_colour(depth: int) -> None:
    scale = 1 if depth == 8 else 257
    samples = np.repeat(np.tile(np.arange(256) * scale, (32, 1))[..., None], 3, 2)
    if depth == 16:
        samples[:, 99] = 100 * 257 + 1  # the same high byte as the transparent colour
    data = _png(samples, depth, 2, struct.pack(">3H", *[100 * scale] * 3))
    row = _row(data)
    assert row[100] == 0
    assert row[101:] == SHOWN[101:]
    assert row[99] in (99, 100)


def test_transparent_palette() -> None:
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1).tobytes()
    opacity = bytes([255] * 100 + [0] * 20)
    row = _row(_png(np.tile(np.arange(256), (32, 1)), 8, 3, opacity, palette))
    assert row == [*SHOWN[:100], *[0] * 20, *SHOWN[120:]]


@pytest.mark.parametrize("samples", [2, 4])
def test_an_alpha_channel_of_16_bits(samples: int) -> None:
    top = 4095 if samples == 2 else 65535
    grey = np.tile(np.linspace(0, top, 256).round().astype(np.uint16), (32, 1))
    alpha = np.full_like(grey, 65535)
    alpha[:, :10] = 0
    data = bytes(png_encode(np.stack([grey] * (samples - 1) + [alpha], 2)))
    row = np.array(_row(data))
    low = float(grey[0, 10]) if samples == 2 else 0.0
    expected = np.where(np.arange(256) < 10, 0, (grey[0] - low) / (top - low) * 255)
    assert np.abs(row - expected).max() <= 1


# JPEG.

FILM = np.tile(np.linspace(0, 4095, 256).round().astype(np.uint16), (32, 1))


@pytest.mark.parametrize(
    "data",
    [
        bytes(jpeg_encode(FILM, bitspersample=12, lossless=True)),
        bytes(jpeg_encode(FILM << 4, bitspersample=16, lossless=True)),
        bytes(jpegls_encode(FILM)),
        bytes(jpeg2k_encode(FILM, level=0, codecformat="j2k")),
        bytes(jpeg2k_encode(FILM, level=0, codecformat="jp2")),
    ],
    ids=["lossless 12", "lossless 16", "JPEG-LS", "codestream", "JP2"],
)
def test_jpeg_of_a_rare_kind(data: bytes, tmp_path: Path) -> None:
    expected = np.floor(FILM[0] / 4095 * 255 + 0.5).tolist()
    assert _row(data) == expected
    (tmp_path / "film.jpg").write_bytes(data)
    assert np.asarray(read_image(tmp_path / "film.jpg"))[16].tolist() == expected
    assert _refused(data, max_pixels=100)[0] == "too many pixels"
    assert _refused(data[: len(data) // 2])[0] in {"truncated image", "broken image"}


def test_jpeg_of_12_bits_with_loss() -> None:
    row = np.array(_row(bytes(jpeg_encode(FILM, bitspersample=12, level=98))))
    assert np.abs(row - FILM[0] / 4095 * 255).max() <= 2


def test_a_jpeg_that_is_not_read_says_which_kind() -> None:
    buffer = io.BytesIO()
    Image.fromarray((FILM >> 4).astype(np.uint8)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 1] = 0xC5
    assert _refused(bytes(data)) == ("broken image", "hierarchical JPEG is not supported")
    two = b"\xff\xd8\xff\xc0\0\x0e\x08\0\x20\1\0\2" + b"\1\x11\0" * 2 + b"\xff\xd9"
    assert _refused(two) == ("broken image", "JPEG of 2 components is not supported")
