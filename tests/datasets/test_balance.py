"""How often a balanced epoch shows each study."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch

from emrrg_cli.datasets.balance import BalancedStudies
from emrrg_cli.datasets.epochs import DrawsEpoch

REPORTS = [
    "the heart is enlarged .",  # a finding
    "the lungs are clear . no pleural effusion .",
    "a pacemaker is seen . the lungs are clear .",  # devices alone are none
    "there is a left pleural effusion .",
    "no acute cardiopulmonary abnormality .",
    "possible pneumonia .",  # uncertain is none
]


def _epochs(factor: float, count: int = 1) -> list[Counter[int]]:
    dataset: Any = SimpleNamespace(reports=REPORTS)
    studies = BalancedStudies(dataset, factor)
    assert isinstance(studies, DrawsEpoch)
    generator = torch.Generator().manual_seed(0)
    drawn = [studies.draw_epoch(generator).tolist() for _ in range(count)]
    assert {len(epoch) for epoch in drawn} == {studies.epoch_length}
    return [Counter(epoch) for epoch in drawn]


def test_studies_with_a_finding_are_taken_factor_times() -> None:
    assert _epochs(1.0) == [Counter(range(6))]
    assert _epochs(3.0) == [Counter({0: 3, 3: 3, 1: 1, 2: 1, 4: 1, 5: 1})]


def test_a_random_part_of_them_is_taken_once_more() -> None:
    epochs = _epochs(2.5, count=40)
    assert all(sorted((epoch[0], epoch[3])) == [2, 3] for epoch in epochs)
    assert {epoch[0] for epoch in epochs} == {2, 3}
    assert all(epoch[index] == 1 for epoch in epochs for index in (1, 2, 4, 5))
