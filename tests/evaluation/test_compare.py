"""Sets of reports side by side."""

from __future__ import annotations

import json
import random
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.app import main
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.compare import Contender, compare, find_contender
from emrrg_cli.evaluation.language import score
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.reporting.comparison_tables import comparison_csv, comparison_markdown
from emrrg_cli.scoring.meteor import java_path

WORDS = "the heart is enlarged no effusion left right pneumothorax . lungs are clear".split()  # noqa: SIM905


def _texts(seed: int, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(4, 16))) for _ in range(count)]


TRUTH = _texts(0)


def _contender(name: str, right: float, settings: Any = None, ids: Any = None) -> Contender:
    draw = random.Random(name)
    texts = [text if draw.random() < right else other for text, other in zip(TRUTH, _texts(5), strict=True)]
    return Contender(name, Predictions(ids or [f"s{i}" for i in range(len(TRUTH))], TRUTH, texts), settings)


def test_scores_are_those_of_score() -> None:
    first, second = _contender("a", 0.5), _contender("b", 0.6)
    rows = compare([first, second], resamples=100)["rows"]
    for row, one in zip(rows, (first, second), strict=True):
        wanted = score(one.predictions.references, one.predictions.hypotheses, meteor=False)
        for name in ("BLEU_4", "ROUGE_L", "CIDEr"):
            assert row["scores"][name] == pytest.approx(wanted[name], abs=1e-9)
            assert row["intervals"][name][0] < row["scores"][name] < row["intervals"][name][1]


def test_a_real_difference_is_found_and_a_random_one_is_not() -> None:
    result = compare([_contender("a", 0.3), _contender("b", 0.9), _contender("a", 0.3)], resamples=500)
    assert "against_first" not in result["rows"][0]
    better, same = result["rows"][1]["against_first"], result["rows"][2]["against_first"]
    assert better["p"]["CIDEr"] < 0.01 < better["differences"]["CIDEr"]
    assert (same["p"]["CIDEr"], same["differences"]["CIDEr"]) == (1.0, 0.0)
    assert [row["name"] for row in result["rows"]] == ["a (1)", "b", "a (3)"]


def test_a_few_studies_have_no_intervals() -> None:
    few = [replace(one, predictions=one.predictions.at(range(2))) for one in (_contender("a", 0.3), _contender("b", 1))]
    result = compare(few, resamples=100)
    assert all(row["intervals"] == {} for row in result["rows"])
    assert result["rows"][1]["against_first"]["intervals"] == {}
    assert result["remarks"] == [f"{name} has 2 studies; intervals need 6." for name in "ab"]
    assert "[" not in comparison_markdown(result)
    assert "a,2,BLEU_1," in comparison_csv(result)


