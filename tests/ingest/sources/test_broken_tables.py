"""Tables and paths that are wrong in the ways that people's are: one clear message, or one counted skip each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.manifest import read_manifest

GOOD = "image,text,who\na.png,Clear.,1\nb.png,Large heart.,2\n"


@pytest.fixture
def films(tmp_path: Path) -> Path:
    root = tmp_path / "films"
    (root / "more").mkdir(parents=True)
    for name in ("a", "b", "c", "more/d", "Größe"):
        Image.new("L", (8, 8), 100).save(root / f"{name}.png")
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "within.png").symlink_to(root / "a.png")
    (root / "elsewhere").symlink_to(tmp_path)
    return root


def _run(films: Path, content: bytes, name: str, *options: str) -> tuple[int, Path]:
    table, out = films.parent / name, films.parent / "dataset"
    table.write_bytes(content)
    columns = ["--table", str(table), "--report-column", "text", "--workers", "1", "--split", "1", *options]
    return main(["preprocess", "folder", str(films), str(out), *columns]), out


# What cannot be read at all: exit code, part of the message.
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("t.csv", b"", "is empty"),
    "header alone": ("t.csv", b"image,text,who\n", "has no rows"),
    "blank rows": ("t.csv", b"image,text,who\n,,\n \n", "has no rows"),
    "column missing": ("t.csv", b"image,report\na.png,x\n", "no column 'text' (--report-column)"),
    "column twice": ("t.csv", b"image,text,text\na.png,x,y\n", "several columns named 'text'"),
    "image column missing": ("t.csv", b"file,text\na.png,x\n", "no column 'image' (--image-column)"),
    "quote never closed": ("t.csv", b'image,text\na.png,"x\nb.png,y\n', "t.csv:2: not valid CSV"),
    "gz cut short": ("t.csv.gz", gzip.compress(GOOD.encode() * 99)[:-20], "t.csv.gz is cut short"),
    "gz broken": ("t.csv.gz", gzip.compress(GOOD.encode())[:20] + b"\0" * 20, "t.csv.gz is not a whole gzip file"),
    "no gz": ("t.csv.gz", GOOD.encode(), "t.csv.gz is not a whole gzip file"),
    "gz of nothing": ("t.csv.gz", gzip.compress(b""), "is empty"),
    "json cut short": ("t.jsonl", b'{"image": "a.png", "text": "x"}\n{"image": "b', "t.jsonl:2: not valid JSON"),
    "json list": ("t.jsonl", b'["a.png"]\n', "t.jsonl:1: not a JSON object"),
    "json number": ("t.jsonl", b"NaN\n", "t.jsonl:1: not a JSON object"),
    "json of another kind": ("t.jsonl", b'{"file": "a.png"}\n', "no column 'image' (--image-column)"),
    "spreadsheet": ("t.xlsx", b"PK\x03\x04", "is not a table"),
    "csv that is a zip": ("t.csv", b"PK\x03\x04\0\0\xff\xfe,\nx,y\n", "no column 'image'"),
    "no rows that can be used": ("t.csv", b"image,text\nnone.png,x\n", "missing image: 1 study, first: none.png"),
    "all reports empty": ("t.csv", b"image,text\na.png,NaN\n", "empty report: 1 study, first: a.png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, films: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, content, message = REFUSED[case]
    code, out = _run(films, content, name)
    printed = capfd.readouterr()
    assert code in (1, 2)
    assert message in " ".join(printed.err.split())
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    assert "unexpected error" not in printed.err
    assert not out.exists()
    assert not list(films.parent.glob(".*"))


# One row that is wrong beside one that is right: the reason it is counted by, None where it is read all the same.
ROWS: dict[str, tuple[str | None, str]] = {
    "right": (None, "b.png,Clear.,2"),
    "no image": ("no image listed", ",Clear.,2"),
    "NaN for an image": ("no image listed", "NaN,Clear.,2"),
    "empty text": ("empty report", "b.png,,2"),
    "NaN for a text": ("empty report", "b.png,nan,2"),
    "white text": ("empty report", "b.png,   ,2"),
    "NaN for a patient": (None, "b.png,Clear.,NaN"),
    "id twice": ("id seen before", "a.png,Other.,1"),
    "cell too many": ("row and header differ in length", "b.png,Clear.,2,x"),
    "cell too few": ("row and header differ in length", "b.png,Clear."),
    "no such file": ("missing image", "none.png,Clear.,2"),
    "a folder": ("image path is a folder", "more,Clear.,2"),
    "up and out": ("path outside the data folder", "../secret.png,Clear.,2"),
    "up, out and in": (None, "../films/b.png,Clear.,2"),
    "deep, then out": ("path outside the data folder", "more/../../secret.png,Clear.,2"),
    "absolute": ("path outside the data folder", "/etc/hostname,Clear.,2"),
    "link out": (None, "out.png,Clear.,2"),
    "link to a folder outside": (None, "elsewhere/secret.png,Clear.,2"),
    "up through a link": ("path outside the data folder", "elsewhere/more/../secret.png,Clear.,2"),
    "link within": (None, "within.png,Clear.,2"),
    "backslashes": (None, "more\\d.png,Clear.,2"),
    "a NUL": (None, "b\0.png,Clear.,2"),
    "too long": ("missing image", f"{'x' * 5000}.png,Clear.,2"),
    "an address": ("missing image", "https://example.org/b.png,Clear.,2"),
    "a formula": ("missing image", "=cmd|' /C calc'!A0,Clear.,2"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case: str, films: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reason, row = ROWS[case]
    code, out = _run(films, f"image,text,who\na.png,Clear.,1\n{row}\n".encode(), "t.csv", "--patient-column", "who")
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert "Traceback" not in printed.err
    manifest = read_manifest(out)
    found = {name: entry["count"] for name, entry in manifest["skipped"].items()}
    assert found == ({} if reason is None else {reason: 1})
    assert manifest["studies_read"] == manifest["studies_written"] + manifest["studies_skipped"] == 2


@pytest.mark.parametrize(
    ("encode", "text"),
    [
        (lambda text: text.encode("utf-8"), "Größe"),
        (lambda text: text.encode("utf-8-sig"), "Größe"),
        (lambda text: text.encode("utf-16"), "Größe"),
        (lambda text: text.encode("cp1252"), "Größe"),
        (lambda text: text.encode() + "b.png,Größe\n".encode("cp1252"), "Größe"),  # another editor added a row
        (lambda text: text.replace(",", ";").encode(), "Größe"),
        (lambda text: text.replace("\n", "\r\n").encode(), "Größe"),
        (lambda text: text.replace(",", "\t").encode(), "Größe"),
    ],
)
def test_encodings_and_line_ends(encode: Callable[[str], bytes], text: str, films: Path) -> None:
    code, out = _run(films, encode(f"image,text\n{text}.png,{text}.\n"), "t.csv")
    assert code == 0
    rows = open_dataset(out)["train"]
    assert (rows["study_id"][0], rows["report"][0]) == (f"{text}.png", f"{text}.")


def test_gzipped_tables(films: Path) -> None:
    code, out = _run(films, gzip.compress(GOOD.encode()), "t.csv.gz")
    assert code == 0
    assert open_dataset(out)["train"]["report"][:] == ["Clear.", "Large heart."]
    lines = "\n".join(json.dumps({"image": name, "text": "x"}) for name in ("a.png", "c.png"))
    code, _ = _run(films, gzip.compress(lines.encode()), "t.jsonl.gz", "--overwrite")
    assert code == 0


def test_a_patient_in_two_splits(films: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (films.parent / "t.csv").write_text("image,who,fold\na.png,7,train\nb.png,7,test\n")
    arguments = ["preprocess", "folder", str(films), str(films.parent / "out"), "--table", str(films.parent / "t.csv")]
    arguments += ["--patient-column", "who", "--split-column", "fold"]
    assert main(arguments) == 1
    printed = capfd.readouterr().err
    assert "1 patient is in more than one split: 7 (study b.png)" in printed
    assert "--allow-leakage" in printed
    assert main([*arguments, "--allow-leakage"]) == 0
