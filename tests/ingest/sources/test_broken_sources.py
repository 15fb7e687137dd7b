"""What is wrong with a data set as it was downloaded: one clear message, or a counted skip, and never a traceback.

Each case breaks one thing of a data set that is whole, runs the command, and says what it must print and return.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.app import main

_BOMB = (
    b'<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;&x;">]><eCitation><uId id="CXR3"/>&y;</eCitation>'
)


@dataclass(frozen=True)
class _Case:
    """What is done to a data set, and what the command answers: `code` 0 is a counted skip, 1 and 2 are refusals."""

    name: str
    break_it: Callable[[Any], object]
    code: int
    says: str
    options: tuple[str, ...] = ()


def _archive(openi: Any, change: Callable[[bytes], bytes]) -> None:
    folder = openi.root / "ecgen-radiology"
    with tarfile.open(openi.root / "NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    path = openi.root / "NLMCXR_reports.tgz"
    path.write_bytes(change(path.read_bytes()))


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _packed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def _set(table: Any, index: int, **cells: str) -> None:
    table.rows[index].update(cells)
    table.write()


def _table(openi: Any) -> Path:
    path: Path = openi.flat / "indiana_reports.csv"
    return path


def _labels(chexpert: Any) -> Path:
    path: Path = chexpert.root / "chexbert_labels" / "findings_fixed.json"
    return path


_OPENI = [
    _Case("a report with entities", lambda o: o.report(3).write_bytes(_BOMB), 0, "report is not plain XML"),
    _Case("a report cut short", lambda o: _change(o.report(3), lambda d: d[:200]), 0, "report is not valid XML"),
    _Case("an empty report", lambda o: o.report(3).write_bytes(b""), 0, "report is not valid XML"),
    _Case("a report of binary data", lambda o: o.report(3).write_bytes(bytes(256)), 0, "report is not valid XML"),
    _Case("a report without id", lambda o: o.report(3).write_bytes(b"<a/>"), 0, "no study id"),
    _Case("a report twice", lambda o: _change(o.report(3), lambda d: o.report(2).read_bytes()), 0, "id seen before"),
    _Case("a report of a megabyte", lambda o: _change(o.report(3), lambda d: d + b" " * 2**20), 0, "cannot be read"),
    _Case("a report without text", lambda o: o.write(3, findings="", impression="", images=["CXR3_IM-1-1"]), 0,
          "empty report"),
    _Case("a report without images", lambda o: o.write(3, findings="Clear.", images=[]), 0, "no image listed"),
    _Case("a report with other images", lambda o: o.write(3, findings="Clear.", images=["CXR3_IM-9-9"]), 0,
          "missing image"),
    _Case("an image path out of the folder", lambda o: o.write(3, findings="Clear.", images=["../../x"]), 0,
          "path outside the data folder"),
    _Case("an archive cut short", lambda o: _archive(o, lambda d: d[: len(d) // 2]), 1, "is not a whole archive"),
    _Case("an archive that is none", lambda o: _archive(o, lambda d: b"<html>" * 90), 1, "is not a whole archive"),
    _Case("no reports", lambda o: (o.root / "ecgen-radiology").rename(o.root / "x"), 2, "does not have a known layout"),
    _Case("images elsewhere", lambda o: (o.root / "NLMCXR_png").rename(o.root / "png"), 1, "missing image: 5 studies"),
    _Case("images still packed", lambda o: (o.root / "NLMCXR_png").rename(o.root / "x") and (
        o.root / "NLMCXR_png.tgz").touch(), 2, "is still packed"),
    _Case("another layout asked for", lambda o: None, 2, "no indiana_reports.csv in", ("--layout", "flat")),
    _Case("an annotation of another set", lambda o: (o.root / "a.json").write_text(
        '{"train": [{"id": "02aa804e", "report": "", "image_path": []}], "val": [], "test": []}'), 1,
        "is not an id of IU X-Ray", ("--annotation", "{root}/a.json")),
    _Case("an annotation cut short", lambda o: (o.root / "a.json").write_text('{"train": [{"id": "CXR'), 1,
          "a.json:1:19: not valid JSON", ("--annotation", "{root}/a.json")),
    _Case("no such annotation", lambda o: None, 2, "no such annotation file", ("--annotation", "{root}/a.json")),
    _Case("parts that do not sum to 1", lambda o: None, 2, "the fractions must sum to 1", ("--split", "0.5,0.6")),
]  # fmt: skip

_FLAT = [
    _Case("an empty table", lambda o: _table(o).write_bytes(b""), 1, "is empty"),
    _Case("a table without rows", lambda o: _change(_table(o), lambda d: d.split(b"\n")[0]), 1,
          "has no rows"),
    _Case("no column", lambda o: _change(_table(o), lambda d: d.replace(b"findings", b"text", 1)), 1,
          "has no column 'findings'"),
    _Case("no table of views", lambda o: (o.flat / "indiana_projections.csv").unlink(), 2,
          "no indiana_projections.csv in"),
    _Case("another encoding", lambda o: _change(_table(o), lambda d: d.replace(b"clear", b"cl\xe9r")),
          0, "the other bytes were read as Windows-1252"),
    _Case("an open quote", lambda o: _change(_table(o), lambda d: d + b'9,"a'), 1,
          "indiana_reports.csv:8: not valid CSV"),
    _Case("an id that is no number", lambda o: _change(_table(o), lambda d: d + b"NaN,,,,,,x,\n"), 0,
          "row of a table cannot be used"),
    _Case("an id twice", lambda o: _change(_table(o), lambda d: d + b"1,,,,,,x,\n"), 0,
          "id seen before"),
]  # fmt: skip

_MIMIC = [
    _Case("a table cut short", lambda m: _change(m.table("split"), lambda d: d[:-12]), 1, "is cut short"),
    _Case("a table not compressed", lambda m: m.table("split").write_bytes(b"dicom_id"), 1, "is not a whole gzip file"),
    _Case("an empty table", lambda m: m.table("metadata").write_bytes(gzip.compress(b"")), 1, "is empty"),
    _Case("no column", lambda m: _packed(m.table("metadata"), lambda d: d.replace(b"ViewPosition", b"View")), 1,
          "has no column 'ViewPosition'"),
    _Case("NaN ids", lambda m: _packed(m.table("split"), lambda d: d + b"x,nan,nan,train\n"), 0, "no study id"),
    _Case("an image twice", lambda m: _packed(m.table("split"), lambda d: d + d.splitlines()[1]), 0, "listed twice"),
    _Case("a split of another name", lambda m: _packed(m.table("split"), lambda d: d + b"x,5,1,mine\n"), 0,
          "unknown split"),
    _Case("a row cut short", lambda m: _packed(m.table("split"), lambda d: d + b"x,5"), 0,
          "row and header"),  # and so on, in the next line
    _Case("a patient in two splits", lambda m: _packed(m.table("split"), lambda d: d + b"x,59,10000032,test\n"), 1,
          "patient 10000032 is in two splits"),
    _Case("labels that are none", lambda m: _packed(m.table("chexpert"), lambda d: d.replace(b"1.0", b"yes", 1)), 0,
          "cannot be read: 1, first:"),
    _Case("a note that is missing", lambda m: m.note(10000032, 50000002).unlink(), 0, "report missing"),
    _Case("a note of binary data", lambda m: m.write_note(10000032, 50000002, bytes(99)), 0, "report cannot be read"),
    _Case("an empty note", lambda m: m.write_note(10000032, 50000002, ""), 0, "empty report"),
    _Case("no notes", lambda m: (m.root / "mimic-cxr-reports").rename(m.root / "x"), 2, "no notes in"),
    _Case("a zip of notes that is none", lambda m: (m.root / "r.zip").write_bytes(b"PK" * 99), 1,
          "is not a whole zip file", ("--reports", "{root}/r.zip")),
    _Case("a zip of other files", lambda m: m.zip_notes(m.root / "r.zip") and _change(
        m.root / "r.zip", lambda d: d.replace(b"files/p1", b"files/q1")), 2, "r.zip has no notes such as",
        ("--reports", "{root}/r.zip")),
    _Case("no split", lambda m: m.table("split").unlink(), 2, "no mimic-cxr-2.0.0-split.csv.gz in"),
    _Case("a study without its images", lambda m: m.image(*m.images[2][:3]).unlink(), 0, "missing image"),
    _Case("an image cut short", lambda m: _change(m.image(*m.images[2][:3]), lambda d: d[:300]), 0, "50000002"),
]  # fmt: skip

_CHEXPERT = [
    _Case("no table", lambda c: c.table.unlink(), 2, "no df_chexpert_plus_240401.csv in"),
    _Case("a table cut short", lambda c: _change(c.table, lambda d: d[:-40]), 1, "not valid CSV"),
    _Case("no column", lambda c: _change(c.table, lambda d: d.replace(b"section_findings", b"findings", 1)), 1,
          "has no column 'section_findings'"),
    _Case("an empty table", lambda c: c.table.write_bytes(b""), 1, "is empty"),
    _Case("a path of another form", lambda c: _set(c, 2, path_to_image="a.jpg"), 0, "no study id"),
    _Case("no path", lambda c: _set(c, 2, path_to_image="nan"), 0, "no study id"),
    _Case("a path twice", lambda c: _set(c, 2, path_to_image=c.rows[0]["path_to_image"]), 0, "listed twice"),
    _Case("a study without text", lambda c: _set(c, 2, section_findings="", section_impression=" "), 0, "empty report"),
    _Case("a study without its image", lambda c: _set(
        c, 2, path_to_image="train/patient00099/study1/view1_frontal.jpg"), 0, "missing image"),
    _Case("another encoding", lambda c: _change(c.table, lambda d: d.replace(b"clear", b"cl\xe9ar")), 0,
          "the other bytes were read as Windows-1252"),
    _Case("labels cut short", lambda c: _change(_labels(c), lambda d: d[:-9]), 1,
          "findings_fixed.json:11: the last line is cut short"),
    _Case("no images at all", lambda c: (c.root / "PNG").rename(c.root / "x"), 1, "Images were searched in"),
]  # fmt: skip


def _parameters(cases: list[_Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name.replace(" ", "-") for case in cases])


def _check(case: _Case, command: str, root: Path, whole: Any, tmp_path: Path, capsys: Any) -> None:
    case.break_it(whole)
    out = tmp_path / "out"
    options = [option.replace("{root}", str(root)) for option in case.options]
    code = main(["preprocess", command, str(root), str(out), "--workers", "1", "--no-summary", *options])
    printed = capsys.readouterr()
    everything = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert case.says in everything
    assert "Traceback" not in everything
    assert code == case.code
    assert (out / "manifest.json").exists() == (code == 0)
    if code == 0:
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["studies_read"] == manifest["studies_written"] + manifest["studies_skipped"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"] * (code == 0)


@_parameters(_OPENI)
def test_openi(case: _Case, openi: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _check(case, "iu_xray", openi.root, openi, tmp_path, capsys)


@_parameters(_FLAT)
def test_flat(case: _Case, openi: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _check(case, "iu_xray", openi.flat, openi, tmp_path, capsys)


@_parameters(_MIMIC)
def test_mimic(case: _Case, mimic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _check(case, "mimic_cxr", mimic.root, mimic, tmp_path, capsys)


@_parameters(_CHEXPERT)
def test_chexpert(case: _Case, chexpert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _check(case, "chexpert_plus", chexpert.root, chexpert, tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "options", "code", "says"),
    [
        (None, (), 2, "no such annotation file"),
        ("[]", (), 1, "the top level is a list"),
        ('{"train": [{"id": 1, "report": "x", "image_path": ["/far/a.png"]}], "val": [], "test": []}', (), 1,
         "path outside the data folder: 1 study"),
        ("{}", ("--root", "b={root}"), 2, "--root a is given twice"),
        ("{}", ("--map", "x"), 2, "--map 'x' has no name or no folder"),
        ("{}", ("--map", "/far={root}/.."), 2, "is not inside a root"),
    ],
    ids=["no-file", "a-list", "outside", "a-root-twice", "half-a-map", "a-map-to-elsewhere"],
)  # fmt: skip
def test_combined(
    text: str | None, options: tuple[str, ...], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    roots = ["--root", f"a={root}"] * (2 if "twice" in says else 1)
    given = [option.replace("{root}", str(root)) for option in options]
    assert main(["preprocess", "combined", str(tmp_path / "a.json"), str(tmp_path / "out"), *roots, *given]) == code
    printed = capsys.readouterr()
    assert says in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()
