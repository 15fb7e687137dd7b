"""The grid of clinical figures against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from emrrg_cli.evaluation import clinical
from emrrg_cli.labeling import FIVE, OBSERVATIONS


def _labels(**given: str) -> dict[str, str | None]:
    row: dict[str, str | None] = dict.fromkeys(OBSERVATIONS)
    return row | {name.replace("_", " "): value for name, value in given.items()}


TRUTH = [
    _labels(Cardiomegaly="positive", Edema="uncertain", Pneumothorax="negative"),
    _labels(Cardiomegaly="negative", Pleural_Effusion="positive"),
    _labels(No_Finding="positive"),
]
FOUND = [
    _labels(Cardiomegaly="positive", Pneumothorax="positive"),
    _labels(Cardiomegaly="uncertain", Pleural_Effusion="positive"),
    _labels(No_Finding="positive"),
]


def _figures(policy: str) -> dict:
    statistics = clinical.label_statistics(clinical.present(TRUTH, policy), clinical.present(FOUND, policy))
    return clinical.clinical_figures(statistics.sum(axis=0), len(statistics))


def test_uncertain_as_positive_by_hand() -> None:
    figures = _figures("uncertain_positive")
    # Hits: heart, effusion, no finding. False: pneumothorax, heart of the second. Missed: edema.
    assert figures["14"]["micro"] == pytest.approx({"precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9})
    assert figures["13"]["micro"] == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7})
    assert figures["5"]["micro"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    by_label = {"Cardiomegaly": 2 / 3, "Pleural Effusion": 1.0, "No Finding": 1.0}
    assert figures["14"]["macro"]["f1"] == pytest.approx(sum(by_label.values()) / 14)
    assert figures["14"]["macro_defined"]["f1"] == pytest.approx(sum(by_label.values()) / 5)
    assert (figures["14"]["undefined"], figures["5"]["undefined"]) == (9, 2)
    assert figures["14"]["example"]["f1"] == pytest.approx((2 / 4 + 2 / 3 + 1) / 3)
    assert figures["14"]["example"]["precision"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert figures["5"]["example"]["recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert figures["labels"]["Cardiomegaly"] == pytest.approx(
        {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1}
    )


def test_uncertain_as_negative_by_hand() -> None:
    figures = _figures("uncertain_negative")
    assert figures["14"]["micro"] == pytest.approx({"precision": 3 / 4, "recall": 1.0, "f1": 6 / 7})
    assert figures["labels"]["Edema"]["support"] == 0
    assert figures["14"]["undefined"] == 10


def test_the_headline_score_is_from_the_grid() -> None:
    draw = np.random.default_rng(0)
    truth, found = draw.random((40, 14)) < 0.3, draw.random((40, 14)) < 0.3
    sums = clinical.label_statistics(truth, found).sum(axis=0)
    figures = clinical.clinical_figures(sums, 40)
    of_14, of_13 = figures["14"], figures["13"]
    expected = [of_14["micro"]["f1"], of_14["macro"]["f1"], of_13["micro"]["f1"]]
    assert clinical.headline(sums, 40) == pytest.approx(expected)
    assert len({round(value, 6) for value in expected}) == len(clinical.HEADLINE) == 3


def test_the_five_are_those_of_chexpert() -> None:
    assert {OBSERVATIONS[label] for label in clinical.SETS["5"]} == set(FIVE)
    assert len(clinical.SETS["14"]) == 14
    assert {OBSERVATIONS[label] for label in clinical.SETS["13"]} == set(OBSERVATIONS) - {"No Finding"}


def test_no_findings_cause_no_division_by_zero() -> None:
    nothing = clinical.present([_labels()] * 2, "uncertain_positive")
    figures = clinical.clinical_figures(clinical.label_statistics(nothing, nothing).sum(axis=0), 2)
    assert figures["14"]["micro"]["f1"] == 0.0
    assert (figures["14"]["undefined"], figures["14"]["macro_defined"]["f1"]) == (14, 0.0)
