"""JPEGs without what may tell whose they are."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.jpeg import without_metadata
from emrrg_cli.imaging.read import read_image

SECRET = b"Doe^Jane 1970-01-01"


def _jpeg(mode: str = "L", **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (70, 90), dtype=np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


def _segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def _pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


def _markers(data: bytes) -> list[int]:
    markers, at = [], 2
    while data[at + 1] != 0xDA:
        markers.append(data[at + 1])
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return markers


def test_a_file_without_metadata_keeps_its_bytes() -> None:
    data = _jpeg()
    assert without_metadata(data) == data


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_all_metadata_is_removed_and_pixels_are_kept(mode: str, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    data = _jpeg(mode, exif=exif, comment=SECRET, icc_profile=SECRET, dpi=(300, 300), **options)
    extra = [(0xED, b"Photoshop 3.0\0" + SECRET), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + SECRET), (0xEF, SECRET)]
    first = 2 + (2 + 16 if data[3] == 0xE0 else 0)
    data = data[:first] + b"".join(_segment(*one) for one in extra) + b"\xff" + data[first:] + b"MPF" + SECRET
    assert data.count(SECRET) >= 6
    bare = without_metadata(data)
    assert bare is not None
    assert SECRET not in bare
    assert bare.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(_pixels(bare), _pixels(data))
    with Image.open(io.BytesIO(bare)) as image:
        assert (image.mode, len(image.getexif())) == (mode, 0)
        assert not {"exif", "icc_profile", "comment", "photoshop", "xmp"} & set(image.info)
    kept = {marker for marker in _markers(bare) if 0xE0 <= marker <= 0xEF or marker == 0xFE}
    assert kept == ({0xE0, 0xEE} if mode == "CMYK" else {0xE0})  # JFIF, Adobe
    assert without_metadata(bare) == bare


def test_the_resolution_is_kept_and_thumbnails_are_removed() -> None:
    data = _jpeg(dpi=(300, 300))
    assert data[6:11] == b"JFIF\0"
    thumbnail = _segment(0xE0, data[6:18] + b"\x02\x02" + b"rgb" * 4) + _segment(0xE0, b"JFXX\0\x10" + SECRET)
    bare = without_metadata(data[:2] + thumbnail + data[20:])
    assert bare == data
    with Image.open(io.BytesIO(bare)) as image:
        assert image.info["dpi"] == (300, 300)


@pytest.mark.parametrize("kept", ["JPEG", "DICOM"])
def test_thousands_of_scans_are_not_decoded(kept: str, make_dicom: Callable[..., bytes]) -> None:
    data = _jpeg(progressive=True)
    last = data.rfind(b"\xff\xda")
    many = data[:last] + data[last:-2] * 200 + b"\xff\xd9"
    if kept == "DICOM":
        layout = {"Rows": 70, "Columns": 90, "BitsAllocated": 8, "BitsStored": 8, "PixelRepresentation": 0}
        many = make_dicom([many + b"\0" * (len(many) % 2)], syntax="1.2.840.10008.1.2.4.50", **layout)
    with pytest.raises(ImageError, match=r"broken image .20\d scans, limit 100"):
        read_image(many)
    assert read_image(data).size == (90, 70)


def test_metadata_of_a_damaged_jpeg_is_not_removed() -> None:
    data = _jpeg(comment=SECRET)
    for end in (*range(60), len(data) // 2, len(data) - 2, len(data) - 1):
        assert without_metadata(data[:end]) is None
    scan = data.index(b"\xff\xda")
    assert without_metadata(data[:scan] + b"\0" + data[scan:]) is None
    assert without_metadata(data[:2] + b"\xff\xfe\x00\x01" + data[2:]) is None
    assert without_metadata(b"\x89PNG\r\n") is None
    assert without_metadata(b"") is None
