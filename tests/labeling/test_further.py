"""Findings outside CheXpert's 14 observations."""

from __future__ import annotations

import pytest

from emrrg_cli.labeling import FURTHER_FINDINGS, further_findings


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The lungs are hyperexpanded with flattened diaphragms. No pneumothorax.", {"Hyperinflation"}),
        ("emphysematous changes . scattered calcified granulomas .", {"Hyperinflation", "Granuloma"}),
        ("There are calcified right hilar lymph nodes.", {"Granuloma"}),
        ("low lung volumes with bronchovascular crowding", {"Low Lung Volumes"}),
        ("mild degenerative changes of the thoracic spine . osteophytes", {"Degenerative Change"}),
        ("dextroscoliosis of the thoracic spine", {"Spinal Curvature"}),
        ("There is mild scoliosis.", {"Spinal Curvature"}),
        ("The aorta is tortuous and calcified.", {"Aortic Change"}),
        ("atherosclerotic calcification of the aortic arch", {"Aortic Change"}),
        ("large hiatal hernia . status post sternotomy .", {"Hiatal Hernia", "Surgical Change"}),
        ("elevation of the right hemidiaphragm", {"Elevated Diaphragm"}),
        ("No hiatal hernia. Heart size normal without scoliosis.", set()),
        ("no change in the calcified granuloma", {"Granuloma"}),
        ("no interval change in scoliosis", {"Spinal Curvature"}),
        ("the lungs are clear . no pleural effusion .", set()),
        ("", set()),
    ],
)
def test_findings_named_without_a_negation(text: str, found: set[str]) -> None:
    assert further_findings(text) == found
    assert found <= set(FURTHER_FINDINGS)
