"""A dataset directory as input of `generate`: its studies, with the views that the model was trained on."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.decoding.read_studies import read_study
from emrrg_cli.decoding.reports import load_generator
from emrrg_cli.decoding.stored_studies import stored_studies
from emrrg_cli.errors import UsageError


def test_reports_of_a_split_are_those_of_its_images(varied_run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    out = ["--model", str(varied_run), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["generate", str(tiny_dataset), "--split", "validation", *out]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    records = list(open_dataset(tiny_dataset)["validation"])
    images = [[Image.open(io.BytesIO(image["bytes"])) for image in record["images"]] for record in records]
    expected = load_generator(varied_run, device="cpu").generate(images)
    assert [(row["study"], row["report"]) for row in rows] == [
        (record["study_id"], text) for record, text in zip(records, expected, strict=True)
    ]
    assert rows[1]["files"] == [f"{tiny_dataset}/validation/{rows[1]['study']}/{place}" for place in (0, 1)]
    assert [len(row["views"]) for row in rows] == [len(views) for views in images]


def test_the_test_split_is_the_default(tiny_dataset: Path) -> None:
    studies = stored_studies(str(tiny_dataset))
    assert [study.name for study in studies] == list(open_dataset(tiny_dataset)["test"]["study_id"])
    with pytest.raises(UsageError, match="no split named tset") as caught:
        stored_studies(str(tiny_dataset), "tset")
    assert "train, validation, test" in str(caught.value)
    assert {study.name for study in stored_studies(str(tiny_dataset), "val")} == set(
        open_dataset(tiny_dataset)["validation"]["study_id"]
    )


def test_stored_studies_travel_to_other_processes(tiny_dataset: Path) -> None:
    study = stored_studies(str(tiny_dataset), "train")[3]
    here, there = (read_study(one, 32, None) for one in (study, pickle.loads(pickle.dumps(study))))
    assert here.pixels is not None
    assert there.pixels is not None
    assert here.pixels.shape[0] == 2
    assert (here.pixels == there.pixels).all()
    assert len(pickle.dumps(study)) < 100_000  # without the data


def test_wrong_usage_of_split_is_refused(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], varied_run: Path
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "film.png")
    options = ["--model", str(varied_run), "--output", str(tmp_path / "out")]
    assert main(["generate", str(tmp_path / "film.png"), "--split", "test", *options]) == 2
    assert "--split needs a dataset directory" in capsys.readouterr().err
    shutil.copytree(tiny_dataset, tmp_path / "copy")
    assert main(["generate", str(tiny_dataset), str(tmp_path / "copy"), *options]) == 2
    assert "two studies are called" in capsys.readouterr().err
    assert main(["generate", str(tiny_dataset), "--study-by", "file", *options]) == 2
    assert "--study-by has no effect on dataset directories" in capsys.readouterr().err


def test_a_dataset_directory_is_taken_once(tiny_dataset: Path, tmp_path: Path, varied_run: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_dataset)
    options = ["--model", str(varied_run), "--output", str(tmp_path / "out")]
    assert main(["generate", str(tiny_dataset), str(tmp_path / "link"), *options]) == 0
    rows = (tmp_path / "out" / "reports.jsonl").read_text().splitlines()
    assert all(str(tiny_dataset) in row and str(tmp_path / "link") not in row for row in rows)
