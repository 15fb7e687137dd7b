"""Bootstrap over studies: confidence intervals of scores, and tests that compare two sets of reports.

Every score is a function of sums over studies. A resample is therefore one row of a matrix product, and no text is
scored again. CIDEr's document frequencies always come from all references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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


def interval(scores: Floats) -> tuple[float, float]:
    """Returns the ends of the interval that holds the middle 95 % of the resampled scores `[resamples]`."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return float(low), float(high)


def few_studies(studies: int) -> str | None:
    """Returns why there are no intervals of so few studies, or None."""
    return f"{counted(studies, 'study')}; intervals need {LEAST_STUDIES}" if studies < LEAST_STUDIES else None


def intervals_of(drawn: Mapping[str, Floats], studies: int) -> dict[str, list[float]]:
    """Returns the interval of each score of `studies` studies, given its resampled values; none of too few studies."""
    return {} if few_studies(studies) else {name: list(interval(values)) for name, values in drawn.items()}


def intervals(statistics: Floats, combine: Combine, resamples: int = RESAMPLES) -> Floats:
    """Returns lower and upper ends `[names, 2]` of the 95 % intervals; `combine` computes the scores from sums."""
    scores = combine(resampled_sums(statistics, resamples), len(statistics))
    tail = (1 - LEVEL) / 2
    return np.asarray(np.quantile(scores, [tail, 1 - tail], axis=0).T, np.float64)


def p_greater(differences: Floats, resamples: int = TEST_RESAMPLES, seed: int = SEED) -> float:
    """Returns the one-sided bootstrap p value for a mean of paired differences `[n]` above zero.

    It is at least `least_p(n)`, because the bootstrap of two or three studies gives p values that are too small.
    """
    means = resampled_sums(differences[:, None], resamples, seed)[:, 0] / max(1, len(differences))
    return max(float(_p_above_zero(means)), least_p(len(differences)))


def p_scores_greater(first: Floats, second: Floats, combine: Combine) -> Floats:
    """Returns the one-sided p value `[names]` of each score of `combine`: that of `first` `[n, k]` above `second`'s."""
    studies, columns = first.shape
    drawn = resampled_sums(np.concatenate([first, second], axis=1), TEST_RESAMPLES)
    gained = combine(drawn[:, :columns], studies) - combine(drawn[:, columns:], studies)
    return np.asarray(np.maximum(_p_above_zero(gained), least_p(studies)), np.float64)


def least_p(studies: int) -> float:
    """Returns the smallest possible p value of `n` paired differences: all signs agree by chance, `2^-n`."""
    return float(0.5**studies)


def p_two_sided(first: Floats, second: Floats, studies: int) -> float:
    """Returns the two-sided p value for a difference between two runs, given scores `[resamples]` of the same draws."""
    difference = second - first
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
