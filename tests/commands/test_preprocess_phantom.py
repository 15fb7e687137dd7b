"""`emrrg preprocess phantom` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.manifest import read_manifest
from emrrg_cli.ingest.sources.phantom import synthetic_study


@pytest.mark.slow
def test_writes_films_and_says_synthetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["preprocess", "phantom", str(out), "--count", "20", "--seed", "2", "--size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "20 synthetic studies, seed 2" in printed
    films = sum(len(synthetic_study(2, index)[0].films) for index in range(20))
    assert films > 20  # some have a lateral film
    assert f"written │ 20 │ {films}" in " ".join(printed.split())
    assert {split: len(rows) for split, rows in open_dataset(out).items()} == {"train": 16, "validation": 2, "test": 2}
    assert main(["preprocess", "phantom", str(out), "--count", "10", "--size", "64"]) == 2
    assert main(["preprocess", "phantom", str(out), "--count", "10", "--size", "64", "--overwrite"]) == 0
    assert read_manifest(out)["studies_written"] == 10


def test_settings_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preprocess", "phantom", str(tmp_path / "out"), "--count", "10", "--split", "0.5,0.5,0"]
    assert main([*arguments, "size=32", "format=png", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest["recipe"]["size"], manifest["recipe"]["format"]) == (32, "png")
    assert {split: entry["studies"] for split, entry in manifest["splits"].items()} == {"train": 5, "validation": 5}
    assert manifest["options"] == {
        "layout": "phantom",
        "drawing": 2,
        "recipe": None,
        "count": 10,
        "seed": 0,
        "split": "0.5,0.5,0",
        "limit": None,
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--count", "0"], "--count"),
        (["--seed", "-1"], "--seed"),
        (["--size", "8"], "size must be 32 or more"),
        (["size=original"], "no original size"),
        (["--split", "0.5,0.6,0"], "must sum to 1"),
        (["--recipe", "iu_xray/finetune"], "finetune"),
    ],
)
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str) -> None:
    assert main(["preprocess", "phantom", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
