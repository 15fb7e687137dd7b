"""Scores beside their controls, and whether the image matters, on reports whose truth is known."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation import controls
from emrrg_cli.evaluation.assess import Options, assess
from emrrg_cli.evaluation.language import score
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.labeling import label_reports
from emrrg_cli.reporting.evaluation_page import _scores
from emrrg_cli.reporting.evaluation_tables import evaluation_tables

FINDINGS = (
    "the heart is enlarged .",
    "there is a small left pleural effusion .",
    "there is a right pneumothorax .",
    "no acute cardiopulmonary abnormality .",
)
OPTIONS = Options(meteor=False, resamples=200)


def _studies(seed: int, count: int = 80) -> list[str]:
    draw = random.Random(seed)
    parts = ("the lungs are clear .", "bones are intact .", "the mediastinum is normal .", "no free air .")
    return [" ".join([draw.choice(FINDINGS), draw.choice(parts), draw.choice(parts)]) for _ in range(count)]


def _predictions(references: list[str], hypotheses: list[str]) -> Predictions:
    return Predictions([f"s{i}" for i in range(len(references))], references, hypotheses)


def test_a_derangement_moves_every_item() -> None:
    for studies in (2, 3, 50):
        orders = controls.derangements(studies)
        assert len(orders) == 20
        for order in orders:
            assert sorted(order) == list(range(studies))
            assert all(order != np.arange(studies))
    assert controls.derangements(1) == []
    again = controls.derangements(50)
    assert all(np.array_equal(a, b) for a, b in zip(again, controls.derangements(50), strict=True))
    assert len({tuple(order) for order in again}) == 20


def test_the_image_matters_if_reports_fit_their_studies() -> None:
    references = _studies(0)
    draw = random.Random(1)
    # Right for two studies in three, another's report for the rest.
    hypotheses = [text if draw.random() < 0.66 else draw.choice(references) for text in references]
    record = assess(_predictions(references, hypotheses), OPTIONS).record
    assert record["image_matters"] is True
    assert record["image_p"] < 0.001
    assert record["controls"]["dealt"]["scores"]["CIDEr"] < record["scores"]["CIDEr"] / 2
    assert record["image"].startswith("The image matters: CIDEr")


@pytest.mark.parametrize("seed", range(4))
def test_the_image_does_not_matter_for_random_reports(seed: int) -> None:
    references = _studies(0)
    record = assess(_predictions(references, _studies(seed + 10)), OPTIONS).record
    assert record["image_matters"] is False
    assert record["image_p"] > 0.01
    assert record["image"].startswith("NOTHING SHOWS THAT THE IMAGE IS USED")


def test_one_report_for_all_studies_shows_no_effect() -> None:
    references = _studies(0)
    record = assess(_predictions(references, [references[0]] * len(references)), OPTIONS).record
    assert (record["image_matters"], record["image_p"]) == (False, 1.0)
    assert record["controls"]["dealt"]["scores"] == pytest.approx(record["scores"])


def test_the_most_typical_report_agrees_with_the_others() -> None:
    reports = [
        "the lungs are clear .",
        " the lungs are  clear today .",
        "the heart and lungs are clear .",
        "effusion .",
    ]
    assert controls.most_typical([*reports, "", "effusion ."]) == "the lungs are clear today ."
    assert controls.most_typical(["", " "]) is None
    many = [f"the lungs are clear {number} ." for number in range(1500)]
    assert controls.most_typical(many) == controls.most_typical(many)  # drawn, with a seed


def test_controls_have_the_scores_of_their_own_reports() -> None:
    references, train = _studies(0), _studies(5, 300)
    hypotheses = _studies(3)
    others = {"blank_films": _studies(4)}
    options = Options(meteor=False, resamples=100, train_reports=train, others=others)
    record = assess(_predictions(references, hypotheses), options).record
    assert list(record["controls"]) == ["dealt", "most_frequent", "most_typical", "blank_films"]
    assert record["controls"]["most_typical"]["report"] == controls.most_typical(train)
    usual, count = Counter(train).most_common(1)[0]
    assert count > 1
    assert record["controls"]["most_frequent"]["report"] == usual
    wanted = score(references, [usual] * len(references), meteor=False)
    assert record["controls"]["most_frequent"]["scores"] == pytest.approx(wanted, abs=1e-9)
    wanted = score(references, others["blank_films"], meteor=False)
    assert record["controls"]["blank_films"]["scores"] == pytest.approx(wanted, abs=1e-9)
    dealt = [
        score(references, [hypotheses[i] for i in order], meteor=False)
        for order in controls.derangements(len(references))
    ]
    for name in ("BLEU_4", "ROUGE_L", "CIDEr"):
        mean = np.mean([one[name] for one in dealt])  # type: ignore[arg-type]
        assert record["controls"]["dealt"]["scores"][name] == pytest.approx(mean, abs=1e-9)
    assert all(list(made["scores"]) == list(record["scores"]) for made in record["controls"].values())


def test_scores_are_inside_their_intervals() -> None:
    record = assess(_predictions(_studies(0), _studies(3)), OPTIONS).record
    for name, value in record["scores"].items():
        if value is not None:
            low, high = record["intervals"][name]
            assert low < value < high
    assert "METEOR" not in record["intervals"]
    assert record["left_out"] == {"METEOR": "not requested"}


def test_a_few_studies_have_no_intervals() -> None:
    record = assess(_predictions(_studies(0)[:5], _studies(3)[:5]), OPTIONS).record
    assert record["intervals"] == {}
    assert record["left_out"]["intervals"] == "5 studies; intervals need 6"
    assert all("intervals" not in figures for figures in record["clinical"]["rules"].values())
    (scores, *_) = evaluation_tables(record, "test", 100)
    assert str(scores.caption) == "No intervals: 5 studies; intervals need 6."
    assert _scores(record)["note"].startswith("No intervals: 5 studies; intervals need 6. ")


def test_p_values_of_f1_need_reports_of_their_studies() -> None:
    references = _studies(0)
    own = assess(_predictions(references, references), OPTIONS).record["clinical"]["rules"]
    one = assess(_predictions(references, [references[0]] * len(references)), OPTIONS).record["clinical"]["rules"]
    for policy in ("uncertain_positive", "uncertain_negative"):
        assert own[policy]["p_above_dealt"]["F1_micro_13"] == pytest.approx(1 / 10_001)
        assert one[policy]["p_above_dealt"]["F1_micro_13"] == 1.0
    alone = assess(_predictions(references[:1], references[:1]), OPTIONS).record["clinical"]["rules"]
    assert "p_above_dealt" not in alone["uncertain_positive"]


def test_clinical_figures_are_those_of_the_rules() -> None:
    references, hypotheses = _studies(0), _studies(3)
    figures = assess(_predictions(references, hypotheses), OPTIONS).record["clinical"]
    assert list(figures) == ["rules"]
    truth, found = label_reports(references), label_reports(hypotheses)
    hits = sum(t["Cardiomegaly"] == f["Cardiomegaly"] == "positive" for t, f in zip(truth, found, strict=True))
    wanted = sum(row["Cardiomegaly"] == "positive" for row in truth)
    got = figures["rules"]["uncertain_positive"]["labels"]["Cardiomegaly"]
    assert got["support"] == wanted > 0
    assert got["recall"] == pytest.approx(hits / wanted)


def test_labels_of_the_data_set_replace_those_of_references() -> None:
    references = ["the heart is enlarged ."] * 3
    known = label_reports(["there is a right pneumothorax ."] * 3)
    options = Options(meteor=False, resamples=50, reference_labels=known)
    figures = assess(_predictions(references, references), options).record["clinical"]["rules"]
    assert figures["uncertain_positive"]["labels"]["Pneumothorax"]["support"] == 3
    assert figures["uncertain_positive"]["14"]["micro"]["f1"] == 0.0


@pytest.mark.parametrize("studies", [2, 6])
def test_few_studies_cannot_prove_that_the_image_matters(studies: int) -> None:
    reports = [f"finding number {number} is seen ." for number in range(studies)]
    record = assess(_predictions(reports, reports), OPTIONS).record
    assert record["scores"]["CIDEr"] > record["controls"]["dealt"]["scores"]["CIDEr"]
    assert (record["image_matters"], record["image_p"]) == (False, 0.5**studies)
    assert record["image"] == f"{studies} studies are too few to show whether the image is used."


def test_one_study_has_no_dealt_control() -> None:
    record = assess(_predictions(["no effusion ."], ["no effusion ."]), OPTIONS).record
    assert record["controls"] == {}
    assert (record["image_matters"], record["image_p"]) == (False, 1.0)
    assert "One study is not enough" in record["image"]


def test_empty_references_are_refused() -> None:
    with pytest.raises(UsageError, match="every reference is empty"):
        assess(_predictions(["", " "], ["a", "b"]), OPTIONS)


def test_bertscore_comes_from_its_own_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    options = Options(meteor=False, resamples=20, bertscore="some/model")
    monkeypatch.setitem(sys.modules, "bert_score", None)
    record = assess(_predictions(_studies(0), _studies(1)), options).record
    assert record["scores"]["BERTScore"] is None
    assert "pip install bert-score" in record["left_out"]["BERTScore"]

    def same_words(written: list[str], truth: list[str], *, model_type: str, verbose: bool) -> tuple[None, None, Any]:
        assert model_type == "some/model"
        return None, None, np.array([float(a == b) for a, b in zip(written, truth, strict=True)])

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=same_words))
    record = assess(_predictions(_studies(0), _studies(0)), options).record
    assert record["scores"]["BERTScore"] == 1.0
    assert record["controls"]["dealt"]["scores"]["BERTScore"] < 0.5


def test_a_labeler_is_used_in_addition_to_the_rules() -> None:
    asked: list[int] = []

    def labeler(reports: Any) -> Any:
        asked.append(len(reports))
        return [dict.fromkeys(label_reports([""])[0], "positive") for _ in reports]

    options = Options(meteor=False, resamples=20, labelers={"chexbert": labeler}, train_reports=_studies(5))
    record = assess(_predictions(_studies(0), _studies(1)), options).record
    assert list(record["clinical"]) == ["rules", "chexbert"]
    assert record["clinical"]["chexbert"]["uncertain_negative"]["14"]["micro"]["f1"] == 1.0
    assert record["controls"]["most_frequent"]["clinical"]["chexbert"]["uncertain_negative"]["5"]["macro"]["f1"] == 1.0
    assert asked == [80, 80, 80, 80]
