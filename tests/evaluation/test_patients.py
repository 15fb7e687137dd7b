"""Intervals and tests over patients with several studies."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from emrrg_cli.evaluation import bootstrap
from emrrg_cli.evaluation.assess import Options, assess
from emrrg_cli.evaluation.compare import Contender, compare
from emrrg_cli.evaluation.predictions import Predictions, read_predictions, save_predictions
from emrrg_cli.reporting.evaluation_tables import evaluation_tables

NORMAL, LARGE = "the heart is normal . no effusion .", "the heart is enlarged . no effusion ."


def _shown(table: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def _mean(sums: Any, studies: int) -> Any:
    return sums / studies


def test_patients_are_numbered() -> None:
    assert bootstrap.numbered([], 3) is None  # not known
    assert bootstrap.numbered(["a", "b", None], 3) is None  # each has one study
    numbers = bootstrap.numbered(["b", None, "b", None, "a"], 5)
    assert numbers is not None
    assert numbers.tolist() == [0, 1, 0, 2, 3]
    assert bootstrap.independent(5, numbers) == 4


def test_copies_of_studies_tell_nothing_new() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, size=(40, 1))
    copies, patients = np.repeat(values, 5, axis=0), np.repeat(np.arange(40), 5)
    own = bootstrap.intervals(values, _mean)
    assert bootstrap.intervals(copies, _mean, patients=patients) == pytest.approx(own)
    narrow = bootstrap.intervals(copies, _mean)
    assert narrow[0, 1] - narrow[0, 0] < 0.6 * (own[0, 1] - own[0, 0])
    p = bootstrap.p_greater(values[:, 0])
    assert bootstrap.p_greater(copies[:, 0], patients=patients) == pytest.approx(p)
    both = bootstrap.p_scores_greater(copies, np.zeros_like(copies), _mean, patients=patients)
    assert both[0] == pytest.approx(bootstrap.p_scores_greater(values, np.zeros_like(values), _mean)[0])


def test_patients_may_have_different_numbers_of_studies() -> None:
    patients = np.array([0] * 9 + list(range(1, 12)))
    values = np.ones((20, 1))
    sums = bootstrap.resampled_sums(values, 200, patients=patients)
    assert sums == pytest.approx(np.full((200, 1), 20.0))  # the mean of ones is one, however many are drawn


def test_tests_over_patients_are_right_under_the_null() -> None:
    draw = np.random.default_rng(1)
    patients = np.repeat(np.arange(40), 8)
    found = []
    for _ in range(200):
        values = draw.normal(size=40)[patients] + draw.normal(size=320)
        tests = (bootstrap.p_greater(values, 300), bootstrap.p_greater(values, 300, patients=patients))
        found.append([p < 0.05 for p in tests])
    studies, over_patients = np.mean(found, axis=0)
    assert over_patients < 0.1 < studies


def _predictions(name: str, patients: list[str] | None) -> Predictions:
    draw = np.random.default_rng(len(name))
    truth = [LARGE if i % 3 else NORMAL for i in range(60)]
    texts = [text if draw.random() < 0.6 else NORMAL for text in truth]
    return Predictions([f"s{i}" for i in range(60)], truth, texts, patients=patients or ())


def test_assess_draws_patients() -> None:
    grouped = _predictions("a", [f"p{i // 6}" for i in range(60)])
    options = Options(meteor=False)
    found, alone = (assess(one, options).record for one in (grouped, replace(grouped, patients=())))
    assert (found["patients"], alone["patients"]) == (10, None)
    assert found["scores"] == alone["scores"]
    assert found["intervals"]["CIDEr"] != alone["intervals"]["CIDEr"]
    text = _shown(evaluation_tables(found, "scores", 100)[0])
    assert "Intervals and tests draw 10 patients, each with all studies." in " ".join(text.split())
    few = assess(replace(grouped, patients=["p0"] * 30 + ["p1"] * 30), options).record
    assert few["left_out"]["intervals"] == "2 patients; intervals need 6"


def test_compare_knows_patients_of_either_file() -> None:
    patients = [f"p{i // 6}" for i in range(60)]
    one, other = _predictions("a", None), _predictions("bb", patients)
    result = compare([Contender("a", one), Contender("b", other)], resamples=200)
    assert [row["patients"] for row in result["rows"]] == [10, 10]
    unknown = Contender("c", replace(one, patients=[None] * 60))
    third = compare([Contender("a", replace(one, patients=patients)), unknown], resamples=200)
    assert [row["patients"] for row in third["rows"]] == [10, 10]  # a file that does not know them takes nothing away
    without = compare([Contender("a", one), Contender("b", replace(other, patients=()))], resamples=200)
    assert [row["patients"] for row in without["rows"]] == [None, None]
    assert result["rows"][1]["against_first"]["differences"] == without["rows"][1]["against_first"]["differences"]
    assert result["rows"][1]["intervals"] != without["rows"][1]["intervals"]


def test_patients_are_saved_and_read(tmp_path: Path) -> None:
    made = _predictions("a", [f"p{i // 6}" for i in range(60)])
    save_predictions(tmp_path / "p.jsonl", made)
    assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[7])["patient_id"] == "p1"
    assert list(read_predictions(tmp_path / "p.jsonl").patients) == list(made.patients)
    (tmp_path / "p.csv").write_text("id,patient_id,hypothesis,reference\n1,7,x,y\n2,,x,y\n3,7,x,y\n")
    assert list(read_predictions(tmp_path / "p.csv").patients) == ["7", None, "7"]
    (tmp_path / "q.csv").write_text("id,hypothesis,reference\n1,x,y\n")
    assert list(read_predictions(tmp_path / "q.csv").patients) == []