def test_names_of_files_are_neither_html_nor_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "<img src=x onerror=alert(1)>.jsonl", tmp_path / "a\x1b[31m|b.jsonl"]
    for file in files:
        file.write_text('{"id": "s", "hypothesis": "clear", "reference": "clear"}\n')
    assert main(["compare", *map(str, files), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    written = (tmp_path / "out" / "compare.md").read_text()
    assert "\x1b" not in shown.out + shown.err + written
    assert "<img" not in written
    assert "&lt;img src=x onerror=alert(1)> has 1 study; intervals need 6." in written


def test_the_order_of_studies_does_not_matter() -> None:
    first = _contender("a", 0.5)
    order = list(reversed(range(len(TRUTH))))
    own = first.predictions
    turned = Predictions(*([side[i] for i in order] for side in (own.study_ids, own.references, own.hypotheses)))
    tested = compare([first, Contender("b", turned, None)], resamples=100)["rows"][1]["against_first"]
    assert set(tested["p"].values()) == {1.0}


def test_seeds_are_averaged_and_settings_shown() -> None:
    def settings(seed: int, targets: list[str]) -> dict[str, Any]:
        return {
            "output": f"runs/{seed}",
            "train": {"seed": seed, "lr": 1e-4},
            "model": {"adapter": {"targets": targets}},
        }

    runs = [
        _contender("x1", 0.5, settings(1, ["X"])),
        _contender("x2", 0.6, settings(2, ["X"])),
        _contender("z", 0.7, settings(1, ["Z"])),
    ]
    result = compare(runs, resamples=50)
    assert result["settings"] == ["model.adapter.targets"]
    group, alone = result["groups"]
    assert (group["name"], group["members"]) == ("x, mean of 2 seeds", ["x1", "x2"])
    assert (alone["name"], alone["members"], alone["deviation"]["CIDEr"]) == ("z", ["z"], None)
    values = [row["scores"]["CIDEr"] for row in result["rows"][:2]]
    assert group["mean"]["CIDEr"] == pytest.approx(sum(values) / 2)
    assert group["deviation"]["CIDEr"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def _chain(targets: str, seed: int, stage: str = "align") -> dict[str, Any]:
    encoder = {"weights": f"/data1/runs/{stage}-{seed}", "depth": 2}
    return {"train": {"seed": seed}, "model": {"encoder": encoder, "adapter": {"targets": targets}}}


def test_runs_of_a_chain_with_one_seed_are_a_group() -> None:
    names = [(targets, seed) for targets in ("X", "full") for seed in (1, 2, 3)]
    runs = [_contender(f"{targets}-{seed}", 0.5, _chain(targets, seed)) for targets, seed in names]
    others = [_contender(f"alone-{seed}", 0.5, _chain("X", seed, "pretrain")) for seed in (1, 2)]
    result = compare([*runs, *others], resamples=50)
    assert result["settings"] == ["model.encoder.weights", "model.adapter.targets"]
    wanted = [f"{name}, mean of {seeds} seeds" for name, seeds in (("X", 3), ("full", 3), ("alone", 2))]
    assert [group["name"] for group in result["groups"]] == wanted
    assert result["groups"][1]["settings"]["model.encoder.weights"] == "/data1/runs/align-{seed}"
    assert result["rows"][1]["settings"]["model.encoder.weights"] == "/data1/runs/align-2"


def test_groups_of_seeds_are_tested_over_studies_and_seeds() -> None:
    def runs(targets: str, rights: list[float]) -> list[Contender]:
        return [_contender(f"{targets}-{i}", right, _chain(targets, i)) for i, right in enumerate(rights)]

    first = runs("X", [0.3, 0.32, 0.35])
    others = [*runs("better", [0.9, 0.92, 0.95]), *runs("unsure", [0.2, 0.6, 0.95])]
    result = compare([*first, *others], resamples=500)
    groups = result["groups"]
    assert "against_first" not in groups[0]
    better, unsure = groups[1]["against_first"], groups[2]["against_first"]
    assert better["p"]["CIDEr"] < 0.01 < better["intervals"]["CIDEr"][0] < better["differences"]["CIDEr"]
    assert unsure["p"]["CIDEr"] > 0.05  # one of its seeds is worse
    spread = [result["rows"][i]["scores"]["CIDEr"] - result["rows"][i - 6]["scores"]["CIDEr"] for i in (6, 7, 8)]
    assert unsure["differences"]["CIDEr"] == pytest.approx(sum(spread) / 3)
    assert unsure["intervals"]["CIDEr"][1] - unsure["intervals"]["CIDEr"][0] > max(spread) - min(spread)
    same = compare([*first, *(replace(one, name=f"again-{one.name}", settings=_chain("Z", i)) for i, one in
                              enumerate(first))], resamples=100)["groups"][1]["against_first"]  # fmt: skip
    assert set(same["p"].values()) == {1.0}


def test_a_group_with_other_studies_is_not_tested() -> None:
    first = [_contender(f"X-{seed}", 0.5, _chain("X", seed)) for seed in (1, 2)]
    part = [replace(_contender(f"Z-{seed}", 0.5, _chain("Z", seed)), predictions=first[0].predictions.at(range(30)))
            for seed in (1, 2)]  # fmt: skip
    result = compare([*first, *part], resamples=20)
    assert "against_first" not in result["groups"][1]
    assert "Z, mean of 2 seeds: not tested against X, mean of 2 seeds, since the studies differ." in result["remarks"]


def test_an_evaluation_directory_has_the_name_of_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "run-1" / "evaluation" / "validation"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text('{"study_id": "a", "reference": "x", "hypothesis": "x"}\n')
    (folder / "scores.json").write_text(json.dumps({"model": "/elsewhere/run-1", "split": "validation"}))
    assert find_contender(folder, "test", None).name == "run-1"
    beams = folder.rename(folder.with_name("beams"))
    assert find_contender(beams, "test", None).name == "run-1/beams"


def test_different_studies_and_references_are_reported() -> None:
    first = _contender("a", 0.5)
    half = Predictions(*(list(side)[:30] for side in (first.predictions.study_ids, _texts(8), TRUTH)))
    result = compare([first, Contender("half", half, None)], resamples=20)
    assert result["rows"][1]["against_first"]["studies"] == 30
    assert [said.split(" ")[0] for said in result["remarks"]] == ["a", "The"]


def test_sets_without_a_common_study_are_refused() -> None:
    first = _contender("a", 0.5)
    other = _contender("a", 0.5, ids=[f"t{i}" for i in range(len(TRUTH))])
    message = r"^a \(1\) and a \(3\) have no study in common: their ids are such as s0 and t0"
    with pytest.raises(UsageError, match=message):
        compare([first, replace(first, name="b"), other], resamples=20)


def test_studies_in_common_are_scored_by_their_own_references() -> None:
    whole = _contender("whole", 0.5)
    part = Contender("part", whole.predictions.at(range(20)))
    tested = compare([whole, part], resamples=100)["rows"][1]["against_first"]
    assert tested["studies"] == 20
    assert set(tested["differences"].values()) == {0.0}
    assert set(tested["p"].values()) == {1.0}


def test_runs_of_one_seed_are_no_mean_over_seeds() -> None:
    settings = {"train": {"seed": 1}, "generation": {"num_beams": 1}}
    more = settings | {"generation": {"num_beams": 3}}
    runs = [_contender("a", 0.5, settings), _contender("b", 0.6, settings), _contender("c", 0.6, more)]
    result = compare(runs, resamples=20)
    assert result["settings"] == ["generation.num_beams"]
    assert not result["groups"]
    assert "a, b: runs with the same settings and the same seed" in result["remarks"][0]


@pytest.mark.skipif(java_path() is None, reason="needs Java")
def test_each_set_of_reports_has_its_own_tokenizer() -> None:
    one = _contender("a", 0.5)
    wanted = score(one.predictions.references, one.predictions.hypotheses, "ptb", meteor=False)
    result = compare([one, replace(one, name="b", tokenizer="ptb")], resamples=20)
    assert result["rows"][1]["scores"]["BLEU_1"] == pytest.approx(wanted["BLEU_1"], abs=1e-9)
    assert result["rows"][0]["scores"]["BLEU_1"] != pytest.approx(wanted["BLEU_1"], abs=1e-6)
    assert result["remarks"] == ["The tokenizers of a and b differ: their scores are not comparable."]


def test_one_set_of_reports_is_refused() -> None:
    with pytest.raises(UsageError, match="at least two"):
        compare([_contender("a", 0.5)])


@pytest.mark.slow
def test_runs_and_files_are_found(varied_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(varied_run, run)
    with pytest.raises(UsageError, match="has no predictions of the test split") as caught:
        find_contender(run, "test", None)
    assert caught.value.hint == f"Evaluate it first: emrrg evaluate --model {shlex.quote(str(run))} --split test"
    assert main(["evaluate", "-m", str(run), "--no-meteor", "--json"]) == 0
    other = tmp_path / "seed7"
    shutil.copytree(run, other)
    record = other / "evaluation" / "test" / "scores.json"
    scores = json.loads(record.read_text())
    scores["settings"]["train"]["seed"] = 7
    record.write_text(json.dumps(scores | {"model": "moved"}))  # the settings are those of the evaluation
    file = tmp_path / "theirs.jsonl"
    shutil.copy(run / "evaluation" / "test" / "predictions.jsonl", file)
    capsys.readouterr()
    arguments = ["compare", str(run), str(other), str(file), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["run", "seed7", "theirs"]
    assert result["note"] == "Research output: not for diagnosis."
    assert result["groups"][0]["members"] == ["run", "seed7"]
    assert result["rows"][2]["against_first"]["differences"]["BLEU_1"] == 0.0
    assert main(arguments) == 2  # the first comparison is kept
    assert "already holds a comparison" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert "theirs" in capsys.readouterr().out
    markdown = (tmp_path / "out" / "compare.md").read_text()
    assert markdown.startswith("| reports | BLEU-1 |")
    assert "| run, seed7, mean of 2 seeds |" in markdown
    assert (tmp_path / "out" / "compare.csv").read_text().count("\n") == 1 + 5 * len(result["rows"][0]["scores"])


def test_links_in_the_output_are_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out := tmp_path / "out").mkdir()
    (file := tmp_path / "a.csv").write_text("id,hypothesis,reference\n1,x,y\n")
    (out / "compare.csv").symlink_to(file)
    assert main(["compare", str(file), str(file), "--output", str(out)]) == 1
    assert "compare.csv is a link to" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["compare.csv"]


def test_options_without_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.csv"
    file.write_text("id,hypothesis,reference\n1,x,y\n")
    assert main(["compare", str(file), str(file), "--split", "test"]) == 2
    assert "--split has no effect without a run directory" in capsys.readouterr().err
    (evaluated := tmp_path / "evaluated").mkdir()
    (evaluated / "predictions.jsonl").write_text('{"id": 1, "hypothesis": "x", "reference": "y"}\n')
    assert main(["compare", str(evaluated), str(file), "--split", "validation"]) == 2
    assert "--split has no effect without a run directory" in capsys.readouterr().err
    assert main(["compare", str(evaluated), str(tmp_path), "--split", "validation"]) == 2
    assert "has no predictions of the validation split" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path), "--id-column", "id"]) == 2
    assert "--id-column has no effect without a prediction file" in capsys.readouterr().err
    assert main(["compare", str(file), str(file), "--id-column", "id", "--json"]) == 0
