"""Labels of whole reports: keys, aggregation, No Finding, odd inputs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from emrrg_cli.errors import UsageError
from emrrg_cli.labeling import FIVE, OBSERVATIONS, contradicted_labels, label_report, label_reports
from emrrg_cli.labeling.policy import stronger


def test_every_report_has_all_labels_in_order() -> None:
    assert len(OBSERVATIONS) == 14
    assert set(FIVE) < set(OBSERVATIONS)
    for text in ("", "Cardiomegaly.", "lungs are clear ."):
        assert tuple(label_report(text)) == OBSERVATIONS


@pytest.mark.parametrize("text", ["", " .", "\n", "...", "XXXX XXXX", "12345", "胸部X光片", "[[[(((", "a" * 10_000])
def test_text_without_findings_has_no_label(text: str) -> None:
    assert set(label_report(text).values()) == {None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion. Possible effusion.", "uncertain"),
        ("Possible effusion. Small left effusion. No right effusion.", "positive"),
        ("No effusion on the right. No effusion on the left.", "negative"),
    ],
)
def test_strongest_mention_counts(text: str, expected: str) -> None:
    assert label_report(text)["Pleural Effusion"] == expected


def test_plate_like_atelectasis_is_not_a_device() -> None:
    assert label_report("Plate-like atelectasis at the left base.")["Support Devices"] is None
    assert label_report("Fixation plate of the left clavicle.")["Support Devices"] == "positive"


def test_order_of_strength() -> None:
    assert stronger(None, "negative") == "negative"
    assert stronger("uncertain", "negative") == "uncertain"
    assert stronger("uncertain", "positive") == "positive"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Heart size is normal. The lungs are clear.", "positive"),
        ("No acute cardiopulmonary abnormality.", "positive"),
        ("The lungs are clear. Left chest port with tip in the SVC.", "positive"),
        ("The lungs are clear. Calcified granuloma. Scoliosis.", "positive"),
        ("The lungs are clear. Possible small effusion.", None),
        ("Mild cardiomegaly. The lungs are clear.", None),
        ("Left chest port.", None),
        ("Comparison with the study of last week.", None),
    ],
)
def test_no_finding(text: str, expected: str | None) -> None:
    assert label_report(text)["No Finding"] == expected


def test_many_reports_equal_single_calls() -> None:
    texts = ["Cardiomegaly.", "no pneumothorax .", "Cardiomegaly."]
    assert label_reports(iter(texts)) == [label_report(text) for text in texts]


def test_labels_of_a_repeated_report_are_not_shared() -> None:
    first, second = label_reports(["Cardiomegaly."] * 2)
    first["Cardiomegaly"] = None
    assert second["Cardiomegaly"] == "positive"


def test_upper_case_and_white_space_do_not_matter() -> None:
    assert label_report("MILD\tCARDIOMEGALY.  NO\u00a0EFFUSION") == label_report("mild cardiomegaly . no effusion")


def test_decimal_point_does_not_end_a_sentence() -> None:
    labels = label_report("No nodule larger than 1.5 cm or effusion.")
    assert labels["Lung Lesion"] == labels["Pleural Effusion"] == "negative"


@pytest.mark.parametrize("unit", ["effusion ", "no effusion, ", "left ", "pulmonary central ", "atelectasis"])
def test_a_word_repeated_thousands_of_times_is_quick(unit: str) -> None:
    """Degenerate generators write such texts; the time must grow with the length, not with its square."""
    start = time.process_time()
    label_report(unit * 4_000)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("There is cardiomegaly. The heart size is normal.", {"Cardiomegaly"}),
        ("the heart size is normal . no effusion . there is mild cardiomegaly .", {"Cardiomegaly"}),
        ("There is no pleural effusion. Small left pleural effusion.", {"Pleural Effusion"}),
        ("Small left pleural effusion, no right pleural effusion.", set()),  # one sentence tells the sides apart
        ("there is mild cardiomegaly with normal heart size and contour .", {"Cardiomegaly"}),
        ("Cardiomegaly with a left effusion, normal heart size.", {"Cardiomegaly"}),  # the heart has no sides
        ("There is a pleural effusion with no pleural effusion.", {"Pleural Effusion"}),
        ("Possible cardiomegaly. The heart size is normal.", set()),  # uncertain
        ("The heart is enlarged. No pleural effusion.", set()),
        ("", set()),
    ],
)
def test_reports_that_affirm_and_deny_a_finding(text: str, labels: set[str]) -> None:
    assert contradicted_labels(text) == labels


@pytest.mark.parametrize(
    ("text", "name", "label"),
    [
        ("There is no longer any effusion.", "Pleural Effusion", "negative"),
        ("No longer evidence of edema.", "Edema", "negative"),
        ("The effusion is no longer present.", "Pleural Effusion", "negative"),
        ("The patient has no history of fracture.", "Fracture", None),
        ("No known history of pneumonia.", "Pneumonia", None),
        ("No effusion, history of rib fracture.", "Fracture", "positive"),
        ("Pleural effusion: No. Edema: yes.", "Pleural Effusion", "negative"),
        ("Pleural effusion : no .", "Pleural Effusion", "negative"),
        ("There isn't a pneumothorax.", "Pneumothorax", "negative"),
        ("effusions arent seen .", "Pleural Effusion", "negative"),
    ],
)
def test_words_for_absence(text: str, name: str, label: str | None) -> None:
    assert label_report(text)[name] == label


@pytest.mark.parametrize("text", [None, float("nan"), 3, ["x"]])
def test_a_report_is_a_text(text: Any) -> None:
    with pytest.raises(UsageError, match="a report must be a text"):
        label_report(text)
