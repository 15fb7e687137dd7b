"""The test of means over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emrrg_cli.evaluation.seed_groups import seed_groups


def _p(draw: np.random.Generator, trial: int, seeds: int, same: bool) -> float:
    # Two equal methods, whose scores differ only by noise of their seeds.
    names = [f"{method}{seed}" for method in "ab" for seed in range(seeds)]
    settings = [
        {"method": name[0], "train.seed": trial * 100 + int(name[1]) + (0 if same or name[0] == "a" else 50)}
        for name in names
    ]
    drawn: Any = [{"score": draw.normal() + draw.normal(0, 0.01, 400)} for _ in names]
    rows = [
        {"name": name, "studies": 200, "scores": {"score": one["score"].mean()}, "settings": {}}
        for name, one in zip(names, drawn, strict=True)
    ]
    found: float = seed_groups(rows, settings, drawn, [])[1]["against_first"]["p"]["score"]
    return found


@pytest.mark.parametrize(("seeds", "same"), [(2, True), (3, True), (3, False)])
def test_equal_methods_rarely_differ_over_few_seeds(seeds: int, same: bool) -> None:
    draw = np.random.default_rng(seeds)
    found = [_p(draw, trial, seeds, same) for trial in range(300)]
    assert sum(p < 0.05 for p in found) <= 0.09 * len(found)  # drawn with replacement: 0.14 to 0.26


def test_a_group_of_one_seed_is_remarked() -> None:
    draw, remarks = np.random.default_rng(0), []
    settings = [{"method": method, "train.seed": seed} for method, seed in (("a", 1), ("a", 2), ("b", 1))]
    drawn: Any = [{"score": draw.normal(0, 0.01, 400)} for _ in settings]
    rows = [{"name": f"run{i}", "studies": 200, "scores": {"score": 0.0}, "settings": {}} for i in range(3)]
    assert seed_groups(rows, settings, drawn, remarks)[1]["against_first"]["p"]["score"] > 0.05
    assert remarks == ["run2 has one seed, so tests do not know how much its scores depend on the seed."]
