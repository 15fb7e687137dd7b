"""Which validation of a run is the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Smoothing alone gives a BLEU-4 up to this value. Below it, the loss chooses the best model.
MIN_BLEU_4 = 0.02


def better_value(figures: Mapping[str, float], best: list[float] | None) -> list[float] | None:
    """Compares the figures of a validation with the best ones so far.

    The loss decides between scores that are equal to four decimals: early reports often share no 4-gram with any
    reference, and the small value that BLEU adds to avoid a division by zero is no real difference.

    Args:
        figures: `validation/loss`, and optionally `validation/score` and `validation/BLEU_4`.
        best: Score and negative loss of the best validation so far; None if there is none.

    Returns:
        Score and negative loss of this validation if it is the best one, else None.
    """
    score = round(figures.get("validation/score", 0.0), 4)
    if figures.get("validation/BLEU_4", 1.0) <= MIN_BLEU_4:  # noise between models that do not yet write sentences
        score = 0.0
    value = [score, -figures["validation/loss"]]
    if not all(map(math.isfinite, value)):  # NaN is not smaller than anything, so it would pass for the best
        return None
    return None if best is not None and value <= best else value
