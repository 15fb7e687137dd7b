"""Files that a hospital, a data set or a careless hand leaves in a folder: each gives one report or one counted skip.

One table says what must come of each: a reason, or None where it is odd but readable. `generate` is run on each (with a
stub in place of the model), `preprocess folder` on all of them together.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from emrrg_cli.app import main
from emrrg_cli.datasets.manifest import read_manifest
from emrrg_cli.decoding.writer import Studies, WrittenReport

MakeDicom = Callable[..., bytes]
Content = bytes | Callable[[Path], None]

FILM = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
LAYOUT = {"Rows": 40, "Columns": 50, "BitsAllocated": 8, "BitsStored": 8, "PixelRepresentation": 0}

NOT_AN_IMAGE, BROKEN, TRUNCATED, MISSING = "not an image", "broken image", "truncated image", "missing image"
UNREAD = "image format not supported"


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _film(format: str, mode: str = "L", **options: Any) -> bytes:
    return _saved(Image.fromarray(FILM).convert(mode), format, **options)


def _png(width: int, height: int, data: bytes, *, kind: int = 0, extra: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def _tiff(width: int, height: int) -> bytes:
    """A header that claims a size, and nothing else."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, height), (279, 4, 4)]
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0"


def _zip(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def _tar(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _psd() -> bytes:
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 40, 50, 8, 1) + b"\0" * 14 + FILM.tobytes()


def _plain_files() -> dict[str, tuple[str | None, Content]]:
    jpeg, png, tiff, webp = _film("JPEG"), _film("PNG"), _film("TIFF"), _film("WEBP", lossless=True)
    floats = np.where(FILM > 128, np.nan, FILM).astype(np.float32)
    gif = Image.fromarray(FILM)
    return {
        # Nothing, and other things.
        "empty.png": ("empty file", b""),
        "one-byte.jpg": (NOT_AN_IMAGE, b"\xff"),
        "zeros.png": (NOT_AN_IMAGE, b"\0" * 4096),
        "noise.jpg": (NOT_AN_IMAGE, np.random.default_rng(1).bytes(4096)),
        "text.png": (NOT_AN_IMAGE, b"The heart is of normal size."),
        "data.jpg": (NOT_AN_IMAGE, b'{"findings": "clear"}'),
        "page.png": (NOT_AN_IMAGE, b"<!doctype html><html><body>404 not found</body></html>"),
        "pointer.png": (NOT_AN_IMAGE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"),
        "drawing.svg": (NOT_AN_IMAGE, b"<svg xmlns='http://www.w3.org/2000/svg' width='40' height='40'/>"),
        "report.pdf": (NOT_AN_IMAGE, b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
        "film.png.gz": (NOT_AN_IMAGE, gzip.compress(png)),
        "cut.png.gz": (NOT_AN_IMAGE, gzip.compress(png)[:-9]),
        "zip.png": (NOT_AN_IMAGE, _zip("film.png", png)),
        "tar.jpg": (NOT_AN_IMAGE, _tar("film.jpg", jpeg)),
        "icon.ico": (UNREAD, _film("ICO")),
        "cursor.cur": (NOT_AN_IMAGE, b"\0\0\x02\0" + _film("ICO")[4:]),
        "layers.psd": (UNREAD, _psd()),
        "film.avif": (UNREAD, b"\0\0\0\x20ftypavif" + bytes(200)),
        "film.mp4": (NOT_AN_IMAGE, b"\0\0\0\x20ftypisom" + bytes(200)),
        "program.eps": (NOT_AN_IMAGE, _film("EPS")),
        "array.npy": (NOT_AN_IMAGE, b"\x93NUMPY\x01\0v\0{'descr': '|u1', 'fortran_order': False, 'shape': (4,)}\n1234"),
        # Wrong endings of readable files.
        "jpeg.png": (None, jpeg),
        "png.tiff": (None, png),
        "tiff": (None, tiff),
        "webp.jpg": (None, webp),
        # Cut off and damaged.
        "cut.png": (TRUNCATED, png[: len(png) // 2]),
        "header-cut.png": (TRUNCATED, png[:20]),
        "signature.png": (BROKEN, png[:8]),
        "cut.jpg": (TRUNCATED, jpeg[: len(jpeg) // 2]),
        "header-cut.jpg": (TRUNCATED, jpeg[:100]),
        "cut.tif": (TRUNCATED, tiff[: len(tiff) // 2]),
        "cut.bmp": (TRUNCATED, _film("BMP")[:1500]),
        "cut.webp": (TRUNCATED, webp[: len(webp) // 2]),
        "cut.gif": (TRUNCATED, _film("GIF")[:900]),
        "cut.pgm": (TRUNCATED, _film("PPM")[:900]),
        "header-cut.webp": (TRUNCATED, webp[:18]),
        "header-cut.gif": (BROKEN, _film("GIF")[:90]),
        "cut.jp2": (TRUNCATED, _film("JPEG2000")[:500]),
        "checksum.png": (BROKEN, png[:60] + bytes([png[60] ^ 255]) + png[61:]),
        "no-pixels.png": (TRUNCATED, _png(10, 10, zlib.compress(b""))),
        "colours-missing.png": (None, _png(1, 1, zlib.compress(b"\0\0"), kind=3)),
        "tables-missing.jpg": (BROKEN, jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :]),
        "no-width.png": (BROKEN, _png(0, 10, zlib.compress(b"\0" * 10))),
        # Bombs.
        "bomb.png": ("too many pixels", _png(30_000, 30_000, zlib.compress(b"\0" * 1000))),
        "bomb.tif": ("too many pixels", _tiff(100_000, 100_000)),
        "bomb.pgm": ("too many pixels", b"P5 99999 99999 255\n"),
        "bomb.bmp": ("too many pixels", _film("BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + _film("BMP")[26:]),
        "text-bomb.png": (
            BROKEN,
            _png(4, 4, zlib.compress(b"\0" * 20), extra=((b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 80_000_000)),)),
        ),
        # Odd, and readable.
        "black.png": (None, _saved(Image.new("L", (30, 30)), "PNG")),
        "white-16.png": (None, _saved(Image.fromarray(np.full((30, 30), 65_535, np.uint16)), "PNG")),
        "dot.png": (None, _saved(Image.new("L", (1, 1), 9), "PNG")),
        "line.png": (None, _saved(Image.new("L", (1, 10_000), 9), "PNG")),
        "nan.tif": (None, _saved(Image.fromarray(floats), "TIFF")),
        "all-nan.tif": (None, _saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF")),
        "pages.tif": (None, _saved(gif, "TIFF", save_all=True, append_images=[gif, gif])),
        "moving.gif": (None, _saved(gif, "GIF", save_all=True, append_images=[Image.new("L", (50, 40))])),
        "cmyk.jpg": (None, _film("JPEG", "CMYK")),
        "clear.png": (None, _saved(Image.new("RGBA", (30, 30)), "PNG")),
        "end-missing.jpg": (None, jpeg[:-2]),
        "rubbish-behind.jpg": (None, jpeg + b"\0" * 1000),
        # Names.
        "two words.png": (None, png),
        "herz 🫀 größe.png": (None, png),
        "line\nbreak.png": (None, png),
        "quotes'\".png": (None, png),
        "-leading-dash.png": (None, png),
        "[bold]brackets.png": (None, png),
        "train.lr=1.png": (None, png),
        "no ending": (None, png),
        f"{'long' * 60}.png": (None, png),
        "bad\nname.png": (NOT_AN_IMAGE, b"text"),
        # Not files.
        "folder.png": (None, lambda path: path.mkdir()),
        "dangling.png": (MISSING, lambda path: path.symlink_to(path.parent / "none.png")),
        "circle.png": ("cannot be opened", lambda path: path.symlink_to(path)),
        "link to a folder.png": (None, lambda path: path.symlink_to(path.parent)),
        "pipe.png": ("not a regular file", lambda path: os.mkfifo(path)),
        "system.png": ("not a regular file", lambda path: path.symlink_to("/proc/self/stat")),
    }


def _dicom_files(make: MakeDicom, make_jpeg: MakeDicom) -> dict[str, tuple[str | None, Content]]:
    good = make(FILM)
    pixels = good.rindex(b"\xe0\x7f\x10\x00")
    rows = good.index(b"\x28\x00\x10\x00US") + 8
    huge = good[:rows] + b"\xff\xff" + good[rows + 2 : rows + 10] + b"\xff\xff" + good[rows + 12 :]  # and columns
    return {
        "good.dcm": (None, good),
        "old.dcm": (None, make(FILM, preamble=False)),
        "text.dcm": (NOT_AN_IMAGE, b"The heart is of normal size. The lungs are clear."),
        "empty.dcm": ("empty file", b""),
        "preamble.dcm": ("no pixel data", good[:132]),
        "report.dcm": ("no pixel data", make(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")),
        "header.dcm": ("no pixel data", good[:pixels]),
        "cut.dcm": (TRUNCATED, good[:-100]),
        "cut-jpeg.dcm": (TRUNCATED, make_jpeg(FILM)[:-900]),
        "frames.dcm": ("multi-frame DICOM", make(FILM, NumberOfFrames=30)),
        "huge.dcm": ("too many pixels", huge),
        "no-rows.dcm": (BROKEN, make(FILM, drop=("Rows",))),
        "lies.dcm": (BROKEN, make_jpeg(FILM, Rows=400, Columns=500)),
        "not-jpeg.dcm": (BROKEN, make([b"rubbish "], syntax="1.2.840.10008.1.2.4.50", **LAYOUT)),
        "not-jp2.dcm": (BROKEN, make([b"\xff\x4f\xff\x51rubbish "], syntax="1.2.840.10008.1.2.4.90", **LAYOUT)),
        "not-rle.dcm": (BROKEN, make([b"rubbish "], syntax="1.2.840.10008.1.2.5", **LAYOUT)),
        "video.dcm": (
            "DICOM compression not supported",
            make([b"rubbish "], syntax="1.2.840.10008.1.2.4.102", **LAYOUT),
        ),
        "no-syntax.dcm": (
            "DICOM compression not supported",
            make([b"rubbish "], syntax=None, **LAYOUT),
        ),
        "length.dcm": (None, good[: pixels + 8] + b"\xfe\xff\xff\xff" + good[pixels + 12 :]),
        "huge-header.dcm": ("no pixel data", good.replace(b"LO\x02\0P1", b"LO\xff\xffP1")),
        "bits.dcm": (BROKEN, make(FILM, BitsStored=40)),
    }  # fmt: skip


# The names are needed before there are fixtures; of the content only what is searched for in it.
NAMES = [*_plain_files(), *_dicom_files(lambda *a, **k: b"\xe0\x7f\x10\x00\x28\x00\x10\x00US", lambda *a, **k: b"")]


@pytest.fixture(scope="module")
def cases(make_dicom: MakeDicom, make_jpeg_dicom: MakeDicom) -> dict[str, tuple[str | None, Content]]:
    return _plain_files() | _dicom_files(make_dicom, make_jpeg_dicom)


def _put(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


class _Stub:
    """In place of the model."""

    model = torch.nn.Identity()
    device = torch.device("cpu")

    def write(self, studies: Iterable[Studies]) -> Iterator[list[WrittenReport]]:
        for batch in studies:
            assert batch.pixels.shape == (len(batch.keys), 32, 32)
            yield [WrittenReport(key, "The lungs are clear.", -1.0) for key in batch.keys]

    def ground(self, pixels: Sequence[Tensor], *args: object) -> list[Tensor]:
        return [torch.ones(1, len(views), 2, 2) for views in pixels]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from emrrg_cli.decoding import generate_folder as folder
    from emrrg_cli.recipe import load, paths

    size = "model.encoder={d_model: 16, depth: 2, image_size: 32, d_state: 4}"
    recipe = load.load_recipe("tiny/finetune", ["data.root=none", size], stage="finetune")
    monkeypatch.setattr(load, "load_run_recipe", lambda *args: recipe)
    monkeypatch.setattr(paths, "require_trained", lambda run_dir: None)
    monkeypatch.setattr(folder, "load_generator", lambda *args, **options: _Stub())


def test_there_are_enough_broken_files() -> None:
    broken = [name for name, (reason, _) in _plain_files().items() if reason]
    assert len(NAMES) > 80
    assert len(broken) > 35


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", NAMES, ids=[name.encode("unicode_escape").decode()[:40] for name in NAMES])
def test_generate(
    name: str, cases: dict[str, tuple[str | None, Content]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reason, content = cases[name]
    films, output = tmp_path / "films", tmp_path / "reports"
    films.mkdir()
    _put(films / name, content)
    a_folder = (films / name).is_dir()
    code = main(["generate", str(films), "--model", "none", "--output", str(output), "--json"])
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "unexpected" not in printed.err
    if a_folder:  # nothing in it, or a link that is not followed
        assert code == 2
        assert printed.err.count("no files in") == 1
        return
    result = json.loads(printed.out)
    if reason is None:
        assert (code, len(result["reports"]), result["skipped"]) == (0, 1, [])
        assert result["reports"][0]["path"] == str(films / name)
        assert "skipped" not in printed.err.replace("0 files skipped", "")
    else:
        assert (code, result["reports"]) == (1, [])
        [skip] = result["skipped"]
        assert skip["path"] == str(films / name)
        assert skip["reason"].split(": ")[0] == reason
        lines = [line for line in printed.err.splitlines() if line.startswith("skipped ")]
        assert len(lines) == 1
        assert "1 file skipped" in printed.err
        assert json.loads((output / "skipped.jsonl").read_text().strip())["path"] == str(films / name)


def test_preprocess_folder(
    cases: dict[str, tuple[str | None, Content]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for name, (_, content) in cases.items():
        _put(films / name, content)
    folders = sum(path.is_dir() for path in films.iterdir())
    # DICOM files made here share their Study Instance UID: each gets a study of its own through a table.
    rows = [json.dumps({"image": name, "text": "Clear."}) for name in cases]
    (tmp_path / "table.jsonl").write_text("\n".join(rows))
    arguments = ["--table", str(tmp_path / "table.jsonl"), "--report-column", "text", "--workers", "1"]
    assert main(["preprocess", "folder", str(films), str(tmp_path / "out"), *arguments]) == 0
    assert "Traceback" not in capfd.readouterr().err
    manifest = read_manifest(tmp_path / "out")
    expected = Counter(reason for reason, _ in cases.values() if reason)
    expected["image path is a folder"] = folders
    assert {reason: entry["count"] for reason, entry in manifest["skipped"].items()} == expected
    assert manifest["studies_written"] == len(cases) - expected.total()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: [str(root)], "no files in"),
        (lambda root: [str(root / "none.png")], "no such file or folder"),
        (lambda root: [str(root / ("x" * 300))], "File name too long"),
        (lambda root: [str(root / "file" / "x.png")], "no such file or folder"),
        (lambda root: ["generation.num_beams=1"], "no images"),
        (lambda root: ["no\nsuch.png"], "no such file or folder"),
    ],
)
def test_missing_paths_are_wrong_usage(
    make: Callable[[Path], list[str]], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / ".hidden").touch()
    (tmp_path / "file").touch()
    assert main(["generate", *make(root), "--model", "none", "-o", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.usefixtures("no_model")
def test_no_permission(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "films" / "locked").mkdir(parents=True)
    for name in ("good.png", "secret.png"):
        (tmp_path / "films" / name).write_bytes(_film("PNG"))
    open_, scan, access = Path.open, os.scandir, os.access

    # Tests may run as root, whom no file mode stops.
    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "secret.png":
            raise PermissionError(13, "Permission denied")
        return open_(path, *args, **options)

    def refuse_folder(path: Any = ".") -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "scandir", refuse_folder)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("locked") and access(path, mode))
    arguments = ["generate", str(tmp_path / "films"), "--model", "none", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capfd.readouterr().err
    assert printed.count("no permission to read") == 2
    assert "1 report, 2 files skipped" in printed


@pytest.mark.usefixtures("no_model")
def test_a_name_that_is_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    films = tmp_path / "films"
    films.mkdir()
    try:
        (films / os.fsdecode(b"f\xfflm.png")).write_bytes(_film("PNG"))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    assert main(["generate", str(films), "--model", "none", "-o", str(tmp_path / "out")]) == 0
    assert "Traceback" not in capfd.readouterr().err
    assert main(["preprocess", "folder", str(films), str(tmp_path / "dataset"), "--workers", "1"]) == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_good_films_beside_broken_ones(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for number in range(12):
        (films / f"{number:02}.png").write_bytes(_film("PNG") if number % 4 == 0 else b"text")
    assert main(["generate", str(films), "--model", "none", "-o", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().err
    assert "3 reports, 9 files skipped" in printed
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 9
