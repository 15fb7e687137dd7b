"""`emrrg align` from the command line: arguments, where the run goes, and what is said when it cannot start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.app import main
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.training.summary import Summary


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What would have been trained."""
    calls: list[dict[str, Any]] = []

    def run_align(recipe: Any, run_dir: Path, **options: Any) -> Summary:
        calls.append({"recipe": recipe, "run_dir": run_dir, **options})
        return Summary(4, [0.25, -1.5], 2, "schedule ended", 12.5, None, True)

    monkeypatch.setattr("emrrg_cli.training.align.run_align", run_align)
    monkeypatch.setattr("emrrg_cli.recipe.paths.check_roots_exist", lambda *arguments, **options: None)  # no data
    monkeypatch.chdir(tmp_path)
    return calls


def test_print_recipe_prints_a_recipe_and_starts_nothing(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = "data.sets=[{root: 'a rather long name', weight: 0.5}, {root: " + "x" * 200 + "}]"
    assert main(["align", "phantom/align", sets, "--print-recipe"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe("phantom/align", [sets])
    assert started == []


def test_the_run_directory_is_the_option_or_from_the_recipe(
    started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", "phantom/align"]) == 0
    assert main(["align", "phantom/align", "output=from/recipe", "--verbose"]) == 0
    assert main(["align", "phantom/align", "output=from/recipe", "-o", "from/option"]) == 0
    places = [Path("runs/phantom-align"), Path("from/recipe"), Path("from/option")]
    assert [call["run_dir"] for call in started] == places
    assert [call["verbose"] for call in started] == [False, True, False]
    assert (started[0]["resume"], started[0]["expected_processes"]) == (False, 0)
    told = capsys.readouterr()
    assert told.out == ""
    assert "score 0.2500, loss 1.5000, step 2" in told.err
    assert "Next:  emrrg finetune RECIPE model.encoder.weights=from/option\n" in told.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["phantom/finetune"], "for `finetune`, not `align`"),
        (["phantom/align", "data.sets=[{root: a, weight: 0}]"], "data.sets[0].weight: must be more than 0, got 0"),
        (["phantom/align", "train.batch_size=1"], "train.batch_size: must be 2 or more, got 1"),
        (["phantom/align", "--resume"], "there is no run to resume here"),
        (["phantom/align", "-o", "taken"], "already exists and is not empty"),
    ],
)
def test_a_run_that_cannot_start_is_one_message(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["align", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert told in printed.err
    assert started == []
