"""Bootstrap over studies: confidence intervals of scores, and tests that compare two sets of reports.

Every score is a function of sums over studies. A resample is therefore one row of a matrix product, and no text is
scored again. CIDEr's document frequencies always come from all references.

Studies count as independent. Several studies of one patient, as in MIMIC-CXR, are not: if the differences of 13 studies
a patient have a correlation of .1, p is below .05 in 18 percent of tests without a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.console import counted

RESAMPLES = 1_000
TEST_RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95

# Studies that an interval needs. Of fewer, even the range of all values holds the median with less than 95 %
# probability, 1 - 2 * 0.5^n, and a bootstrap of one or two gives intervals without width.
LEAST_STUDIES = 6

_ROWS = 500  # resamples in memory at a time
_CELLS = 20_000_000  # counts in memory at a time: 500 resamples of 100,000 studies would need 1.2 GB

Floats = NDArray[np.float64]
Combine = Callable[[Floats, int], Floats]  # (sums [..., k], number of studies) -> scores [..., names]


def resampled_sums(statistics: Floats, resamples: int, seed: int = SEED) -> Floats:
    """Returns sums `[resamples, k]` of `statistics` `[n, k]` over `n` studies drawn with replacement.

    The same seed draws the same studies.
    """
    return np.concatenate([weights @ statistics for weights in _draws(len(statistics), resamples, seed)])


def interval(scores: Floats, studies: int | None = None) -> tuple[float, float]:
    """Returns the ends of the interval that holds the middle 95 % of the resampled scores `[resamples]`.

    Args:
        studies: Their number. For few, the interval holds more of the scores (see `widened`): with 10 studies, it holds
            the mean in 95 % of experiments, and the middle 95 % do in 90 %. None: the scores are `widened`.
    """
    low, high = np.quantile(scores, _ends(studies))
    return float(low), float(high)


def few_studies(studies: int) -> str | None:
    """Returns why there are no intervals of so few studies, or None."""
    return f"{counted(studies, 'study')}; intervals need {LEAST_STUDIES}" if studies < LEAST_STUDIES else None


def intervals_of(drawn: Mapping[str, Floats], studies: int, *, are_widened: bool = False) -> dict[str, list[float]]:
    """Returns the interval of each score of `studies` studies, given its resampled values; none of too few studies."""
    if few_studies(studies):
        return {}
    return {name: list(interval(values, None if are_widened else studies)) for name, values in drawn.items()}


def intervals(statistics: Floats, combine: Combine, resamples: int = RESAMPLES) -> Floats:
    """Returns lower and upper ends `[names, 2]` of the 95 % intervals; `combine` computes the scores from sums."""
    scores = combine(resampled_sums(statistics, resamples), len(statistics))
    return np.asarray(np.quantile(scores, _ends(len(statistics)), axis=0).T, np.float64)


def _ends(studies: int | None) -> list[float]:
    tail = NormalDist().cdf(NormalDist().inv_cdf((1 - LEVEL) / 2) * (1.0 if studies is None else _growth(studies)))
    return [tail, 1 - tail]


def p_greater(differences: Floats, resamples: int = TEST_RESAMPLES, seed: int = SEED) -> float:
    """Returns the one-sided bootstrap p value for a mean of paired differences `[n]` above zero.

    It is at least `least_p(n)`, because the bootstrap of two or three studies gives p values that are too small.
    """
    studies = len(differences)
    means = resampled_sums(differences[:, None], resamples, seed)[:, 0] / max(1, studies)
    return max(float(_p_above_zero(widened(means, studies))), least_p(studies))


def p_scores_greater(first: Floats, second: Floats, combine: Combine) -> Floats:
    """Returns the one-sided p value `[names]` of each score of `combine`: that of `first` `[n, k]` above `second`'s."""
    studies, columns = first.shape
    drawn = resampled_sums(np.concatenate([first, second], axis=1), TEST_RESAMPLES)
    gained = combine(drawn[:, :columns], studies) - combine(drawn[:, columns:], studies)
    return np.asarray(np.maximum(_p_above_zero(widened(gained, studies)), least_p(studies)), np.float64)


def widened(gains: Floats, studies: int) -> Floats:
    """Returns resampled gains `[resamples, ...]` with the larger deviations from their mean that few studies have.

    The deviations grow by sqrt(n / (n - 1)), and by the ratio of Student's t to the normal distribution at 95 %.
    Without this, p was below .05 in 14 percent of tests of 6 studies without a difference, and in 11 percent for 10.
    With it, it is in 5 and 6 percent; for skewed differences in up to 12 and 10. From 100 studies on it changes little.

    Source: Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69 (2015).
    """
    mean = gains.mean(axis=0)
    return np.asarray(mean + _growth(studies) * (gains - mean), np.float64)


def _growth(studies: int) -> float:
    freedom = max(1, studies - 1)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    ratio = 1 + (z + 1) / (4 * freedom) + (5 * z**2 + 16 * z + 3) / (96 * freedom**2)  # Cornish and Fisher
    return float(ratio * math.sqrt(1 + 1 / freedom))


def least_p(studies: int) -> float:
    """Returns the smallest possible p value of `n` paired differences: all signs agree by chance, `2^-n`."""
    return float(0.5**studies)


def p_two_sided(first: Floats, second: Floats, studies: int) -> float:
    """Returns the two-sided p value for a difference between two runs, given scores `[resamples]` of the same draws."""
    difference = widened(second - first, studies)
    one_sided = min(float(_p_above_zero(difference)), float(_p_above_zero(-difference)))
    return min(1.0, 2 * max(one_sided, least_p(studies)))


def _p_above_zero(gains: Floats) -> Floats:
    # p values `[...]` of resampled gains `[resamples, ...]`. Those between equal reports are rounding errors, and zero.
    return np.asarray((1 + (gains <= 1e-12).sum(axis=0)) / (len(gains) + 1), np.float64)


def _draws(studies: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yields blocks `[rows, studies]` that count how often each resample draws each study."""
    generator = np.random.default_rng(seed)
    most = max(1, min(_ROWS, _CELLS // max(1, studies)))
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        drawn = generator.integers(0, studies, size=(rows, studies)) + studies * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * studies)
        yield counts.reshape(rows, studies).astype(np.float64)
