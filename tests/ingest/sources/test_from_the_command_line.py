"""The sources as people run them: `emrrg preprocess SOURCE ROOT OUT` to a dataset that opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset


def _run(out: Path, *arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], Any]:
    """Manifest and dataset."""
    assert main(["preprocess", *map(str, arguments), "--workers", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out), open_dataset(out)


def test_mimic(mimic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    manifest, dataset = _run(out, "mimic_cxr", mimic.root, out, capsys=capsys)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 2, "validation": 1, "test": 1}
    row = dataset["train"][0]
    assert (row["study_id"], row["patient_id"], row["source"], row["views"]) == (
        "50000001", "10000032", "mimic_cxr", ["LATERAL", "PA"],
    )  # fmt: skip
    assert row["report"] == row["findings"] == "The lungs are clear in study 50000001. The heart is not enlarged."
    assert (row["labels"], row["labels_uncertain"], row["labels_absent"]) == (
        ["Cardiomegaly"],
        ["Pneumonia"],
        ["Edema"],
    )
    assert (row["indication"], row["comparison"]) == ("___-year-old woman with cough.", "None.")
    assert row["images"][0]["path"].startswith("files/p10/p10000032/s50000001/")
    assert (
        manifest["options"] | {"layout": "mimic_cxr", "reports": None, "annotation": None, "labels": "chexpert"}
        == (manifest["options"])
    )
    card = (out / "README.md").read_text()
    assert "PhysioNet" in card
    assert "`labels_uncertain`" in card


def test_mimic_with_choices(mimic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    notes = mimic.zip_notes(tmp_path / "notes.zip")
    shutil.rmtree(mimic.root / "mimic-cxr-reports")
    options = ["--reports", notes, "--section", "both", "--views", "frontal", "--labels", "negbio"]
    manifest, dataset = _run(out, "mimic_cxr", mimic.root, out, *options, capsys=capsys)
    row = dataset["train"][0]
    assert row["views"] == ["PA"]
    assert row["report"].endswith("not enlarged. No acute disease.")
    assert dataset["validation"][0]["views"] == ["unknown"]
    assert "No mimic-cxr-2.0.0-negbio.csv.gz: the studies have no labels." in manifest["remarks"]


def test_chexpert(chexpert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    manifest, dataset = _run(out, "chexpert_plus", chexpert.root, out, "--split", "1,0,0", capsys=capsys)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 9}
    assert dataset["train"][0]["labels"] == ["Edema"]
    assert dataset["train"][0]["views"] == ["AP", "LATERAL"]
    assert manifest["skipped"]["no findings"]["count"] == 1
    arguments = [chexpert.root, out, "--section", "impression", "--overwrite"]
    manifest, dataset = _run(out, "chexpert_plus", *arguments, capsys=capsys)
    assert sum(map(len, dataset.values())) == 10
    assert {row["report"] for row in dataset["train"]} == {"1.  No acute disease."}
    assert manifest["options"]["split"] == "0.7,0.1,0.2"
    assert "No chexbert_labels/impression_fixed.json: the studies have no labels." in manifest["remarks"]


def test_chexpert_with_an_annotation(chexpert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "train/patient00001/study1/view1_frontal.png"
    rows = {"train": [{"id": "a", "report": "Text.", "image_path": [path]}], "val": [], "test": []}
    (tmp_path / "a.json").write_text(json.dumps(rows))
    out, arguments = (
        tmp_path / "out",
        ["chexpert_plus", chexpert.root, tmp_path / "out", "--annotation", tmp_path / "a.json"],
    )
    _, dataset = _run(out, *arguments, capsys=capsys)
    assert [row["report"] for row in dataset["train"]] == ["Text."]
    assert main(["preprocess", *map(str, arguments), "--split", "1,0,0", "--overwrite"]) == 2
    assert "--annotation and --split cannot be used together" in capsys.readouterr().err


def test_iu(openi: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    manifest, dataset = _run(out, "iu_xray", openi.root, out, capsys=capsys)
    assert manifest["options"]["layout"] == "openi"
    assert sum(map(len, dataset.values())) == 5
    assert dataset["train"][0]["mesh"] == ["Opacity/lung/upper lobe/right", "Opacity/lung/lingula", "Scoliosis"]
    _, flat = _run(tmp_path / "flat-out", "iu_xray", openi.flat, tmp_path / "flat-out", capsys=capsys)
    for split, rows in dataset.items():
        assert rows["report"] == flat[split]["report"]


def test_r2gens_layout(tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--section", "findings"]
    manifest, dataset = _run(out, "iu_xray", tiny_r2gen, out, *options, capsys=capsys)
    assert (manifest["options"]["layout"], manifest["options"]["split"], len(dataset["train"])) == ("r2gen", None, 16)
    assert set(dataset["train"]["source"]) == {"iu_xray"}


def test_combined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name, path in (("iu_xray", "images/CXR1_IM-0001/0.png"), ("mimic_cxr", "files/p10/p10000032/s50414267/a.jpg")):
        (tmp_path / name / path).parent.mkdir(parents=True)
        Image.new("L", (40, 36), 90).save(tmp_path / name / path)
        rows.append({"id": path, "report": f"Of {name}.", "image_path": [f"/far/{name}/{path}"]})
    (tmp_path / "a.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
    out = tmp_path / "out"
    options = [f"--root=iu_xray={tmp_path / 'iu_xray'}", f"--root=mimic_cxr={tmp_path / 'mimic_cxr'}"]
    options += [f"--map=/far/{name}={tmp_path / name}" for name in ("iu_xray", "mimic_cxr")]
    manifest, dataset = _run(out, "combined", tmp_path / "a.json", out, *options, capsys=capsys)
    assert dataset["train"]["source"][:] == ["iu_xray", "mimic_cxr"]
    assert dataset["train"]["patient_id"][:] == ["1", "10000032"]
    assert [row["images"][0]["path"] for row in dataset["train"]] == [
        "iu_xray/images/CXR1_IM-0001/0.png", "mimic_cxr/files/p10/p10000032/s50414267/a.jpg",
    ]  # fmt: skip
    assert manifest["options"]["map"] == {f"/far/{name}": str(tmp_path / name) for name in ("iu_xray", "mimic_cxr")}


def test_a_dry_run_writes_nothing(mimic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", "mimic_cxr", str(mimic.root), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["views"] == {"frontal": 3, "lateral": 2, "unknown": 1}
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_archive_with_four_images(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "openi"
    shutil.copytree(shared_data / "iu_sample" / "images", root / "NLMCXR_png")
    shutil.copy(shared_data / "iu_text" / "NLMCXR_reports.tgz", root)
    out = tmp_path / "out"
    manifest, dataset = _run(out, "iu_xray", root, out, "--section", "both", "size=64", capsys=capsys)
    assert (manifest["studies_read"], manifest["studies_written"], manifest["images"]) == (3955, 2, 4)
    assert {reason: entry["count"] for reason, entry in manifest["skipped"].items()} == {
        "empty report": 28, "missing image": 3824, "no image listed": 101, "image dropped": 1,
    }  # fmt: skip
    assert "3,955 reports: findings in 3,425, impression in 3,921, neither in 28" in manifest["remarks"][0]
    assert sorted(study for rows in dataset.values() for study in rows["study_id"]) == ["CXR1000", "CXR1001"]
