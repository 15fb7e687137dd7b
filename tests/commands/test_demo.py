"""The demo, shortened: its commands run, its figures follow from its files, its page stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli import demo as work
from emrrg_cli.app import main
from emrrg_cli.demo import read_result, write_demo_page
from emrrg_cli.errors import EmrrgError
from emrrg_cli.files import append_jsonl


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    assert main(["preprocess", "phantom", str(out), "--count", "100", "--size", "64", "--workers", "1"]) == 0
    return out


def predictions(data: Path, folder: Path, answer: Any) -> Path:
    from emrrg_cli.datasets.directory import open_dataset

    for row in open_dataset(data)["test"]:
        text = answer(row)
        append_jsonl(folder / "predictions.jsonl", {"study_id": row["study_id"], "reference": "r", "hypothesis": text})
    return folder


def test_perfect_reports_score_one_and_the_blind_answers_less(phantoms: Path, tmp_path: Path) -> None:
    result = read_result(phantoms, predictions(phantoms, tmp_path, lambda row: row["findings"].lower()))
    model, shuffled, usual = result.f1["micro"]
    assert model == 1.0
    assert shuffled < 1.0
    assert usual == 0.0  # the most frequent findings of the training split are none
    assert len(result.study_ids) == 10


def test_a_report_of_nothing_finds_nothing(phantoms: Path, tmp_path: Path) -> None:
    result = read_result(phantoms, predictions(phantoms, tmp_path, lambda row: "the lungs are clear ."))
    assert result.f1["micro"][0] == 0.0


def test_page(phantoms: Path, tmp_path: Path) -> None:
    result = read_result(phantoms, predictions(phantoms, tmp_path, lambda row: row["findings"]))
    write_demo_page(tmp_path / "page.html", phantoms, result, {"BLEU_1": 0.5, "METEOR": None}, ["emrrg demo"])
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/jpeg") == len(result.study_ids)
    assert "synthetic" in text.lower()
    assert "needs Java" in text
    assert "not for diagnosis" in text


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a smaller model, to be quick; the commands are those a user sees."""
    ran: list[str] = []
    run = work.run

    def smaller(start: Any, arguments: list[str], commands: list[str]) -> None:
        ran.append(arguments[0])
        if arguments[0] == "finetune":
            arguments = [*arguments, "model.encoder.d_model=16", "model.encoder.depth=1", "model.encoder.image_size=32"]
            arguments += ["train.validation_limit=2", "train.max_steps=3"]
        run(start, arguments, commands)

    monkeypatch.setattr(work, "run", smaller)
    out = tmp_path / "demo"
    assert main(["demo", str(out), "--count", "100", "--epochs", "1"]) == 0
    assert ran == ["preprocess", "finetune", "evaluate", "generate"]
    shown = capsys.readouterr().out
    assert "emrrg evaluate --model" in shown
    assert "shuffled images" in shown
    assert "not for diagnosis" in shown
    assert (out / "page.html").is_file()
    assert len((out / "reports" / "reports.jsonl").read_text().splitlines()) == 10
    assert json.loads((out / "scores" / "scores.json").read_text())["studies"] == 10
    assert main(["demo", str(out)]) == 2  # the folder is taken


def test_a_failed_step_ends_the_demo_with_its_code() -> None:
    with pytest.raises(EmrrgError) as raised:
        work.run(main, ["recipe", "show", "nowhere/nothing"], [])
    assert raised.value.exit_code == 2
