"""Controls: reports that do not come from the image they answer for, and whether the model's are better.

Without them a model that ignores its image looks good: normal reports read alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.evaluation import bootstrap

DEALS = 20
SLOW_DEALS = 2  # deals that a slow score is computed on
ALPHA = 0.01


def derangements(studies: int, deals: int = DEALS, seed: int = 0) -> list[NDArray[np.int64]]:
    """Seeded permutations `[studies]` that leave nothing at its place; none for fewer than two studies."""
    if studies < 2:
        return []
    generator = np.random.default_rng(seed)
    found: list[NDArray[np.int64]] = []
    while len(found) < deals:
        order = generator.permutation(studies)
        if not np.any(order == np.arange(studies)):  # true for more than a third of all orders
            found.append(order)
    return found


def most_frequent(reports: Sequence[str]) -> str | None:
    """The report that occurs most often, the first of equals; empty ones do not count."""
    counts = Counter(text for report in reports if (text := " ".join(report.split())))
    return counts.most_common(1)[0][0] if counts else None


def image_sentence(image_matters: bool, p: float, own: float, dealt: float, studies: int) -> str:
    """A plain sentence that says whether the image makes a difference."""
    if studies < 2:
        return "One study cannot show whether the image is used: there is no other to deal its report to."
    if bootstrap.least_p(studies) >= ALPHA:
        return f"{studies} studies are too few to show whether the image is used."
    figures = f"CIDEr {own:.3f} against {dealt:.3f} for the same reports dealt to other studies, p = {p:.4f}"
    if image_matters:
        return f"The image matters: {figures}."
    return f"NOTHING SHOWS THAT THE IMAGE IS USED: {figures}. These scores can be reached without looking at it."


def mean_of(nested: Sequence[Any]) -> Any:
    """The mean of several results of one shape, number by number; what is None anywhere is None."""
    first = nested[0]
    if isinstance(first, dict):
        return {key: mean_of([one[key] for one in nested]) for key in first}
    if any(value is None for value in nested):
        return None
    return float(np.mean(nested))
