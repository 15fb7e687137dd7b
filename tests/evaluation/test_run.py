"""Scoring a run: which references, which studies, and where the result goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.errors import Interrupted, RunError, UsageError
from emrrg_cli.evaluation import assess, split_reports
from emrrg_cli.evaluation import run as evaluation
from emrrg_cli.evaluation.protocol import describe_protocol
from emrrg_cli.evaluation.run import RunOptions, run_evaluation
from emrrg_cli.files.records import read_jsonl
from emrrg_cli.recipe.load import load_run_recipe
from tests.benchmarks.agreement import chosen


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """METEOR takes seconds to start; `tests/metrics` looks at it."""
    for name in ("PATH", "JAVA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture
def evaluate(varied_run: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluates `varied_run` with changes; the result with the predictions beside it."""

    def run(*overrides: str, split: str = "test", name: str = "out", overwrite: bool = False) -> dict[str, Any]:
        recipe = load_run_recipe(varied_run, None, overrides, "evaluate")
        result = run_evaluation(recipe, varied_run, split, tmp_path / name, options=RunOptions(overwrite))
        assert result is not None
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        assert json.loads((tmp_path / name / "scores.json").read_text()) == result
        return {**result, "predictions": [json.loads(line) for line in lines]}

    return run


def test_each_study_is_written_once_with_its_whole_reference(evaluate: Any) -> None:
    result = evaluate("data.max_report_tokens=3")
    assert [row["study_id"] for row in result["predictions"]] == ["study20", "study21", "study22", "study23"]
    assert [row["reference"] for row in result["predictions"]] == [
        "study of the chest . the heart is enlarged . no pneumothorax .",
        "study of the chest . there is a left pleural effusion . no pneumothorax .",
        "study of the chest . a nodule is seen in the right upper lobe . no pneumothorax .",
        "study of the chest . the lungs are clear . no pneumothorax .",
    ]
    assert (result["studies"], result["split"]) == (4, "test")


@pytest.mark.slow
def test_references_are_cut_to_training_length_on_request(evaluate: Any, varied_run: Path) -> None:
    from emrrg_cli.models.llm import load_tokenizer

    result = evaluate("data.max_report_tokens=12", "evaluation.references=clipped")
    tokenizer = load_tokenizer(str(varied_run / "tokenizer"))
    whole = evaluate(name="whole")["predictions"]
    for row, uncut in zip(result["predictions"], whole, strict=True):
        assert row["reference"] == " ".join(tokenizer.decode(tokenizer.encode(uncut["reference"])[:12]).split())
        assert uncut["reference"].startswith(row["reference"])
        assert row["reference"] != uncut["reference"]
    # Nothing is cut, and nothing is added either, where a report fits.
    long = evaluate("data.max_report_tokens=500", "evaluation.references=clipped", name="long")["predictions"]
    assert [row["reference"] for row in long] == [row["reference"] for row in whole]


def test_the_scores_are_those_of_the_predictions(evaluate: Any) -> None:
    from emrrg_cli.evaluation.language import score

    result = evaluate("generation.min_new_tokens=8", split="train")
    references, hypotheses = zip(*((row["reference"], row["hypothesis"]) for row in result["predictions"]), strict=True)
    assert result["scores"] == score(references, hypotheses, meteor=False)
    assert result["scores"]["METEOR"] is None


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_batch(evaluate: Any) -> None:
    alone = evaluate("generation.batch_size=1", name="1")["predictions"]
    assert alone == evaluate("generation.batch_size=3", name="3")["predictions"]


@pytest.mark.slow
def test_overrides_change_decoding(evaluate: Any) -> None:
    longer, shorter = evaluate(name="longer"), evaluate("generation.max_new_tokens=1", name="shorter")
    assert shorter["settings"]["generation"]["max_new_tokens"] == 1
    for short, long in zip(shorter["predictions"], longer["predictions"], strict=True):
        assert long["hypothesis"].startswith(short["hypothesis"])
        assert long["hypothesis"] != short["hypothesis"]


@pytest.mark.slow
def test_sampling_is_reproducible(evaluate: Any) -> None:
    sampled = ("generation.do_sample=true", "generation.min_new_tokens=8")
    first = evaluate(*sampled, name="1")["predictions"]
    assert first == evaluate(*sampled, name="2")["predictions"]
    assert first != evaluate(*sampled, "generation.seed=1", name="3")["predictions"]


