"""R2Gen's annotation.json: what is read, what is left out and why, what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg_cli.errors import EmrrgError, RunError, UsageError
from emrrg_cli.ingest.sources.annotation import Annotation
from emrrg_cli.ingest.sources.r2gen import R2GenSource
from emrrg_cli.ingest.study import ImportLog, Study


def _row(id: object, /, report: object = "Clear.", images: object = "a.png", **more: object) -> dict[str, object]:
    return {"id": id, "report": report, "image_path": images, **more}


def _write(root: Path, train: Any, val: Any = (), test: Any = (), **more: Any) -> Path:
    content = {"train": train, "val": list(val), "test": list(test), **more}
    (root / "annotation.json").write_text(json.dumps(content))
    if not (root / "a.png").exists():
        Image.new("L", (4, 4)).save(root / "a.png")
    return root


def _read(root: Path, **options: Any) -> tuple[list[Study], ImportLog]:
    log = ImportLog()
    return list(R2GenSource(root, **options).studies(log)), log


def test_reads_the_fixture(tiny_r2gen: Path) -> None:
    source = R2GenSource(tiny_r2gen)
    log = ImportLog()
    studies = list(source.studies(log))
    assert (source.name, len(source), log.read, log.skipped) == ("r2gen", 24, 24, {})
    assert [s.split for s in studies] == ["train"] * 16 + ["validation"] * 4 + ["test"] * 4
    first, second = studies[:2]
    assert (first.study_id, first.patient_id, first.findings, first.impression) == ("study00", None, None, None)
    assert first.report == "Study of the chest. The heart is enlarged. No pneumothorax."
    assert first.image_paths == (tiny_r2gen.resolve() / "images" / "study00" / "0.png",)
    assert second.views == ("unknown", "unknown")


def test_root_may_be_the_file_with_images_beside_it(tmp_path: Path) -> None:
    _write(tmp_path, [_row("x", images=["a.png"])])
    (tmp_path / "annotation.json").rename(tmp_path / "other.json")
    studies, _ = _read(tmp_path / "other.json")
    assert studies[0].image_paths == (tmp_path.resolve() / "a.png",)


def test_iu_is_recognised_by_all_its_ids(tmp_path: Path) -> None:
    _write(tmp_path, [_row("CXR2384_IM-0942"), _row("CXR1_1_IM-0001")], [_row("CXR162_IM-0401-1001")])
    studies, _ = _read(tmp_path)
    assert [(s.source, s.patient_id) for s in studies] == [("iu_xray", "2384"), ("iu_xray", "1"), ("iu_xray", "162")]
    assert {s.source for s in _read(tmp_path, source="mine")[0]} == {"mine"}
    _write(tmp_path, [_row("CXR2384_IM-0942"), _row("other")])
    studies, _ = _read(tmp_path)
    assert [(s.source, s.patient_id) for s in studies] == [("r2gen", None)] * 2
    assert [s.patient_id for s in _read(tmp_path, source="iu_xray")[0]] == ["2384", None]


def test_mimic_rows_have_the_patient(tmp_path: Path) -> None:
    _write(tmp_path, [_row("02aa804e", subject_id=10000032, study_id=50414267)])
    assert _read(tmp_path)[0][0].patient_id == "10000032"


def test_numbers_as_ids_and_a_byte_order_mark(tmp_path: Path) -> None:
    _write(tmp_path, [_row(7)])
    annotation = tmp_path / "annotation.json"
    annotation.write_bytes(b"\xef\xbb\xbf" + annotation.read_bytes())
    assert _read(tmp_path)[0][0].study_id == "7"


def test_limit_is_per_split(tiny_r2gen: Path) -> None:
    source = R2GenSource(tiny_r2gen, limit=3)
    assert len(source) == 9
    assert [s.study_id for s in source.studies(ImportLog())][3:5] == ["study16", "study17"]


def test_ids_twice_and_empty_reports_are_counted(tmp_path: Path) -> None:
    _write(tmp_path, [_row("x"), _row("x", "Other."), _row("y", " \n"), _row("z", None)], test=[_row("x")])
    studies, log = _read(tmp_path)
    assert [(s.study_id, s.report) for s in studies] == [("x", "Clear.")]
    assert log.read == 5
    assert {reason: entry.count for reason, entry in log.skipped.items()} == {
        "id seen before": 2,
        "empty report": 2,
    }
    details = [example["detail"] for example in log.skipped["id seen before"].examples]
    assert details == ["in train, kept from train", "in test, kept from train"]


def test_paths_must_stay_inside(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "images").mkdir(parents=True)
    outside.mkdir()
    Image.new("L", (4, 4)).save(outside / "b.png")
    (root / "link.png").symlink_to(outside / "b.png")
    (root / "folder").symlink_to(outside)
    (root / "images" / "inner.png").symlink_to(root / "a.png")
    (root / "images" / "out").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    escapes = ["../outside/b.png", str(outside / "b.png"), "folder/../outside/b.png", "images/../../outside/b.png",
               "../outside/none.png", "images/../link.png"]  # fmt: skip
    inside = ["a.png", "images/../a.png", "./a.png", str(root / "a.png"), "inner.png"]
    _write(root, [_row(f"bad{i}", images=[path]) for i, path in enumerate(escapes)])
    studies, _ = _read(root)
    assert [s.problems[0].reason for s in studies] == ["path outside the data folder"] * len(escapes)
    assert not any(s.image_paths for s in studies)

    _write(root, [_row("good", images=inside)])
    assert _read(root)[0][0].image_paths == ((root / "a.png").resolve(),) * len(inside)

    links = ["link.png", "folder/b.png", "out/b.png", str(root / "link.png")]  # the user's own
    _write(root, [_row("links", images=links)])
    places = ("link.png", "folder/b.png", "images/out/b.png", "link.png")
    assert _read(root)[0][0].image_paths == tuple(root.resolve() / place for place in places)

    _write(root, [_row("odd", images=["none.png", "a\0.png", "x" * 5000, "loop", "\ud800.png"])])
    problems = _read(root)[0][0].problems
    assert problems[0].reason == "missing image"
    assert {p.reason for p in problems[1:]} <= {"cannot be opened", "missing image"}
    assert len(problems) == 5


def test_partly_missing_images_stay_with_their_study(tmp_path: Path) -> None:
    _write(tmp_path, [_row("x", images=["none.png", "a.png"]), _row("y", images=[])])
    studies, _ = _read(tmp_path)
    assert [p.path for p in studies[0].problems] == ["none.png"]
    assert studies[0].image_paths == (tmp_path.resolve() / "a.png",)
    assert len(studies[0].views) == 1
    assert (studies[1].image_paths, studies[1].problems) == ((), ())


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "annotation.json").write_text(
        '{"train": [{"id": "x", "report": "a\\ud800b", "image_path": []}], "val": [], "test": []}'
    )
    assert _read(tmp_path)[0][0].report == "a\ufffdb"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "annotation.json:1:1: not valid JSON"),
        ('{"train": [\n{"id": 1,,}]}', "annotation.json:2:10: not valid JSON"),
        ("[]", "the top level is a list, not an object"),
        ("{}", "no train and no val and no test; keys found: none"),
        ('{"train": [], "validation": [], "test": []}', "no val; keys found: train, validation, test"),
        ('{"train": [], "val": [], "test": [], "extra": []}', "unknown split 'extra'"),
        ('{"train": {}, "val": [], "test": []}', "train is an object, not a list"),
        ('{"train": [], "val": [], "test": []}', "no studies"),
        ('{"train": [1], "val": [], "test": []}', r"train\[0\] is a number, not an object"),
        ('{"train": [], "val": [{"id": "x"}], "test": []}', r"val\[0\] has no 'report'"),
        ('{"train": [' + "[" * 100_000, "nested too deeply"),
        ('{"train": [{"id": ' + "9" * 100_000 + "}]}", "a number of thousands of digits"),
        ('{"train": [], "val": [], "test": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "annotation.json").write_text(text)
    with pytest.raises(RunError, match=message):
        R2GenSource(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_row(None), "id is null, not text or a whole number"),
        (_row(True), "id is true or false"),
        (_row(1.5), "id is a number, not text or a whole number"),
        (_row(""), "id is empty"),
        (_row("y", 3), "report is a number, not text"),
        (_row("y", images=3), "image_path is a number, not a path or a list of paths"),
        (_row("y", images=["a.png", 2]), "image_path[1] is a number, not text"),
        (_row("y", subject_id=[]), "subject_id is a list"),
    ],
)
def test_rows_of_wrong_types_are_counted(tmp_path: Path, row: dict[str, object], message: str) -> None:
    source = R2GenSource(_write(tmp_path, [_row("x"), row, _row("y")]))
    log = ImportLog()
    assert [study.study_id for study in source.studies(log)] == ["x", "y"]
    assert (len(source), log.read) == (3, 3)
    [example] = log.skipped["row cannot be read"].examples
    assert (example["id"], example["detail"][: len(message)]) == ("train[1]", message)
    # A split without a row that can be read has another layout.
    with pytest.raises(RunError, match=re.escape(f"test[0]: {message}")):
        R2GenSource(_write(tmp_path, [_row("x")], test=[row, row]))


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_null_and_nan_are_missing_values(tmp_path: Path, missing: object) -> None:
    rows = [_row("a"), _row("b", missing), _row("c", images=missing), _row("d", images=["a.png", missing])]
    _write(tmp_path, [*rows, _row("e", subject_id=missing, note=missing, text='NaN "Infinity" \\ud800')])
    studies, log = _read(tmp_path)
    assert [(study.study_id, len(study.image_paths)) for study in studies] == [("a", 1), ("c", 0), ("d", 1), ("e", 1)]
    assert {reason: entry.count for reason, entry in log.skipped.items()} == {"empty report": 1}
    assert studies[3].patient_id is None


def test_whole_numbers_of_data_frames(tmp_path: Path) -> None:
    rows = [{"id": 7.0, "report": "x", "image_path": [], "subject_id": 10000032.0, "study_id": 5.0}]
    (tmp_path / "annotation.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
    [row] = Annotation(tmp_path / "annotation.json")
    assert (row.study_id, row.patient_id, row.other) == ("7", "10000032", {"study_id": "5"})


def test_infinity_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"train\[0\]: report is a number, not text"):
        R2GenSource(_write(tmp_path, [_row("a", float("-inf"))]))


def test_paths_that_were_written_on_windows(tmp_path: Path) -> None:
    for folder in ("s1", "images/s2"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / folder / "0.png")
    good = ["s1\\0.png", ".\\s1\\0.png", "s2\\0.png", "images\\s2/0.png", "s1\\..\\a.png"]
    bad = ["..\\b.png", "C:\\data\\0.png", "c:/..\\0.png", "\\\\server\\share\\0.png", "s1\\..\\..\\x\\0.png"]
    _write(tmp_path, [_row("x", images=good), *(_row(f"bad{i}", images=path) for i, path in enumerate(bad))])
    studies, _ = _read(tmp_path)
    assert (len(studies[0].image_paths), studies[0].problems) == (5, ())
    assert [study.problems[0].path for study in studies[1:]] == bad
    assert {study.problems[0].reason for study in studies[1:]} == {"path outside the data folder"}


@pytest.mark.skipif(os.name == "nt", reason="backslashes divide paths")
def test_a_name_with_a_backslash_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "s1").mkdir()
    for name in ("s1\\0.png", "s1/0.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    _write(tmp_path, [_row("x", images="s1\\0.png")])
    assert _read(tmp_path)[0][0].image_paths == (tmp_path.resolve() / "s1\\0.png",)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "annotation.json").write_bytes(b'{"train": "\xff"}')
    with pytest.raises(RunError, match=r"not UTF-8 text \(byte 11\)"):
        R2GenSource(tmp_path)


def test_wrong_roots(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        R2GenSource(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no annotation\.json in"):
        R2GenSource(tmp_path)
    (tmp_path / "annotation.json").mkdir()
    with pytest.raises(EmrrgError, match=r"no annotation\.json in"):
        R2GenSource(tmp_path)
    with pytest.raises(UsageError, match="--source is empty"):
        R2GenSource(tmp_path, source=" ")


def test_real_annotations(shared_data: Path) -> None:
    iu = R2GenSource(shared_data / "iu_text")
    log = ImportLog()
    studies = list(iu.studies(log))
    assert (iu.name, log.read, len(studies)) == ("iu_xray", 2955, 2955)
    assert all(s.patient_id for s in studies)
    assert sum(len(s.problems) for s in studies) == 5910
    covid = R2GenSource(shared_data / "covid_chestxray")
    assert (covid.name, len(covid)) == ("r2gen", 371)
