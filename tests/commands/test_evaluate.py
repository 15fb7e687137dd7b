"""`emrrg evaluate` from the command line: what is printed where, and what is said when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest

from emrrg_cli.app import main
from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.errors import RunError
from emrrg_cli.evaluation import compare as comparing
from emrrg_cli.evaluation import file_evaluation
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.files.locks import locked


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """METEOR takes seconds to start."""
    for name in ("PATH", "JAVA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_run`, free to be evaluated in."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def test_scores_are_printed_and_a_second_run_overwrites_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(run)]) == 0
    printed = capsys.readouterr()
    told = " ".join(printed.out.split())
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR needs Java", "CIDEr"):
        assert name in told
    assert "protocol ours: section report, cleaning auto, references whole, tokenizer whitespace" in printed.out
    assert "METEOR was skipped: it needs Java" in printed.err
    assert "not for diagnosis" in printed.err
    assert f"Scores and predictions: {run}/evaluation/test" in printed.err
    first = (run / "evaluation" / "test" / "scores.json").read_text()
    assert main(["evaluate", "--model", str(run), "generation.max_new_tokens=3"]) == 0
    assert (run / "evaluation" / "test" / "scores.json").read_text() == first
    second = json.loads((run / "evaluation" / "test-2" / "scores.json").read_text())
    assert second["settings"]["generation"]["max_new_tokens"] == 3


@pytest.mark.slow
def test_stdout_has_only_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "-m", str(run), "--split", "validation", "-o", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (result["split"], result["scores"]["METEOR"]) == ("validation", None)
    assert main(arguments) == 2
    assert "already holds an evaluation" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_data_may_be_elsewhere(
    run: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "moved data")
    assert main(["evaluate", "-m", str(run), "--data", str(tmp_path / "moved data"), "data.limit=1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["data"], result["studies"]) == (str(tmp_path / "moved data"), 1)


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["--split", "tset"], 2, "no split named tset\nIts splits are: train, validation, test."),
        (["--data", "nowhere"], 2, "no such dataset directory: nowhere"),
        (["test"], 2, "test: not of the form key=value"),
        (["train.lr=1"], 2, "was fixed when the run was trained"),
        (["generation.num_beans=2"], 2, "did you mean generation.num_beams?"),
        (["--recipe", "tiny/finetune"], 2, "for `finetune`, not `evaluate`"),
        (["--num-processes", "0"], 2, "--num-processes must be a whole number, 1 or more"),
        (["data.section=findings"], 1, "data.section=findings"),
        (["evaluation.tokenizer=ptb"], 1, "the ptb tokenizer needs Java"),
    ],
)
def test_impossible_requests_are_one_message(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], code: int, told: str
) -> None:
    assert main(["evaluate", "--model", str(tiny_run), "-o", str(tmp_path / "out"), *extra]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert printed.err.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_directories_that_are_not_runs_are_refused(
    tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory, told in ((tmp_path / "none", "no such run directory"), (tiny_dataset, "is not a run directory")):
        assert main(["evaluate", "--model", str(directory)]) == 2
        assert told in capsys.readouterr().err
    assert main(["evaluate"]) == 2


def _predictions(folder: Path) -> Path:
    lines = [
        {"study_id": f"s{i}", "reference": text, "hypothesis": text if i % 3 else "no effusion ."}
        for i, text in enumerate(["the heart is enlarged .", "no pneumothorax .", "lungs are clear ."] * 8)
    ]
    path = folder / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_file_is_scored_with_its_controls(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--predictions", str(_predictions(tmp_path)), "--json"]
    assert main([*arguments, "--train", str(tiny_dataset)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"scores", "controls", "clinical", "image_matters", "image_p", "protocol"} <= set(result)
    assert list(result["controls"]) == ["dealt", "most_frequent", "most_typical"]
    for made in result["controls"].values():
        assert list(made["scores"]) == list(result["scores"])
    assert result["image_matters"] is True
    assert result["controls"]["most_frequent"]["report"].startswith("study of the chest .")
    assert main(arguments) == 0
    assert list(json.loads(capsys.readouterr().out)["controls"]) == ["dealt"]


@pytest.mark.parametrize("section", ["findings", "report"])
def test_training_reports_have_the_form_of_the_references(tmp_path: Path, section: str) -> None:
    texts = {"report": "Lungs are clear. Normal.", "findings": "Lungs are clear.", "impression": "Normal."}
    rows = [texts | {"study_id": f"s{n}", "source": "mimic_cxr"} for n in range(3)]
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(rows[:2]), test=datasets.Dataset.from_list(rows[2:]))
    for cleaning in ("r2gen-mimic", "none"):
        wanted = clean_report(texts[section], cleaning)
        with mock.patch.object(file_evaluation, "open_dataset", return_value=splits):
            reports, said = file_evaluation.training_reports(tmp_path, Predictions(["s2"], [wanted], ["x"]))
        assert reports == [wanted] * 2
        assert said.startswith(
            f"training reports: section {section}, cleaning {'none' if cleaning == 'none' else 'auto'}"
        )
        assert "that of 1 of 1 references" in said


def test_the_evaluation_of_a_file_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _predictions(tmp_path)
    out = str(tmp_path / "out")
    assert main(["evaluate", "--predictions", str(path), "--no-meteor", "--output", out, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert main(["compare", out, str(path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert first["scores"] == second["scores"]
    assert first["scores"]["CIDEr"] == pytest.approx(scores["CIDEr"], abs=1e-9)


def test_the_output_is_locked_during_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = _predictions(tmp_path), tmp_path / "out"
    for module, name, arguments in (
        (file_evaluation, "assess", ["evaluate", "--predictions", str(file)]),
        (comparing, "compare", ["compare", str(file), str(file)]),
    ):
        work = getattr(module, name)

        def at_work(*given: Any, work: Any = work, **options: Any) -> Any:
            with pytest.raises(RunError, match="another process is writing"), locked(out):
                pass
            return work(*given, **options)

        monkeypatch.setattr(module, name, at_work)
        assert main([*arguments, "--output", str(out)]) == 0
        assert main([*arguments, "--output", str(out)]) == 2
        assert "already holds" in capsys.readouterr().err


def test_a_file_is_shown_as_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _predictions(tmp_path)
    assert main(["evaluate", "--predictions", str(path), "--write-rexrank", str(tmp_path / "rexrank.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for said in ("shuffled", "rules (ours; not CheXbert)", "The image matters", "protocol file: texts"):
        assert said in printed
    assert main(["evaluate", "--predictions", str(tmp_path / "rexrank.json"), "--json"]) == 0
    back = json.loads(capsys.readouterr().out)
    assert main(["evaluate", "--predictions", str(path), "--json"]) == 0
    assert back["scores"] == json.loads(capsys.readouterr().out)["scores"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--split", "test"], "give either --model or --predictions"),
        (["--model", "a", "--predictions", "b"], "give either --model or --predictions"),
        (["--predictions", "none.jsonl"], "cannot read none.jsonl"),
        (["--predictions", "p.jsonl", "data.limit=1"], "data.limit=1 has no effect"),
        (["--predictions", "p.jsonl", "--data", "none"], "--data has no effect with --predictions"),
        (["--predictions", "p.jsonl", "--image-controls"], "--image-controls has no effect with --predictions"),
        (["--predictions", "p.jsonl", "--split", "test"], "--split has no effect with --predictions"),
        (["--model", "none", "--references", "r.jsonl"], "--references has no effect with --model"),
        (["--predictions", "p.jsonl", "--write-rexrank", __file__], "exists already"),
        (["--predictions", "p.jsonl", "--write-rexrank", f"{__file__}/x"], "is a file"),
        (["--predictions", "p.jsonl", "--write-rexrank", ".", "--overwrite"], ". is a folder"),
        (["--predictions"], "`emrrg evaluate --help` shows"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert told in capsys.readouterr().err
