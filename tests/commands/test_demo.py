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
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_text import sentence_spans
from emrrg_cli.default_model import SYNTHETIC_ONLY
from emrrg_cli.demo import LEGEND, compared, read_result
from emrrg_cli.errors import EmrrgError, Interrupted, UsageError
from emrrg_cli.phantom.reader import read_labels


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    assert main(["preprocess", "phantom", str(out), "--count", "100", "--size", "64", "--workers", "1"]) == 0
    return out


def answers(data: Path, answer: Any) -> dict[str, str]:
    """What a model writes for each study of the test split."""
    return {row["study_id"]: answer(row) for row in open_dataset(data)["test"]}


@pytest.mark.slow
def test_perfect_reports_score_one_and_blind_answers_less(phantoms: Path) -> None:
    result = read_result(phantoms, answers(phantoms, lambda row: row["findings"].lower()))
    model, shuffled, usual = result.f1["micro"]
    assert model == 1.0
    assert shuffled < 1.0
    assert usual == 0.0  # the most frequent findings of the training split are none
    assert len(result.study_ids) == 10


def test_an_empty_report_finds_nothing(phantoms: Path) -> None:
    result = read_result(phantoms, answers(phantoms, lambda row: "the lungs are clear ."))
    assert result.f1["micro"][0] == 0.0


def test_found_invented_and_missed_are_distinguished() -> None:
    report = "the heart is enlarged . there is a nodule . no pneumothorax ."
    spans = [{"start": a, "end": b} for a, b in sentence_spans(report)]
    reference = "there is cardiomegaly . a small left pneumothorax is seen . the bones are intact ."
    row = compared({"report": report, "sentences": spans}, {"cardiomegaly", "pneumothorax"}, reference)
    assert row["tags"] == [("cardiomegaly", "good"), ("nodule", "bad"), ("pneumothorax", "missed")]
    assert row["sentence_tags"] == ["good", "bad", ""]
    assert [tag for _, tag in row["reference"]] == ["good", "missed", ""]


@pytest.mark.slow
def test_the_demo_shows_the_default_model_on_unseen_films(
    default_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    command = ["demo", str(out), "--count", "12"]
    assert main(command) == 0
    shown = capsys.readouterr()
    for text in ("emrrg generate", "F1 of findings, 12 unseen synthetic films", "shuffled films", "not for diagnosis"):
        assert text in shown.out
    assert SYNTHETIC_ONLY in shown.err
    test = open_dataset(out / "data")["test"]
    assert {len(images) for images in test["images"]} == {1, 2}  # lateral films too
    text = (out / "page.html").read_text()
    rows = [json.loads(line) for line in (out / "reports" / "reports.jsonl").read_text().splitlines()]
    assert text.count("<article") == text.count("<b>Reference</b>") == len(rows) == 12
    assert text.count("data-map=") == sum(len(row["sentences"]) for row in rows) > 0
    assert all(f"<span class='tag {kind}'>{words}</span>" in text for words, kind in LEGEND)
    assert f"The model wrote {len({row['report'] for row in rows})} different reports for 12 films." in text
    assert SYNTHETIC_ONLY in text
    missed = sum(len(set(row["labels"]) - read_labels(one["report"])) for row, one in zip(test, rows, strict=True))
    assert text.count("<span class='tag missed'>") == missed + 1 > 1  # and the legend
    assert main(command) == 0  # finished: shown again
    assert "not for diagnosis" in capsys.readouterr().out


@pytest.mark.usefixtures("no_default_model")
def test_without_a_default_model_the_demo_offers_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "demo")]) == 2
    told = capsys.readouterr().err
    assert "this installation has no default model" in told
    assert "`emrrg demo --train`" in told
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("options", [["--epochs", "2"], ["--train", "--count", "50"]])
def test_options_that_do_not_fit_are_refused(options: list[str], tmp_path: Path) -> None:
    assert main(["demo", str(tmp_path / "demo"), *options]) == 2
    assert not (tmp_path / "demo").exists()


SMALL = ("model.encoder.d_model=16", "model.encoder.depth=1", "model.encoder.image_size=32")


@pytest.mark.slow
def test_after_a_stop_the_same_command_continues(
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
    command = ["demo", str(out), "--train", "--count", "100", "--epochs", "1"]
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
    assert "shuffled films" in shown
    assert "not for diagnosis" in shown
    assert (out / "page.html").is_file()
    assert len((out / "reports" / "reports.jsonl").read_text().splitlines()) == 10
    assert json.loads((out / "scores" / "scores.json").read_text())["studies"] == 10

    assert main(command) == 0  # finished: shown again, nothing is run
    assert len(ran) == 5
    assert main(["demo", str(out), "--train"]) == 2
    assert "holds a demo with other options" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["demo", str(tmp_path), "--train"]) == 2
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


def test_a_folder_that_begins_with_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(steps: Steps, *arguments: str) -> None:
        raise UsageError(" ".join(arguments))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Steps, "run", refuse)
    assert main(["demo", "--", "-x"]) == 2
    assert f"preprocess phantom {tmp_path / '-x' / 'data'}" in capsys.readouterr().err
