"""Intervals and p values against known distributions and against the scores of resampled texts."""

from __future__ import annotations

import numpy as np
import pytest

from emrrg_cli.evaluation import bootstrap
from emrrg_cli.scoring.scores import Bleu


def _mean(sums: np.ndarray, studies: int) -> np.ndarray:
    return sums / studies


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 900)[:, None]
    ((low, high),) = bootstrap.intervals(values, _mean, resamples=4000)
    assert low == pytest.approx(values.mean() - 1.96 * 2 / 30, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * 2 / 30, abs=0.02)


def test_equal_seeds_draw_the_same_studies() -> None:
    statistics = np.random.default_rng(0).random((50, 3))
    first = bootstrap.resampled_sums(statistics, 700, seed=4)
    assert np.array_equal(first, bootstrap.resampled_sums(statistics, 700, seed=4))
    assert not np.array_equal(first, bootstrap.resampled_sums(statistics, 700, seed=5))
    # Another column beside them changes no draw: runs are compared on the same resamples.
    wider = bootstrap.resampled_sums(np.concatenate([statistics, statistics], axis=1), 700, seed=4)
    assert wider[:, :3] == pytest.approx(first)


def test_draws_of_many_studies_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(bootstrap._draws(40, 700, 3)))
    monkeypatch.setattr(bootstrap, "_CELLS", 1_000)
    blocks = list(bootstrap._draws(40, 700, 3))
    assert max(block.size for block in blocks) == 1_000
    assert np.array_equal(np.concatenate(blocks), whole)
    assert [block.shape for block in bootstrap._draws(2_000, 2, 3)] == [(1, 2_000)] * 2


def test_each_resample_has_as_many_studies() -> None:
    sums = bootstrap.resampled_sums(np.ones((17, 1)), 1200)
    assert sums.shape == (1200, 1)
    assert np.all(sums == 17)


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.05, 0.95), (0.5, 0.0, 0.001), (-0.5, 0.999, 1.0)])
def test_p_is_small_if_differences_are_above_zero(shift: float, low: float, high: float) -> None:
    differences = np.random.default_rng(3).normal(shift, 1.0, 400)
    differences -= differences.mean() - shift  # exactly
    assert low <= bootstrap.p_greater(differences) <= high


def test_equal_reports_give_no_evidence() -> None:
    assert bootstrap.p_greater(np.zeros(30)) == 1.0
    assert bootstrap.p_greater(np.full(30, 1e-16)) == 1.0
    same = bootstrap.resampled_sums(np.random.default_rng(0).random((30, 2)), 200)
    assert bootstrap.p_two_sided(same[:, 0], same[:, 0], 30) == 1.0


def test_few_studies_have_no_small_p() -> None:
    assert bootstrap.p_greater(np.array([1.0, 2.0, 3.0])) == 0.125
    better = bootstrap.resampled_sums(np.array([[1.0], [2.0], [3.0]]), 200)[:, 0]
    assert bootstrap.p_two_sided(np.zeros(200), better, 3) == 0.25


def test_the_rate_of_false_positives_is_as_stated() -> None:
    draw = np.random.default_rng(0)
    alarms = [bootstrap.p_greater(draw.normal(0, 1, 200), 2000, seed=i) < 0.05 for i in range(200)]
    assert 0.01 <= np.mean(alarms) <= 0.09


def test_intervals_of_few_studies_hold_the_mean() -> None:
    draw = np.random.default_rng(0)
    ends = [bootstrap.intervals(draw.normal(0, 1, (10, 1)), _mean)[0] for _ in range(1000)]
    assert 0.925 <= np.mean([low <= 0 <= high for low, high in ends]) <= 0.97
    scores = np.random.default_rng(0).random(1000)
    assert bootstrap.interval(scores, 10_000) == pytest.approx(bootstrap.interval(scores), abs=1e-3)


@pytest.mark.parametrize("studies", [6, 10, 20])
def test_few_studies_give_no_more_false_positives(studies: int) -> None:
    draw = np.random.default_rng(studies)
    drawn = [bootstrap.resampled_sums(draw.normal(0, 1, (studies, 1)), 1000)[:, 0] for _ in range(1000)]
    alarms = [bootstrap.p_two_sided(np.zeros(1000), sums, studies) < 0.05 for sums in drawn]
    assert 0.03 <= np.mean(alarms) <= 0.07


def test_a_corpus_score_is_resampled_as_a_whole() -> None:
    # BLEU is no mean over studies: the interval of two kinds of studies lies around the score of the corpus.
    statistics = np.array([[5, 4, 3, 2, 10, 9, 8, 7, 10, 10], [9, 8, 7, 6, 10, 9, 8, 7, 10, 10]] * 100, float)
    value = Bleu().combine(statistics.sum(axis=0), 200)
    ends = bootstrap.intervals(statistics, Bleu().combine)
    assert np.all((ends[:, 0] < value) & (value < ends[:, 1]))
