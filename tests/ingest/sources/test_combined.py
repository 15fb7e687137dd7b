"""One annotation of several data sets: roots, moved paths, names of the sets, what lies outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg_cli.errors import UsageError
from emrrg_cli.ingest.sources.combined import CombinedSource, parse_pairs
from emrrg_cli.ingest.study import ImportLog, Study

Read = Callable[[Any], tuple[list[Study], ImportLog]]

_IU, _MIMIC = "CXR2384_IM-0942/0.png", "p10/p10000032/s50414267/a-b.jpg"
_CHEXPERT = "train/patient00001/study2/view1_frontal.png"


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """Three data sets with one image each."""
    folders = {"iu_xray": tmp_path / "iu", "mimic_cxr": tmp_path / "mimic", "chexpert_plus": tmp_path / "cxp"}
    for folder, path in zip(folders.values(), (f"images/{_IU}", f"files/{_MIMIC}", f"PNG/{_CHEXPERT}"), strict=True):
        (folder / path).parent.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / path)
    return folders


def _write(tmp_path: Path, *rows: tuple[str, str], **more: Any) -> Path:
    content = {
        "train": [{"id": id, "report": "Clear.", "image_path": [path]} for id, path in rows],
        "val": [],
        "test": [],
    }
    (tmp_path / "a.json").write_text(json.dumps(content | more))
    return tmp_path / "a.json"


def test_three_data_sets_of_another_machine(roots: dict[str, Path], tmp_path: Path, read: Read) -> None:
    file = _write(
        tmp_path,
        ("CXR2384_IM-0942", f"/data/R2Gen/iu_xray/images/{_IU}"),
        ("a-b", f"/data/mimic/{_MIMIC}"),
        ("c", f"D:\\cheXpert_plus\\PNG\\{_CHEXPERT}".replace("/", "\\")),
    )
    moved = {"/data/R2Gen/iu_xray": roots["iu_xray"], "/data/mimic": roots["mimic_cxr"] / "files",
             "/data": tmp_path / "iu", "D:\\cheXpert_plus": roots["chexpert_plus"]}  # fmt: skip
    source = CombinedSource(file, roots, moved=moved)
    studies, log = read(source)
    assert [(s.source, s.study_id, s.patient_id, s.views) for s in studies] == [
        ("iu_xray", "CXR2384_IM-0942", "2384", ("unknown",)), ("mimic_cxr", "a-b", "10000032", ("unknown",)),
        ("chexpert_plus", "c", "patient00001", ("FRONTAL",)),
    ]  # fmt: skip
    assert [s.image_paths[0].relative_to(source.root).parts[0] for s in studies] == ["iu", "mimic", "cxp"]
    assert not log.skipped


def test_relative_paths_are_looked_up_in_each_root(roots: dict[str, Path], tmp_path: Path, read: Read) -> None:
    file = _write(tmp_path, ("x", _IU), ("y", f"files/{_MIMIC}"), ("z", "none.png"))
    studies, _ = read(CombinedSource(file, roots))
    assert [(s.source, len(s.image_paths)) for s in studies] == [("iu_xray", 1), ("mimic_cxr", 1), ("combined", 0)]
    assert [p.reason for p in studies[2].problems] == ["missing image"]


def test_every_file_is_inside_a_root(roots: dict[str, Path], tmp_path: Path, read: Read) -> None:
    (tmp_path / "secret").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "secret" / "a.png")
    (roots["iu_xray"] / "link.png").symlink_to(tmp_path / "secret" / "a.png")
    (roots["mimic_cxr"] / "to_iu.png").symlink_to(roots["iu_xray"] / "images" / _IU)
    outside = ["../secret/a.png", str(tmp_path / "secret" / "a.png"), "/old/../../secret/a.png",
               "/elsewhere/a.png", "/oldest/a.png"]  # fmt: skip
    file = _write(tmp_path, *((str(index), path) for index, path in enumerate(outside)))
    studies, _ = read(CombinedSource(file, roots, moved={"/old": roots["iu_xray"] / "images"}))
    assert [s.problems[0].reason for s in studies] == ["path outside the data folder"] * len(outside)
    assert studies[2].problems[0].detail.startswith("looked up as ")
    # Links in a root are the user's own.
    file = _write(tmp_path, ("x", "to_iu.png"), ("y", "link.png"))
    assert [s.source for s in read(CombinedSource(file, roots))[0] if s.image_paths] == ["mimic_cxr", "iu_xray"]


def test_missing_is_reported_rather_than_outside(roots: dict[str, Path], tmp_path: Path, read: Read) -> None:
    file = _write(tmp_path, ("x", "/old/none.png"))
    studies, _ = read(CombinedSource(file, roots, moved={"/old": roots["mimic_cxr"]}))
    problem = studies[0].problems[0]
    assert (problem.path, problem.reason) == ("/old/none.png", "missing image")
    assert problem.detail == f"looked up as {roots['mimic_cxr']}/none.png"


def test_ids_are_unique_within_a_data_set(roots: dict[str, Path], tmp_path: Path, read: Read) -> None:
    rows = (("1", _IU), ("1", f"files/{_MIMIC}"), ("1", _IU))
    test = [{"id": 2, "report": " ", "image_path": []}, {"id": 3, "report": "x", "image_path": [], "subject_id": 9}]
    studies, log = read(CombinedSource(_write(tmp_path, *rows, test=test), roots))
    assert [(s.source, s.study_id, s.patient_id) for s in studies] == [
        ("iu_xray", "1", "2384"), ("mimic_cxr", "1", "10000032"), ("combined", "3", "9"),
    ]  # fmt: skip
    assert {reason: entry.count for reason, entry in log.skipped.items()} == {
        "id seen before": 1,
        "empty report": 1,
    }
    assert len(read(CombinedSource(_write(tmp_path, *rows, test=test), roots, limit=1))[0]) == 1


def test_missing_roots_and_files_are_refused(roots: dict[str, Path], tmp_path: Path) -> None:
    file = _write(tmp_path, ("x", _IU))
    with pytest.raises(UsageError, match="no --root"):
        CombinedSource(file, {})
    with pytest.raises(UsageError, match="--root x: no such folder"):
        CombinedSource(file, {"x": tmp_path / "none"})
    with pytest.raises(UsageError, match=r"--map /old: .* is not inside a root"):
        CombinedSource(file, roots, moved={"/old": tmp_path})
    with pytest.raises(UsageError, match="no such annotation file"):
        CombinedSource(tmp_path / "none.json", roots)


def test_pairs() -> None:
    assert parse_pairs("--root", ["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for bad, message in ((["a"], "has no name or no folder"), (["=b"], "has no name"), (["a="], "no folder"),
                         (["a=b", "a=c"], "--root a is given twice")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            parse_pairs("--root", bad)
