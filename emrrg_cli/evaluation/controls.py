"""Controls: reports that were not written for the study's image, to test whether the model's reports are better.

Most normal reports are similar, so a model that ignores the image can still get good scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.evaluation import bootstrap
from emrrg_cli.scoring.agreement import most_agreed
from emrrg_cli.vocabulary import BLEU_NAMES, ROUGE_1

DEALS = 20
SLOW_DEALS = 2  # number of shuffles for which slow scores are computed
ALPHA = 0.01
_TYPICAL_OF = 1000


def derangements(studies: int, deals: int = DEALS) -> list[NDArray[np.int64]]:
    """Returns seeded permutations `[studies]` that move every study; an empty list for fewer than two studies."""
    if studies < 2:
        return []
    generator = np.random.default_rng(0)
    found: list[NDArray[np.int64]] = []
    while len(found) < deals:
        order = generator.permutation(studies)
        if not np.any(order == np.arange(studies)):  # true for more than a third of all orders
            found.append(order)
    return found


def most_frequent(reports: Sequence[str]) -> str | None:
    """Returns the most frequent report that is not empty; of equally frequent ones, the first."""
    counts = Counter(text for report in reports if (text := " ".join(report.split())))
    return counts.most_common(1)[0][0] if counts else None


def most_typical(reports: Sequence[str]) -> str | None:
    """Returns the report that agrees best with all others, by BLEU-1 and the recall of words; None without any.

    For long lists, 1,000 reports are drawn. On IU X-Ray this one report, given to all studies, has BLEU scores like
    those of published models.
    """
    texts = [text for report in reports if (text := " ".join(report.split()))]
    if len(texts) > _TYPICAL_OF:
        chosen = np.random.default_rng(0).choice(len(texts), _TYPICAL_OF, replace=False)
        texts = [texts[index] for index in chosen]
    return texts[most_agreed(texts, {BLEU_NAMES[0]: 1.0, ROUGE_1: 0.5})] if texts else None


def image_sentence(image_matters: bool, p: float, own: float, dealt: float, studies: int) -> str:
    """Returns a sentence that says whether the image changes the scores.

    Args:
        image_matters: Whether the p value is small enough.
        p: The p value of the test.
        own: CIDEr of the reports.
        dealt: Mean CIDEr of the same reports, shuffled between studies.
        studies: Number of studies.
    """
    if studies < 2:
        return "One study is not enough to show whether the image is used: its report cannot be shuffled."
    if bootstrap.least_p(studies) >= ALPHA:
        return f"{studies} studies are too few to show whether the image is used."
    figures = f"CIDEr {own:.3f}, against {dealt:.3f} when the same reports are shuffled between studies, p = {p:.4f}"
    if image_matters:
        return f"The image matters: {figures}."
    return f"NOTHING SHOWS THAT THE IMAGE IS USED: {figures}. A model that ignores the image can reach these scores."


def mean_of(nested: Sequence[Any]) -> Any:
    """Averages nested dictionaries of equal structure, number by number; the mean is None if any value is None."""
    first = nested[0]
    if isinstance(first, dict):
        return {key: mean_of([one[key] for one in nested]) for key in first}
    if any(value is None for value in nested):
        return None
    return float(np.mean(nested))
