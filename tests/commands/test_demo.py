"""The demo, shortened: its commands run, its figures follow from its files, its page stands."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.app import main
from emrrg_cli.commands.demo import Steps
from emrrg_cli.demo import LEGEND, read_result, write_demo_page
from emrrg_cli.errors import EmrrgError, Interrupted, UsageError
from emrrg_cli.files.records import append_jsonl


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


@pytest.mark.slow
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
    reports = iter(["clear ."] * 4 + ["effusion ."] * 6)
    result = read_result(phantoms, predictions(phantoms, tmp_path, lambda row: next(reports)))
    write_demo_page(tmp_path / "page.html", phantoms, result, {"BLEU_1": 0.5, "METEOR": None}, ["emrrg demo"])
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/jpeg") == len(result.study_ids)
    assert "synthetic" in text.lower()
    assert "needs Java" in text
    assert "not for diagnosis" in text
    assert all(f"<span class='tag {kind}'>{words}</span>" in text for words, kind in LEGEND)
    assert "The model wrote 2 different reports for 10 films." in text


SMALL = ("model.encoder.d_model=16", "model.encoder.depth=1", "model.encoder.image_size=32")


@pytest.mark.slow
def test_stopped_the_same_command_continues_to_the_end(
    tmp_path: Path, no_java: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a smaller model, to be quick; the commands are those a user sees."""
    from emrrg_cli.training import loop

    ran: list[list[str]] = []
    run = Steps.run

    def smaller(self: Steps, *arguments: str, again: Any = ()) -> None:
        start = self._run_command
        changes = [*SMALL, "train.validation_limit=2"] if arguments[0] == "finetune" else []

        def start_smaller(line: Any) -> int:
            ran.append(line)
            return start([*line, *changes])

        self._run_command = start_smaller
        run(self, *arguments, again=again)
        self._run_command = start

    monkeypatch.setattr(Steps, "run", smaller)
    out = tmp_path / "demo"
    command = ["demo", str(out), "--count", "100", "--epochs", "1"]
    step = loop._Loop._optimizer_step  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:

        def stopped(self: Any, *arguments: Any) -> Any:
            if self.progress.step == 1:
                signal.raise_signal(signal.SIGINT)
            return step(self, *arguments)

        patch.setattr(loop._Loop, "_optimizer_step", stopped)  # type: ignore[attr-defined]
        assert main(command) == 130
    told = capsys.readouterr().err
    assert told.endswith("\nThe same command continues the demo.\n")
    stopped_at, steps = map(int, re.search(r"stopped at step (\d+) of (\d+)", told).groups())  # type: ignore[union-attr]
    assert stopped_at < steps
    # Warnings before, as that of a busy machine, may name it.
    assert "--resume" not in told[told.index("stopped at step") :]

    assert main(command) == 0
    assert [line[0] for line in ran] == ["preprocess", "finetune", "finetune", "evaluate", "generate"]
    assert ran[2] == [*ran[1], "--resume"]
    shown = capsys.readouterr().out
    assert "emrrg evaluate --model" in shown
    assert "shuffled images" in shown
    assert "not for diagnosis" in shown
    assert (out / "page.html").is_file()
    assert len((out / "reports" / "reports.jsonl").read_text().splitlines()) == 10
    assert json.loads((out / "scores" / "scores.json").read_text())["studies"] == 10

    assert main(command) == 0  # finished: shown again, nothing is run
    assert len(ran) == 5
    assert main(["demo", str(out)]) == 2
    assert "holds a demo with other options" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["demo", str(tmp_path)]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_ctrl_c_in_any_step_says_how_to_continue(tmp_path: Path) -> None:
    def stopped(arguments: Any) -> int:
        raise KeyboardInterrupt

    steps = Steps(tmp_path / "demo", {"count": 100}, stopped)
    with pytest.raises(Interrupted) as raised:
        steps.run("doctor")
    assert raised.value.hint == "The same command continues the demo."
    ran: list[Any] = []
    Steps(tmp_path / "demo", {"count": 100}, lambda line: ran.append(line) or 0).run("doctor", again=["--json"])
    assert ran == [["doctor", "--json"]]
    Steps(tmp_path / "demo", {"count": 100}, stopped).run("doctor")  # finished
    with pytest.raises(UsageError, match="a demo with other options"):
        Steps(tmp_path / "demo", {"count": 101}, stopped)


def test_a_failed_step_ends_the_demo_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(EmrrgError) as raised:
        Steps(tmp_path / "demo", {}, main).run("recipe", "show", "nowhere/nothing")
    assert raised.value.exit_code == 2
