"""`emrrg data show DIR`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from emrrg_cli.app import main


def test_show_prints_counts_and_writes_page_and_sheet(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "my [set] é")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", "my [set] é"]) == 0
    printed = capsys.readouterr()
    assert "my [set] é: 24 studies, 36 images" in printed.out
    assert "Study of the chest" in printed.out
    assert printed.err.splitlines() == [
        "Page: my [set] é-summary/page.html",
        "Contact sheet: my [set] é-summary/sheet.png",
    ]
    assert (tmp_path / "my [set] é-summary" / "sheet.png").is_file()
    monkeypatch.chdir(tmp_path / "my [set] é")
    assert main(["data", "show", ".", "--examples", "0"]) == 0
    assert not (tmp_path / "my [set] é-summary" / "sheet.png").exists()


def test_show_as_json(tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(tiny_dataset), "--json", "--output", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["splits"]["train"]["studies"] == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none"], "no such dataset directory: none"),
        (["file"], "file is a file, not a dataset directory"),
        (["."], ". is not a dataset directory: it has no data/*.parquet"),
    ],
)
def test_directories_that_cannot_be_shown(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["data", "show", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_an_unwritable_output_is_reported(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["data", "show", str(tiny_dataset), "-o", str(tmp_path / "file" / "out")]) == 2
    assert "file is a file" in capsys.readouterr().err
