"""Every kind of file that a folder of radiographs holds, and every kind that it should not."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.notes import image_notes
from emrrg_cli.imaging.raster import encode, fit_shorter_side, is_plain_jpeg, resize_square, to_grey
from emrrg_cli.imaging.read import load_image, read_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def _bytes(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM"])
def test_grey_is_read_exactly(format: str, tmp_path: Path) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = _bytes(Image.fromarray(RAMP), format, **options)
    path = tmp_path / "image with space é.bin"
    path.write_bytes(data)
    for source in (data, path, str(path), Image.open(io.BytesIO(data))):
        image = read_image(source)
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), RAMP)


def test_the_argument_is_not_shared() -> None:
    original = Image.fromarray(RAMP)
    read_image(original).putpixel((0, 0), 99)
    assert original.getpixel((0, 0)) == 0


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_stretched_from_smallest_to_largest(format: str) -> None:
    values = np.array([[100, 1100], [2100, 4100]], dtype=np.uint16)  # a 12-bit film in 16 bits
    image = read_image(_bytes(Image.fromarray(values), format))
    # (v - 100) / 4000 * 255 = 0, 63.75, 127.5, 255
    np.testing.assert_array_equal(np.asarray(image), [[0, 64], [128, 255]])


def test_16_bit_big_endian_and_32_bit_and_float() -> None:
    values = np.array([[100, 1100], [2100, 4100]])
    expected = [[0, 64], [128, 255]]
    big = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(read_image(big)), expected)
    np.testing.assert_array_equal(np.asarray(read_image(Image.fromarray(values.astype(np.int32)))), expected)
    real = (values / 1024).astype(np.float32)  # exact
    np.testing.assert_array_equal(np.asarray(read_image(_bytes(Image.fromarray(real), "TIFF"))), expected)


def test_float_without_numbers() -> None:
    values = np.array([[np.nan, 1.0], [np.inf, -np.inf]], dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(read_image(Image.fromarray(values))), np.zeros((2, 2)))
    values = np.array([[np.nan, 1.0], [np.inf, 2.0]], dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(read_image(Image.fromarray(values))), [[0, 0], [255, 255]])


def test_constant_16_bit_is_black() -> None:
    assert not np.asarray(read_image(Image.fromarray(np.full((2, 2), 500, np.uint16)))).any()


def test_colour_is_luma() -> None:
    colour = Image.new("RGB", (1, 1), (255, 0, 0))
    assert read_image(colour).getpixel((0, 0)) == 76
    assert read_image(_bytes(colour.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")).getpixel((0, 0)) == 76
    grey = Image.new("CMYK", (8, 8), (0, 0, 0, 155))
    assert abs(read_image(_bytes(grey, "JPEG")).getpixel((4, 4)) - 100) <= 1
    assert read_image(Image.new("HSV", (1, 1), (0, 0, 90))).getpixel((0, 0)) == 90
    assert read_image(Image.new("LAB", (1, 1), (90, 128, 128))).getpixel((0, 0)) == 90


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "La", "RGBa"])
def test_transparent_is_black(mode: str) -> None:
    clear = Image.frombytes("LA", (2, 1), bytes([200, 255, 200, 0]))
    if mode == "PA":
        image = Image.frombytes("PA", (2, 1), bytes([7, 255, 7, 0]))
        image.putpalette([200] * 768)
    else:
        image = (clear.convert("RGBA") if mode.startswith("RGB") else clear).convert(mode)
    assert image.mode == mode
    assert list(np.asarray(read_image(image)).ravel()) == [200, 0]


def test_half_transparent_is_half_as_bright() -> None:
    image = Image.new("LA", (1, 1), (200, 128))
    assert read_image(_bytes(image, "PNG")).getpixel((0, 0)) == 100


def test_transparent_colour_of_a_palette_or_grey_png_is_black() -> None:
    palette = Image.fromarray(RAMP).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(_bytes(palette, "PNG", transparency=bytes([255] * 100 + [0] + [255] * 155)))
        grey = read_image(_bytes(Image.fromarray(RAMP), "PNG", transparency=100))
    for read in (image, grey):
        assert read.getpixel((4, 6)) == 0  # value 100
        assert read.getpixel((5, 6)) == 101


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert list(np.asarray(read_image(_bytes(image, "PNG"))).ravel()) == [0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_exif_orientation_is_applied(orientation: int, bits: int) -> None:
    upright = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
    # How a camera stores `upright` under each orientation.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(stored) if bits == 8 else np.ascontiguousarray(stored).astype(np.uint16) * 257
    data = _bytes(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(data)), upright)


@pytest.mark.parametrize("mode", ["I;16", "F", "L"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_tiff_in_which_white_is_zero(mode: str, turned: bool) -> None:
    values = RAMP if mode == "L" else RAMP.astype(np.uint16 if mode == "I;16" else np.float32) * 200
    exif = Image.Exif()
    exif[0x0112] = 3 if turned else 1
    black = _bytes(Image.fromarray(values), "TIFF", exif=exif)
    tag = b"\x06\x01\x03\x00\x01\x00\x00\x00"  # PhotometricInterpretation, one short integer
    assert black.count(tag + b"\x01\x00") == 1
    white = black.replace(tag + b"\x01\x00", tag + b"\x00\x00")
    expected = RAMP[::-1, ::-1] if turned else RAMP
    np.testing.assert_array_equal(np.asarray(read_image(black)), expected)
    np.testing.assert_array_equal(np.asarray(read_image(white)), 255 - expected)


def test_a_damaged_fax_tiff_has_a_note_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).random((64, 64)) > 0.5
    whole = _bytes(Image.fromarray((noise * 255).astype(np.uint8)).convert("1"), "TIFF", compression="group4")
    broken = bytearray(whole)
    broken[100:110] = bytes(range(10, 20))
    assert image_notes(read_image(whole)) == ()
    load = TiffImagePlugin.TiffImageFile.load

    def beside_a_bar(image: TiffImagePlugin.TiffImageFile) -> object:
        os.write(2, b"\x1b[2Kwriting reports  1/5  0:00:01\nTIFFReadDirectory: Warning, Unknown field.\n")
        return load(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiffImagePlugin.TiffImageFile, "load", beside_a_bar)
        assert image_notes(read_image(whole)) == ()
    capfd.readouterr()
    assert image_notes(read_image(bytes(broken))) == ("damaged: part of it may be missing",)
    assert capfd.readouterr().err == ""


def test_interlaced_png_and_compressed_tiff() -> None:
    # Adam7, as written by hand: one pass holds one pixel, the second is empty for a 1 x 1 image.
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0\x4d")), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    assert read_image(png).getpixel((0, 0)) == 0x4D
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        data = _bytes(Image.fromarray(RAMP), "TIFF", compression=compression)
        np.testing.assert_array_equal(np.asarray(read_image(data)), RAMP)
    wide = Image.fromarray(RAMP.astype(np.uint16) * 16)
    np.testing.assert_array_equal(np.asarray(read_image(_bytes(wide, "TIFF", compression="tiff_lzw"))), RAMP)


def test_first_frame_of_several() -> None:
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    for format in ("TIFF", "GIF"):
        data = _bytes(frames[0], format, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(np.asarray(read_image(data)), RAMP)


def _film() -> np.ndarray:
    """An invented film, uint8 `[400, 320]`: smooth, noisy, with a black border."""
    y, x = np.mgrid[:400, :320]
    noise = np.random.default_rng(0).normal(0, 6, (400, 320))
    film = np.clip(128 + 60 * np.sin(x / 23) * np.cos(y / 31) + noise, 0, 255).astype(np.uint8)
    film[:, :40] = 0
    return film


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "restart_marker_rows": 2}])
def test_a_jpeg_that_lost_its_last_bytes(mode: str, options: dict[str, object], tmp_path: Path) -> None:
    data = _bytes(Image.fromarray(_film()).convert(mode), "JPEG", quality=90, **options)
    whole = np.asarray(read_image(data)).astype(int)
    path = tmp_path / "x.jpg"
    for cut in (1, 2, 3, 12, 40):
        path.write_bytes(data[:-cut])
        for image in (read_image(path), read_image(data[:-cut])):
            read = np.asarray(image).astype(int)
            # 95 percent of the rows are exact; of a progressive image no row is far off.
            assert read.shape == whole.shape
            if "progressive" in options:
                assert np.abs(read - whole).mean() < 3
            else:
                np.testing.assert_array_equal(read[:380], whole[:380])
            # Without the end marker alone some are whole for the decoder, and nothing is to be said.
            assert all(note.startswith("truncated: ") for note in image_notes(image))
            assert image_notes(image) or cut <= 3
        assert cut <= 3 or not is_plain_jpeg(load_image(path))  # or a dataset would keep its bytes
    for part in (2, 3) if "progressive" in options else (2, 3, 10):
        with pytest.raises(ImageError, match="truncated image"):
            read_image(data[: -len(data) // part])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_jpegs_cut_anywhere_are_read_or_refused() -> None:
    data = _bytes(Image.fromarray(_film()), "JPEG", progressive=True)
    for length in range(2, len(data), 211):
        with contextlib.suppress(ImageError):
            read_image(data[:length])


def _case(name: str, folder: Path) -> Path | str | bytes:
    jpeg = _bytes(Image.fromarray(RAMP).resize((200, 200)), "JPEG")
    path = folder / "x.png"
    match name:
        case "missing":
            return folder / "none.png"
        case "below a file":
            (folder / "file").write_text("x")
            return folder / "file" / "x.png"
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "NUL":
            return f"{folder}/a\0b.png"
        case "long name":
            return folder / ("x" * 300)
        case "empty":
            path.touch()
        case "empty bytes":
            return b""
        case "text":
            path.write_text("Heart size is normal.")
        case "svg":
            path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
        case "eps":
            path.write_bytes(_bytes(Image.fromarray(RAMP), "EPS"))
        case "truncated jpeg":
            path.write_bytes(jpeg[: len(jpeg) // 2])
        case "truncated png":
            noise = np.random.default_rng(0).integers(0, 256, (99, 99), dtype=np.uint8)
            path.write_bytes(_bytes(Image.fromarray(noise), "PNG")[:5000])
        case "bomb":
            path.write_bytes(_png_header(30_000, 30_000))
        case "no pixels":
            path.write_bytes(_png_header(10, 10))
        case "header cut":
            path.write_bytes(_png_header(10, 10)[:20])
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "missing image"),
        ("below a file", "missing image"),
        ("folder", "image path is a folder"),
        pytest.param(
            "pipe",
            "not a regular file",
            marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here"),
        ),
        ("NUL", "cannot be opened"),
        ("long name", "cannot be opened"),
        ("empty", "empty file"),
        ("empty bytes", "empty file"),
        ("text", "not an image"),
        ("svg", "not an image"),
        ("eps", "not an image"),
        ("truncated jpeg", "truncated image"),
        ("truncated png", "truncated image"),
        ("bomb", "too many pixels"),
        ("no pixels", None),
        ("header cut", None),
    ],
)
def test_broken_files(name: str, reason: str | None, tmp_path: Path) -> None:
    source = _case(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as error:
            read_image(source)
    assert reason is None or error.value.reason == reason
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_the_size_is_checked_before_decoding() -> None:
    data = _png_header(20_000, 6_000)  # 120 million: Pillow itself would only warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"20,000 x 6,000 = 120,000,000, limit 100,000,000"):
            read_image(data)
        # Allowed by the caller: now the pixels are looked for, and are not there.
        with pytest.raises(ImageError, match=r"truncated|broken"):
            read_image(_png_header(20_000, 10_000), max_pixels=10**9)
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(Image.new("L", (11, 10)), max_pixels=109)
    assert read_image(Image.new("L", (11, 10)), max_pixels=110).size == (11, 10)


@pytest.mark.parametrize("limit", ["x", None, 0, -1, float("nan")])
def test_a_limit_that_is_no_number_is_told_in_words(limit: Any) -> None:
    with pytest.raises(UsageError, match="max_pixels must be a number above 0, not "):
        read_image(Image.new("L", (2, 2)), max_pixels=limit)
    assert read_image(Image.new("L", (2, 2)), max_pixels=1e6).size == (2, 2)  # type: ignore[arg-type]


def test_pillows_limit_is_not_changed() -> None:
    before = Image.MAX_IMAGE_PIXELS
    for data in (_png_header(30_000, 30_000), b"text", _bytes(Image.fromarray(RAMP), "PNG")):
        with contextlib.suppress(ImageError):
            read_image(data)
        assert before == Image.MAX_IMAGE_PIXELS


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(_bytes(Image.fromarray(RAMP), "PNG"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, whom no file mode stops.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert error.value.reason == "no permission to read"


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png", "broken image", "because")))
    assert (error.where, error.reason, error.detail) == ("a.png", "broken image", "because")
    assert str(error) == "a.png: broken image (because)"


def test_resize_square_is_bicubic_and_ignores_the_aspect_ratio() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8))
    pixels = resize_square(image, 32)
    assert (pixels.shape, pixels.dtype) == ((32, 32), np.uint8)
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(image.resize((32, 32), resample=3)))


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [((600, 400), 200, (300, 200)), ((400, 600), 200, (200, 300)), ((101, 100), 50, (50, 50)), ((90, 300), 100, None),
     ((100, 100), 100, None), ((1, 5000), 32, None)],
)  # fmt: skip
def test_fit_shorter_side(size: tuple[int, int], limit: int, expected: tuple[int, int] | None) -> None:
    image = Image.new("L", size)
    fitted = fit_shorter_side(image, limit)
    if expected is None:
        assert fitted is image
    else:
        assert fitted.size == expected


def test_encode() -> None:
    image = Image.fromarray(RAMP)
    np.testing.assert_array_equal(np.asarray(read_image(encode(image, "png"))), RAMP)
    jpeg = encode(image, "jpeg", 95)
    assert is_plain_jpeg(load_image(jpeg))
    assert np.abs(np.asarray(read_image(jpeg)).astype(int) - RAMP).max() < 12
    assert len(encode(image, "jpeg", 10)) < len(jpeg)
    with pytest.raises(ImageError, match="too long for JPEG"):
        encode(Image.new("L", (1, 70_000)), "jpeg")


def test_which_jpegs_are_plain() -> None:
    grey = Image.fromarray(RAMP)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert is_plain_jpeg(load_image(_bytes(grey, "JPEG")))
    assert not is_plain_jpeg(load_image(_bytes(grey, "JPEG", progressive=True)))
    assert not is_plain_jpeg(load_image(_bytes(grey, "JPEG", exif=turned)))
    assert not is_plain_jpeg(load_image(_bytes(grey.convert("RGB"), "JPEG")))
    assert not is_plain_jpeg(load_image(_bytes(grey, "PNG")))


def test_real_images_decode(shared_data: Path) -> None:
    files = [
        f for name in ("covid_chestxray", "iu_sample", "nih_fullres") for f in (shared_data / name).glob("images/*")
    ]
    for path in files[:: max(1, len(files) // 40)]:
        image = to_grey(load_image(path))
        assert image.mode == "L"
        assert np.asarray(image).std() > 10


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_large_jpeg_is_decoded_at_no_more_than_it_needs(mode: str) -> None:
    rough = np.random.default_rng(0).integers(0, 256, (10, 12), dtype=np.uint8)
    film = Image.fromarray(rough).resize((480, 400), Image.Resampling.BICUBIC).convert(mode)
    data = _bytes(film, "JPEG", quality=95)
    sizes = {enough: load_image(data, enough=enough).size for enough in (50, 51, 100, 101, 200, 201, 400, 500)}
    assert sizes == {
        50: (60, 50), 51: (120, 100), 100: (120, 100), 101: (240, 200), 200: (240, 200), 201: (480, 400),
        400: (480, 400), 500: (480, 400),
    }  # fmt: skip
    half = np.asarray(to_grey(load_image(data, enough=200)), float)
    whole = np.asarray(read_image(data).resize((240, 200), Image.Resampling.BOX), float)
    assert np.abs(half - whole).mean() < 2
    assert not is_plain_jpeg(load_image(data, enough=200))
    assert not is_plain_jpeg(load_image(data, enough=201))
    assert is_plain_jpeg(load_image(data, enough=400)) == (mode == "L")


def test_a_large_cut_jpeg_is_repaired_at_smaller_sizes() -> None:
    film = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 480), dtype=np.uint8))
    data = _bytes(film, "JPEG", quality=95)
    image = load_image(data[: int(len(data) * 0.98)], enough=100)
    assert image.size == (120, 100)
    assert "truncated" in image_notes(image)[0]
    with pytest.raises(ImageError, match="truncated"):
        load_image(data[: len(data) // 2], enough=100)


def test_encoded_images_have_no_metadata() -> None:
    film = Image.fromarray(RAMP)
    for name in ("JPEG", "PNG"):
        secret = _bytes(film, name, icc_profile=b"SECRET", **({"comment": b"SECRET"} if name == "JPEG" else {}))
        assert b"SECRET" in secret or name == "PNG"
        for format in ("jpeg", "png"):
            image = to_grey(load_image(secret))
            assert b"SECRET" not in encode(image, format)
            assert "icc_profile" not in Image.open(io.BytesIO(encode(image, format))).info
