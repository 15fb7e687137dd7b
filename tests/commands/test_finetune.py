"""`emrrg finetune` from the command line: arguments, where the run goes, and what is said when it cannot start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.app import main
from emrrg_cli.errors import RunError
from emrrg_cli.files.locks import locked
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.training.summary import Summary


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What would have been trained."""
    calls: list[dict[str, Any]] = []

    def run_finetune(recipe: Any, run_dir: Path, **options: Any) -> Summary:
        calls.append({"recipe": recipe, "run_dir": run_dir, **options})
        return Summary(4, [0.25, -1.5], 2, "schedule ended", 12.5, 2048.0, True)

    monkeypatch.setattr("emrrg_cli.training.finetune.run_finetune", run_finetune)
    monkeypatch.setattr("emrrg_cli.recipe.paths.check_roots_exist", lambda *arguments, **options: None)  # no data
    monkeypatch.chdir(tmp_path)
    return calls


def test_print_recipe_prints_a_recipe_and_starts_nothing(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = "/data/a rather long name that a terminal would wrap/" + "x" * 200
    assert main(["finetune", "tiny/finetune", f"data.root={root}", "train.lr=5e-5", "--print-recipe"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    expected = load_recipe("tiny/finetune", [f"data.root={root}", "train.lr=5e-5"])
    assert load_recipe(str(tmp_path / "printed.yaml")) == expected
    assert started == []


def test_the_run_directory_is_the_option_or_from_the_recipe(started: list[Any]) -> None:
    assert main(["finetune", "tiny/finetune"]) == 0
    assert main(["finetune", "tiny/finetune", "output=from/recipe"]) == 0
    assert main(["finetune", "tiny/finetune", "output=from/recipe", "-o", "from/option"]) == 0
    assert [call["run_dir"] for call in started] == [
        Path("runs/tiny-finetune"),
        Path("from/recipe"),
        Path("from/option"),
    ]
    assert (started[0]["resume"], started[0]["expected_processes"]) == (False, 0)


def test_the_result_and_next_commands_are_on_stderr(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "tiny/finetune", "-o", "my run"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    told = " ".join(printed.err.split())
    for text in ("run my run", "4 (schedule ended)", "score 0.2500, loss 1.5000, step 2", "12.50", "2,048 MiB"):
        assert text in told
    assert "emrrg evaluate --model 'my run'" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope"], "no shipped recipe is named nope"),
        (["data.root=x"], "the recipe is missing: data.root=x is in its place"),
        (["default/evaluate"], "for `evaluate`, not `finetune`"),
        (["tiny/finetune", "train.learning_rate=1"], "did you mean train.lr?"),
        (["tiny/finetune", "train.lr=fast"], "train.lr"),
        (["tiny/finetune", "--num-processes", "0"], "--num-processes must be a whole number, 1 or more"),
        (["tiny/finetune", "--resume"], "there is no run to resume here"),
        (["tiny/finetune", "-o", "taken"], "already exists and is not empty"),
        (["tiny/finetune", "-o", "taken/file"], "taken/file already exists"),
        (["tiny/finetune", "-o", "taken/file/run"], "is a file"),
    ],
)
def test_a_run_that_cannot_start_is_one_message(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["finetune", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert told in printed.err
    assert started == []


def test_no_data_and_wrong_data(tmp_path: Path, tiny_r2gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data, told in (
        ([], "data.root is not set"),
        ([f"data.root={tmp_path / 'none'}"], "no such dataset directory"),
        ([f"data.root={tiny_r2gen}"], "is not a dataset directory"),
    ):
        assert main(["finetune", "tiny/finetune", *data, "-o", str(tmp_path / "run")]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_another_recipe(
    tiny_run: Path, tiny_overrides: tuple[str, ...], started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "tiny/finetune", *tiny_overrides, "-o", str(tiny_run), "--resume"]
    assert main([*arguments, "train.lr=1e-5"]) == 2
    assert "train.lr differs" in capsys.readouterr().err
    assert main(arguments) == 0
    assert main(["finetune", str(tiny_run / "recipe.yaml"), "--resume"]) == 0
    assert [(call["run_dir"], call["resume"]) for call in started] == [(tiny_run, True)] * 2


def test_a_second_command_to_one_output_is_refused(
    tiny_overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "tiny/finetune", *tiny_overrides, "train.select=loss", "-o", str(tmp_path / "run")]
    with locked(tmp_path / "run"):
        assert main(arguments) == 1
        assert f"another process is writing to {tmp_path / 'run'} (process {os.getpid()}" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert main([*arguments, "train.stop_after_steps=1"]) == 0
    with locked(tmp_path / "run"):
        assert main([*arguments, "--resume"]) == 1
    assert main([*arguments, "--resume"]) == 0


def test_a_run_holds_the_lock_from_recipe_to_curve(
    tiny_overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(history: Any, path: Path) -> None:
        with pytest.raises(RunError, match="another process is writing to"):
            locked(tmp_path / "run").__enter__()
        drawn.append(path)

    drawn: list[Path] = []
    monkeypatch.setattr("emrrg_cli.training.run_setup.plot_curves", draw)
    arguments = ["finetune", "tiny/finetune", *tiny_overrides, "train.select=loss", "-o", str(tmp_path / "run")]
    assert main([*arguments, "train.stop_after_steps=1"]) == 0
    assert len(drawn) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("stage", ["pretrain", "align", "finetune"])
def test_a_missing_tracker_is_found_before_torch(tmp_path: Path, tiny_dataset: Path, stage: str) -> None:
    code = (
        "import sys; from importlib import metadata; known = metadata.version\n"
        "def version(name):\n    if name == 'wandb': raise metadata.PackageNotFoundError\n    return known(name)\n"
        "metadata.version = version\n"
        "from emrrg_cli.app import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    run = tmp_path / "run"
    arguments = [stage, f"phantom/{stage}", f"data.root={tiny_dataset}", "train.trackers=[wandb]", "-o", str(run)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"
    assert "error: train.trackers names wandb, which is not installed" in done.stderr
    assert "pip install wandb" in done.stderr
    assert not run.exists()


def test_missing_data_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    code = "import sys; from emrrg_cli.app import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    arguments = ["finetune", "tiny/finetune", f"data.root={tmp_path / 'none'}", "-o", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"
    assert "no such dataset directory" in done.stderr