def test_a_missing_split_is_refused_with_a_list_of_splits(evaluate: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no split named traning") as caught:
        evaluate(split="traning")
    assert evaluate(split="val", name="other")["split"] == "validation"
    assert caught.value.hint == "Its splits are: train, validation, test."
    assert not (tmp_path / "out").exists()


def test_no_data_and_wrong_data_are_refused(varied_run: Path, tmp_path: Path) -> None:
    recipe = load_run_recipe(varied_run, None, (), "evaluate")
    recipe.data.root = None
    with pytest.raises(UsageError, match="no data: give --data DIR"):
        run_evaluation(recipe, varied_run, "test", tmp_path / "out")
    recipe.data.root = str(tmp_path / "none")
    with pytest.raises(UsageError, match="no such dataset directory"):
        run_evaluation(recipe, varied_run, "test", tmp_path / "out")


def test_a_split_without_the_requested_text_is_an_error(evaluate: Any) -> None:
    with pytest.raises(RunError, match=r"/.*: no study of the test split has text for data\.section=findings"):
        evaluate("data.section=findings")


def test_a_run_without_a_model_is_an_error(varied_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes((varied_run / "recipe.yaml").read_bytes())
    recipe = load_run_recipe(tmp_path / "run", None, (), "evaluate")
    with pytest.raises(RunError, match="has no trained model yet"):
        run_evaluation(recipe, tmp_path / "run", "test", None)


def test_reports_are_kept_if_a_score_fails(
    evaluate: Any, varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(name="whole")["predictions"]

    def fail(*arguments: Any, **options: Any) -> None:
        raise RunError("no score today")

    monkeypatch.setattr(assess, "tokenized", fail)
    with pytest.raises(RunError, match="no score today"):
        evaluate(name="out")
    written = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == whole
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["made_with.json", "predictions.jsonl"]


@pytest.mark.slow
def test_a_second_evaluation_reuses_the_reports(
    varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(varied_run, run)
    recipe = load_run_recipe(run, None, (), "evaluate")
    first = run_evaluation(recipe, run, "test", None)
    assert first is not None

    def load(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "load_model", load)
        second = run_evaluation(recipe, run, "test", None)
        assert second == first | {"predictions_reused": True}
        again = RunOptions(overwrite=True)
        assert run_evaluation(recipe, run, "test", run / "evaluation" / "test", options=again) == second
    assert first["predictions_reused"] is False
    # Other settings, or another model, are another evaluation.
    changed = load_run_recipe(run, None, ("generation.max_new_tokens=2",), "evaluate")
    other = run_evaluation(changed, run, "test", None)
    assert other is not None
    assert (Path(other["output"]).name, other["predictions_reused"]) == ("test-2", False)
    os.utime(run / "model" / "bridge.safetensors", (1, 1))
    other = run_evaluation(recipe, run, "test", None)
    assert other is not None
    assert (Path(other["output"]).name, other["predictions_reused"]) == ("test-3", False)


def test_reports_of_other_studies_are_not_reused(evaluate: Any, tmp_path: Path) -> None:
    evaluate()
    file = tmp_path / "out" / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    wrong = [lines[1:], [*lines[1:], lines[0]], [lines[0].replace("hypothesis", "text"), *lines[1:]], ["{\n", *lines]]
    for changed in wrong:
        file.write_text("".join(changed))
        (tmp_path / "out" / "scores.json").unlink(missing_ok=True)
        with pytest.raises(UsageError, match="already holds reports of another model"):
            evaluate()
    assert evaluate(overwrite=True)["predictions_reused"] is False
    assert file.read_text() == "".join(lines)
    (tmp_path / "out" / "made_with.json").write_text("{")
    assert evaluate(overwrite=True)["predictions_reused"] is False


def test_samples_are_written_on_request(evaluate: Any, tmp_path: Path) -> None:
    sampling = ("generation.num_beams=1", "generation.do_sample=true", "generation.temperature=3.0")
    scores = {"BLEU_1": 1.0, "word_recall": 0.5}
    agreement = (f"generation.consensus_scores={json.dumps(scores)}", "generation.consensus=8")
    result = evaluate(*sampling, *agreement, "evaluation.samples=true")
    rows = read_jsonl(tmp_path / "out" / "samples.jsonl")
    for row, written in zip(rows, result["predictions"], strict=True):
        assert (row["study_id"], row["reference"]) == (written["study_id"], written["reference"])
        assert sum(row["samples"].values()) == 8
        assert chosen(row["samples"], scores) == written["hypothesis"]
    assert len(rows[0]["samples"]) > 1
    plain = evaluate(*sampling, *agreement, name="plain")
    assert plain["predictions"] == result["predictions"]
    assert not (tmp_path / "plain" / "samples.jsonl").exists()
    with pytest.raises(UsageError, match="needs generation"):
        evaluate("evaluation.samples=true", name="other")


def test_reports_of_an_earlier_version_are_reused(evaluate: Any, tmp_path: Path) -> None:
    assert evaluate()["predictions_reused"] is False
    file = tmp_path / "out" / "made_with.json"
    kept = json.loads(file.read_text())
    settings = kept["made_with"]["settings"]
    del settings["findings_threshold"], settings["generation"]["consensus"], settings["generation"]["beam_stop"]
    file.write_text(json.dumps(kept))
    (tmp_path / "out" / "scores.json").unlink()
    assert evaluate()["predictions_reused"] is True
    settings["generation"]["consensus_scores"] = {"BLEU_4": 1.0}  # not the default
    file.write_text(json.dumps(kept))
    (tmp_path / "out" / "scores.json").unlink()
    with pytest.raises(UsageError, match="already holds reports of another model"):
        evaluate()


def test_image_controls_show_other_films(varied_run: Path, tmp_path: Path) -> None:
    recipe = load_run_recipe(varied_run, None, (), "evaluate")
    options = evaluation.RunOptions(image_controls=True)
    result = run_evaluation(recipe, varied_run, "test", tmp_path / "out", options=options)
    assert result is not None
    names = ["dealt", "most_frequent", "most_typical", "blank_films", "other_films", "nearest_training_study"]
    assert list(result["controls"]) == names
    texts = {
        name: [row["hypothesis"] for row in read_jsonl(tmp_path / "out" / f"predictions{name}.jsonl")]
        for name in ("", "_blank_films", "_other_films", "_nearest_training_study")
    }
    assert len(set(texts["_blank_films"])) == 1  # every film is the same
    assert len(set(texts[""])) > 1
    assert sorted(texts["_other_films"]) == sorted(texts[""])
    assert texts["_other_films"] != texts[""]
    assert len(texts["_nearest_training_study"]) == len(texts[""])


def test_study_ids_are_read_once(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emrrg_cli.datasets.directory import open_dataset
    from emrrg_cli.datasets.report_dataset import ReportDataset
    from emrrg_cli.recipe.common import DataSettings

    split = open_dataset(tiny_dataset)["train"]
    reads = []
    read = type(split).__getitem__
    monkeypatch.setattr(type(split), "__getitem__", lambda rows, key: reads.append(key) or read(rows, key))
    dataset = ReportDataset(split, DataSettings(), 32)
    assert [dataset.study_ids[i] for i in range(len(dataset))] == [f"study{i:02d}" for i in range(16)]
    assert len([key for key in reads if isinstance(key, str)]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_reports_are_kept_after_an_interruption(
    evaluate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    whole = evaluate("generation.batch_size=1", name="whole")["predictions"]
    save, saved = split_reports.append_jsonl, []

    def interrupted(*arguments: Any) -> None:
        saved.append(1)
        if len(saved) == 3:
            os.kill(os.getpid(), number)
        save(*arguments)

    monkeypatch.setattr(split_reports, "append_jsonl", interrupted)
    with pytest.raises(Interrupted, match=r"2 reports saved in .*out/; run the same command again") as caught:
        evaluate("generation.batch_size=1")
    assert caught.value.exit_code == code
    written = (tmp_path / "out" / "predictions.jsonl.partial").read_text().splitlines()
    assert [json.loads(line) for line in written] == whole[:2]
    with pytest.raises(UsageError, match="already holds reports of another model, data or settings"):
        evaluate("generation.max_new_tokens=7")
    (tmp_path / "out" / "predictions.jsonl.partial").rename(tmp_path / "out" / "predictions-1.jsonl.partial")
    capsys.readouterr()
    read, files = split_reports.read_jsonl, []
    monkeypatch.setattr(split_reports, "read_jsonl", lambda file: files.append(file.name) or read(file))
    assert evaluate("generation.batch_size=1")["predictions"] == whole  # with another number of processes
    assert files.count("predictions-1.jsonl.partial") == 1
    assert "2 reports of the stopped evaluation are kept; 2 are left" in capsys.readouterr().err
    assert len(saved) == 3 + 2
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert names == {entry.name for entry in (tmp_path / "whole").iterdir()}


def test_a_tokenizer_without_java_is_refused_before_loading(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluation, "load_model", load)
    with pytest.raises(RunError, match="the ptb tokenizer needs Java"):
        evaluate("evaluation.tokenizer=ptb")


def test_an_evaluation_overwrites_nothing(varied_run: Path, tmp_path: Path) -> None:
    target = evaluation._target
    assert target(tmp_path, "test", None, False) == tmp_path / "evaluation" / "test"
    for name in ("test", "test-2"):
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "evaluation" / name / "scores.json").touch()
    assert target(tmp_path, "test", None, False) == tmp_path / "evaluation" / "test-3"
    assert target(tmp_path, "train", None, False) == tmp_path / "evaluation" / "train"
    taken = tmp_path / "evaluation" / "test"
    with pytest.raises(UsageError, match="already holds an evaluation"):
        target(tmp_path, "test", taken, False)
    assert target(tmp_path, "test", taken, True) == taken


def test_a_wrong_output_is_refused_before_the_model_loads(
    varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluation, "load_model", load)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file"):
        run_evaluation(load_run_recipe(varied_run, None, (), "evaluate"), varied_run, "test", tmp_path / "file")


@pytest.mark.parametrize("name", ["scores.json", "predictions.jsonl.partial", "page.html"])
def test_an_output_with_links_out_of_it_is_refused(evaluate: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("")
    (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match=rf"{name} is a link to .*precious: nothing is written"):
        evaluate()
    assert (tmp_path / "precious").read_text() == ""


def test_an_output_removed_during_the_run_is_an_error(
    evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = split_reports.append_jsonl

    def remove(*arguments: Any) -> None:
        save(*arguments)
        shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(split_reports, "append_jsonl", remove)
    with pytest.raises(RunError, match="out was removed while the program wrote to it"):
        evaluate()
    assert not (tmp_path / "out").exists()


def test_the_protocol_is_one_line_with_all_settings_of_scores(varied_run: Path) -> None:
    def described(*overrides: str) -> str:
        return describe_protocol(load_run_recipe(varied_run, None, overrides, "evaluate"))

    line = described()
    assert "\n" not in line
    assert line.startswith("protocol ours: section report, cleaning auto, references whole, tokenizer whitespace, ")
    assert "backbone trained whole" in line
    assert "beams 1, new tokens 0-8" in line
    published = described("protocol=published")
    assert published.startswith("protocol published: ")
    assert "references clipped" in published
    assert "beams 3, new tokens 80-120, repetition penalty 2.0, length penalty 2.0" in published
    sampled = described("generation.do_sample=true", "generation.temperature=0.5", "generation.top_p=0.9")
    assert "sampled (temperature 0.5, top-p 0.9)" in sampled


@pytest.mark.parametrize(("targets", "told"), [(["X", "Z"], "frozen with LoRA on X, Z"), ("none", "backbone frozen;")])
def test_the_protocol_says_what_was_trained(varied_run: Path, targets: Any, told: str) -> None:
    recipe = load_run_recipe(varied_run, None, (), "evaluate")
    recipe.model.adapter.targets = targets
    assert told in describe_protocol(recipe)


def test_two_evaluations_do_not_share_a_folder(evaluate: Any, tmp_path: Path) -> None:
    from emrrg_cli.errors import EmrrgError
    from emrrg_cli.files.locks import locked

    with locked(tmp_path / "out"), pytest.raises(EmrrgError, match="out"):
        evaluate()
    assert not (tmp_path / "out").exists()
    evaluate()


def test_labels_of_the_data_set_are_read_for_its_studies() -> None:
    from types import SimpleNamespace
    from typing import cast

    import datasets

    from emrrg_cli.datasets.report_dataset import ReportDataset

    columns = {
        "labels": [["Edema"], [], ["Pneumonia"]],
        "labels_uncertain": [["Fracture"], [], []],
        "labels_absent": [[], ["Edema"], []],
    }

    def known(names: dict[str, Any]) -> list[dict[str, str | None]]:
        split = datasets.Dataset.from_dict(names)
        return evaluation.reference_labels(cast(ReportDataset, SimpleNamespace(split=split, rows=[2, 0])))

    found = known(columns)
    assert [{name: value for name, value in row.items() if value} for row in found] == [
        {"Pneumonia": "positive"},
        {"Edema": "positive", "Fracture": "uncertain"},
    ]
    assert len(found[0]) == 14
    with pytest.raises(UsageError, match="no column labels_uncertain"):
        known({"labels": columns["labels"]})
    with pytest.raises(UsageError, match="are not CheXpert's: scoliosis"):
        known(columns | {"labels": [["scoliosis"], [], ["scoliosis"]]})
