"""The grammar: labels come back from its texts exactly, and it does not repeat itself."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.labeling import label_report
from emrrg_cli.phantom.parameters import CTR_LIMIT, LABELS, Case
from emrrg_cli.phantom.reader import read_labels
from emrrg_cli.phantom.report import Report
from emrrg_cli.vocabulary import CLEANING_RULES

COUNT = 3000


@cache
def studies() -> list[tuple[Case, Report]]:
    return [synthetic_study(11, index) for index in range(COUNT)]


@pytest.mark.parametrize("style", CLEANING_RULES)
def test_labels_come_back_from_the_text(style: str) -> None:
    for case, report in studies():
        truth = case.findings.labels()
        assert read_labels(clean_report(report.text, style)) == truth, report.text
        assert read_labels(clean_report(report.findings, style)) == truth, report.findings


def test_the_impression_names_every_finding_except_devices() -> None:
    for case, report in studies():
        assert read_labels(report.impression) == case.findings.labels() - {"support_device"}, report.impression


def test_variety() -> None:
    assert len({report.text for _, report in studies()[:500]}) > 480
    assert len({report.findings.split(". ")[0] for _, report in studies()}) > 60
    normal = [report.impression for case, report in studies() if not case.findings.labels()]
    assert len(set(normal)) > 5
    assert max(Counter(normal).values()) < 0.3 * len(normal)


def test_labels_are_balanced() -> None:
    counts = Counter(label for case, _ in studies() for label in case.findings.labels())
    assert set(counts) == set(LABELS)
    assert all(0.06 < counts[label] / COUNT < 0.25 for label in LABELS), counts
    assert 0.33 < sum(not case.findings.labels() for case, _ in studies()) / COUNT < 0.43


def test_related_findings_occur_together() -> None:
    failing = [case.findings for case, _ in studies() if case.findings.edema]
    assert sum(bool(f.cardiomegaly) for f in failing) > 0.6 * len(failing)
    tubes = [case for case, _ in studies() if any(d.kind == "endotracheal tube" for d in case.findings.devices)]
    assert sum(case.film.view == "AP" for case in tubes) > 0.85 * len(tubes)


def test_incompatible_findings_do_not_occur_together() -> None:
    for case, _ in studies():
        found = case.findings
        assert (found.ctr > CTR_LIMIT[case.film.view]) == bool(found.cardiomegaly)
        assert abs(found.ctr - CTR_LIMIT[case.film.view]) > 0.02
        fluid = {e.side for e in found.effusions}
        assert not (found.pneumothorax and found.pneumothorax.side in fluid)
        places = [(c.side, c.zone) for c in found.consolidations]
        places += [(found.nodule.side, found.nodule.zone)] if found.nodule else []
        assert len(places) == len(set(places))
        assert not any(zone == "lower" and side in fluid for side, zone in places)


def test_sides_sizes_and_hedges_are_those_of_the_parameters() -> None:
    for case, report in studies():
        found, text = case.findings, report.findings.lower()
        if found.nodule:
            assert f"{found.nodule.diameter_mm} mm" in text
        for effusion in found.effusions if len(found.effusions) == 1 else ():
            assert re.search(rf"{effusion.side} (pleural effusion|costophrenic)", text), text
        if found.pneumothorax:
            assert re.search(rf"{found.pneumothorax.side} (apical )?pneumothorax", text), text
        everything = [*found.effusions, *found.consolidations, *found.atelectases, found.nodule, found.edema]
        subtle = any(thing.subtle for thing in [*everything, found.pneumothorax] if thing)
        hedged = re.search(r"possible|cannot be excluded|may be|suspected|questionable", text)
        if not subtle:
            assert not hedged, text


def test_reports_are_short_and_without_comparisons() -> None:
    for _, report in studies():
        assert 6 < len(report.text.split()) < 130
        assert report.text == f"{report.findings} {report.impression}"
        assert report.findings.endswith(".")
        assert report.impression.endswith(".")
        assert "  " not in report.text
        assert not re.search(r"unchanged|stable|prior|previous|improved|worse|interval|again", report.text.lower())


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", set()),
        ("The lungs are clear.", set()),
        ("no focal consolidation pleural effusion or pneumothorax .", set()),
        ("Small left pleural effusion without pneumothorax.", {"pleural_effusion"}),
        ("No pneumothorax but a small left pleural effusion.", {"pleural_effusion"}),
        ("A small pneumothorax cannot be excluded.", {"pneumothorax"}),
        ("The heart is not enlarged. Pneumothorax is not seen.", set()),
        ("the heart is mildly enlarged . there is no pulmonary edema .", {"cardiomegaly"}),
        ("Neither effusion nor pneumothorax is identified.", set()),
        ("Effusion is absent. Cardiomegaly with mild edema.", {"cardiomegaly", "edema"}),
        ("No pneumothorax. Small right apical pneumothorax.", {"pneumothorax"}),
    ],
)
def test_reading(text: str, labels: set[str]) -> None:
    assert read_labels(text) == labels


# What the rules labeler calls each finding; an airspace opacity is an opacity to it.
OBSERVATIONS = {
    "atelectasis": ("Atelectasis",),
    "cardiomegaly": ("Cardiomegaly",),
    "consolidation": ("Consolidation", "Lung Opacity", "Pneumonia"),
    "edema": ("Edema",),
    "nodule": ("Lung Lesion",),
    "pleural_effusion": ("Pleural Effusion",),
    "pneumothorax": ("Pneumothorax",),
    "support_device": ("Support Devices",),
}


def test_the_rules_labeler_reads_the_same_labels() -> None:
    hits = said = true = 0
    for case, report in studies()[:600]:
        labels = label_report(report.text)
        read = {
            name
            for name, observations in OBSERVATIONS.items()
            if any(labels[observation] in ("positive", "uncertain") for observation in observations)
        }
        truth = case.findings.labels()
        hits, said, true = hits + len(truth & read), said + len(read), true + len(truth)
    assert 2 * hits / (said + true) > 0.97


def test_views_and_misplaced_tips_are_reported() -> None:
    for case, report in studies():
        text = report.findings.lower()
        if re.search(r"lateral view|two views", text):
            assert case.lateral, text
        if re.search(r"single|portable|ap view|ap radiograph|pa radiograph|pa view", text):
            assert case.lateral is None, text
        wrong = {d.kind for d in case.findings.devices if d.misplaced}
        assert bool(re.search(r"right main bronchus", text)) == ("endotracheal tube" in wrong)
        assert bool(re.search(r"esophagus", text)) == ("nasogastric tube" in wrong)
        if "central line" in wrong:
            assert "right atrium" in text
    assert 0.3 < sum(case.lateral is not None for case, _ in studies()) / COUNT < 0.5


def test_distractors_are_named_only_where_they_are_drawn() -> None:
    words = {
        "skin_fold": "skin fold",
        "nipples": "nipple",
        "granuloma": "granuloma",
        "calcified_nodes": "lymph node",
        "rib_callus": "healed",
    }
    named = Counter()
    for case, report in studies():
        for name, word in words.items():
            if word in report.text.lower():
                assert getattr(case.distractors, name), report.text
                named[name] += 1
        if "healed" in report.text:
            assert "intact" not in report.text
    assert set(named) == set(words)
