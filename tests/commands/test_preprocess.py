"""`emrrg preprocess r2gen` from the command line: exit codes, what is printed, what is left on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.manifest import read_manifest


def test_writes_and_prints_a_table(tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["preprocess", "r2gen", str(tiny_r2gen), str(out), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "r2gen: 24 studies read" in printed.out
    for row in ("train │ 16 │ 24", "validation │ 4 │ 6", "test │ 4 │ 6", "written │ 24 │ 36"):
        assert row in " ".join(printed.out.split())
    assert printed.out.count("validation") == 1  # one table; `data show` prints the others
    assert f"Written to {out}" in printed.out
    assert f"Page: {out}-summary/page.html" in printed.err
    assert "images/s" in printed.err
    assert {split: len(rows) for split, rows in open_dataset(out).items()} == {"train": 16, "validation": 4, "test": 4}


def test_settings_and_options(tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preprocess", "r2gen", str(tiny_r2gen / "annotation.json"), str(tmp_path / "out")]
    options = ["size=64", "format=png", "--source", "mine", "--limit", "2", "--workers", "1", "--json"]
    assert main([*arguments, *options]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest["recipe"]["size"], manifest["recipe"]["format"], manifest["recipe"]["workers"]) == (64, "png", 1)
    assert (manifest["source"], manifest["studies_written"], manifest["options"]["limit"]) == ("mine", 6, 2)


def test_skipped_studies_are_shown_and_the_exit_code_is_0(
    tmp_path: Path, tiny_r2gen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation = json.loads((tiny_r2gen / "annotation.json").read_text())
    annotation["train"][0]["image_path"] = "[bold]none.png"
    annotation["train"][1]["report"] = ""
    (tmp_path / "annotation.json").write_text(json.dumps(annotation))
    (tmp_path / "images").mkdir()
    for study in (tiny_r2gen / "images").iterdir():
        (tmp_path / "images" / study.name).mkdir()
        for image in study.iterdir():
            (tmp_path / "images" / study.name / image.name).write_bytes(image.read_bytes())
    assert main(["preprocess", "r2gen", str(tmp_path), str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 studies skipped" in printed
    assert "missing image │ 1 study │ study00, [bold]none.png" in printed
    assert "empty report │ 1 study │ study01" in printed


def test_nothing_usable_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "x", "report": "Clear.", "image_path": ["none.png"]}
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [row], "val": [], "test": []}))
    assert main(["preprocess", "r2gen", str(tmp_path), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "missing image: 1 study, first: x, none.png" in printed.err
    assert "Images were searched in" in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["sizes=64"], "size"),
        (["size=8"], "size must be 32 or more"),
        (["format=gif"], "format"),
        (["--recipe", "iu_xray/finetune"], "finetune"),
        (["--workers", "0"], "--workers"),
        (["--limit", "none"], "--limit"),
        (["--source", ""], "--source is empty"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main(["preprocess", "r2gen", str(tiny_r2gen), str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_out_is_refused(tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preprocess", "r2gen", str(tiny_r2gen), str(tmp_path / "out"), "--workers", "1", "--limit", "1"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert main(["preprocess", "r2gen", str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_data_side_imports_no_torch() -> None:
    code = (
        "import sys, emrrg_cli.commands.preprocess as c; heavy = {'torch', 'datasets', 'PIL', 'joblib'};"
        "print(sorted(heavy & set(sys.modules)));"
        "import emrrg_cli.imaging.read, emrrg_cli.datasets.report_text, emrrg_cli.ingest.sources.r2gen;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def _films(root: Path) -> Path:
    from PIL import Image

    root.mkdir()
    for name in "abcd":
        Image.new("L", (8, 8), ord(name)).save(root / f"{name}.png")
    (root / "table.csv").write_text(
        "file,text,who\n" + "".join(f"{name}.png,Report {name}.,{name}\n" for name in "abc")
    )
    return root


def test_folder_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _films(tmp_path / "films")
    arguments = ["preprocess", "folder", str(root), str(tmp_path / "out"), "--table", str(root / "table.csv")]
    options = ["--image-column", "file", "--report-column", "text", "--patient-column", "who", "--split", "0.4,0.3,0.3"]
    assert main([*arguments, *options, "--seed", "3", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert {split: count["studies"] for split, count in manifest["splits"].items()} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }
    assert manifest["options"]["columns"] == {
        "--image-column": "file",
        "--report-column": "text",
        "--patient-column": "who",
    }
    assert (manifest["options"]["split"], manifest["options"]["seed"]) == ("0.4,0.3,0.3", 3)


def test_folder_without_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _films(tmp_path / "films")
    assert main(["preprocess", "folder", str(root), str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "folder: 5 studies read" in printed
    assert "not an image │ 1 study │ table.csv │" in printed
    assert "Without a table there are no reports" in printed


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--table", "none.csv"], "no such table"),
        (["--report-column", "text"], "no table is given"),
        (["--split", "1,1"], "--split"),
        (["--table", "TABLE", "--split", "1", "--split-column", "who"], "cannot be used together"),
        (["--table", "TABLE"], "its columns: file, text, who"),
        (["--table", "TABLE", "--image-column", "file", "--view-column", "v"], "--view-column"),
    ],
)
def test_wrong_usage_of_folder_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    root = _films(tmp_path / "films")
    extra = [str(root / "table.csv") if part == "TABLE" else part for part in extra]
    assert main(["preprocess", "folder", str(root), str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
