"""`emrrg generate` from the command line: paths and settings apart, results, skipped files and exit codes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from emrrg_cli.app import main
from emrrg_cli.commands.generate import split_arguments
from emrrg_cli.default_model import SYNTHETIC_ONLY
from emrrg_cli.errors import UsageError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images in a folder within a folder, and a text file."""
    for name in ("a b.png", "deeper/[bold]ü.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 20), 90).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_reports_are_shown_and_skipped_files_named(
    tiny_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    assert main(["generate", ".", "--model", str(tiny_run), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    for text in ("a b.png", "[bold]ü.png", "not for diagnosis"):
        assert text in printed.out
    assert "skipped notes.txt: not an image" in printed.err
    assert "2 reports, 1 file skipped" in printed.err
    assert "Note: " not in printed.err
    assert len((tmp_path / "out" / "reports.jsonl").read_text().splitlines()) == 2


def test_stdout_has_only_json(tiny_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(images), "--model", str(tiny_run), "-o", str(tmp_path / "out"), "--json"]
    assert main([*arguments, "generation.num_beams=2"]) == 0
    result = json.loads(capsys.readouterr().out)
    lines = (tmp_path / "out" / "reports.jsonl").read_text().splitlines()
    assert result["reports"] == [json.loads(line) for line in lines]
    assert result["skipped"] == [{"path": str(images / "notes.txt"), "reason": "not an image"}]
    assert "not for diagnosis" in result["note"]
    assert main(arguments) == 2
    assert "already holds reports" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_no_image_among_the_files_is_exit_code_1(
    tiny_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(images / "notes.txt"), "-m", str(tiny_run), "-o", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "0 reports, 1 file skipped" in printed.err


def test_many_skipped_files_are_counted(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(13):
        (tmp_path / "texts" / f"{number:02}.txt").write_text("no image")
    assert main(["generate", str(tmp_path / "texts"), "-m", str(tiny_run), "-o", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert told.count("not an image") == 10
    assert "... and 3 more; all are listed in" in told
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 13


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.png"], "none.png: no such file or folder"),
        (["empty"], "no files in empty"),
        (["generation.num_beams=2"], "no images: give at least one image or folder"),
        (["a.png", "generation.num_beans=2"], "did you mean generation.num_beams?"),
        (["a.png", "train.lr=1"], "was fixed when the run was trained"),
        (["a.png", "--device", "abacus"], "unknown device 'abacus'"),
        (["a.png", "--recipe", "default/evaluate"], "for `evaluate`, not `generate`"),
        (["a.png", "--output", "a.png"], "a.png is a file"),
        (["a.png", "--image-column", "scan"], "--image-column has no effect without --table"),
        (["--table", "t.csv", "--study-by", "auto"], "--study-by has no effect with --table"),
        (["--table", "t.csv", "--split", "test"], "--split has no effect with --table"),
        (["a.png", "--merge", "out"], "a.png has no effect with --merge"),
        (["generation.num_beams=2", "--merge", "out"], "generation.num_beams=2 has no effect with --merge"),
        (["a.png", "--shard", "0/2", "--page", "3"], "--page has no effect with --shard"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("L", (30, 20)).save("a.png")
    assert main(["generate", "--model", str(tiny_run), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert not (tmp_path / "reports").exists()


def test_directories_that_are_not_runs_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(images), "--model", str(images), "-o", str(tmp_path / "out")]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["generate", "--model", str(images)]) == 2


@pytest.mark.usefixtures("no_default_model")
def test_without_a_default_model_a_model_is_needed(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(images)]) == 2
    told = capsys.readouterr().err
    assert "this installation has no default model" in told
    assert f"emrrg generate {shlex.quote(str(images))} --model RUN" in told


def test_the_default_model_states_its_limits_everywhere(
    default_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["generate", str(images), "--output", str(out)]) == 0
    told = capsys.readouterr().err
    assert "the model that comes with emrrg writes the reports" in told
    assert f"Note: {SYNTHETIC_ONLY}." in told
    rows = [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]
    assert [row["limits"] for row in rows] == [SYNTHETIC_ONLY] * 2
    assert f"<p class=warning>Note: {SYNTHETIC_ONLY}.</p>" in (out / "page.html").read_text()
    # Named, the same run states them too; another has none to state.
    assert main(["generate", str(images), "--model", str(default_model), "--output", str(out)]) == 0
    told = capsys.readouterr().err
    assert "comes with emrrg" not in told
    assert f"Note: {SYNTHETIC_ONLY}." in told


def test_an_argument_that_exists_is_a_path_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan=1.png").touch()
    (tmp_path / "id=3").mkdir()
    (tmp_path / "id=3" / "x.png").touch()
    arguments = ["scan=1.png", "generation.num_beams=2", "id=3/x.png", "./scan=2.png", "A=1.png", "none.png", "seed=1"]
    paths, overrides = split_arguments(arguments)
    assert paths == ["scan=1.png", "id=3/x.png", "./scan=2.png", "A=1.png", "none.png"]
    assert overrides == ["generation.num_beams=2", "seed=1"]
    with pytest.raises(UsageError, match="no images"):
        split_arguments(["seed=1"])


def test_the_same_command_again_continues(
    tiny_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(images), "--model", str(tiny_run), "-o", str(tmp_path / "out"), "--study-by", "file"]
    assert main(arguments) == 0
    Image.new("L", (30, 20), 30).save(images / "new.png")
    assert main(arguments) == 0
    assert "2 reports from an earlier run kept" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    assert sorted(Path(row["path"]).name for row in rows) == ["[bold]ü.png", "a b.png", "new.png"]


def test_shards_and_their_merge(
    tiny_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for shard in ("0/2", "1/2"):
        assert main(["generate", str(images), "-m", str(tiny_run), "-o", str(out), "--shard", shard]) in (0, 1)
    assert not (out / "reports.jsonl").exists()
    capsys.readouterr()
    assert main(["generate", "--merge", str(out), "--json"]) == 2
    assert "--json has no effect with --merge" in capsys.readouterr().err
    assert main(["generate", "--merge", str(out)]) == 0
    assert "2 reports in" in capsys.readouterr().err
    assert len((out / "reports.jsonl").read_text().splitlines()) == 2


def test_a_table_in_place_of_paths(tiny_run: Path, images: Path, tmp_path: Path) -> None:
    (images / "table.csv").write_text("scan,study\na b.png,s\ndeeper/[bold]ü.png,s\n")
    columns = ["--image-column", "scan", "--study-column", "study"]
    table = ["generate", "-m", str(tiny_run), "-o", str(tmp_path / "out"), "--table", str(images / "table.csv")]
    assert main([*table, *columns]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    assert row["study"] == "s"
    assert len(row["files"]) == 2
    assert main([*table, str(images)]) == 2


def test_the_page_shows_where_the_model_looked(varied_run: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(images), "-m", str(varied_run), "--study-by", "file", "-o"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    cards = [json.loads(line) for line in (tmp_path / "out" / "page.jsonl").read_text().splitlines()]
    assert [len(card["maps"]) for card in cards] == [len(row["sentences"]) for row in rows]
    assert all(peak > 1 for card in cards for peak in card["peaks"])
    for row in rows:
        assert len(row["word_confidence"]) == len(row["report"].split())
        assert row["mean_token_logprob"] < 0
        assert all(0 < one["confidence"] <= 1 for one in row["sentences"])
    text = (tmp_path / "out" / "page.html").read_text()
    assert "emrrg generate" in text
    assert text.count("data-map=") == sum(len(card["maps"]) for card in cards) > 0
    assert main([*arguments, str(tmp_path / "plain"), "--no-grounding", "--page", "1"]) == 0
    text = (tmp_path / "plain" / "page.html").read_text()
    assert (text.count("<article"), text.count("data-map=")) == (1, 0)
