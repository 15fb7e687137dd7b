"""Agreement of the labels of generated reports with those of references: the whole grid of "clinical F1".

Published figures of this name differ in what an uncertain label counts as, in how they average, in how many labels
they take, and in what they do with labels that never occur. Here each choice stands beside the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.labeling import FIVE, OBSERVATIONS
from emrrg_cli.scoring.comparison import Floats

# What an uncertain label counts as, under the names in results.
POLICIES = {"uncertain_positive": ("positive", "uncertain"), "uncertain_negative": ("positive",)}
SETS: dict[str, list[int]] = {
    "14": list(range(len(OBSERVATIONS))),
    "5": [OBSERVATIONS.index(name) for name in FIVE],
}
_COUNT = len(OBSERVATIONS)

Labels = Mapping[str, str | None]


def present(labels: Sequence[Labels], policy: str) -> NDArray[np.bool_]:
    """Which of the 14 observations each report has, `[n, 14]`."""
    counted = POLICIES[policy]
    return np.array([[row.get(name) in counted for name in OBSERVATIONS] for row in labels], bool).reshape(-1, _COUNT)


def label_statistics(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> Floats:
    """Statistics `[n, 48]` whose sums give every figure: hits, false alarms and misses by label, and the averages of
    single studies over 14 and 5 labels (precision, recall, F1)."""
    hits, false, missed = truth & found, ~truth & found, truth & ~found
    single = []
    for chosen in SETS.values():
        counts = [kind[:, chosen].sum(axis=1).astype(np.float64) for kind in (hits, false, missed)]
        single += _ratios(*counts)
    return np.concatenate([hits, false, missed, np.stack(single, axis=1)], axis=1).astype(np.float64)


def clinical_figures(sums: Floats, studies: int) -> dict[str, Any]:
    """Figures from the sums `[48]` of `label_statistics`.

    Returns:
        For `14` and `5`: `micro`, `macro` and `example`, each `precision`, `recall`, `f1`. A label that neither side
        has is undefined; it counts as 0 in `macro`, and `macro_defined` leaves it out; `undefined` counts them.
        `labels` has the figures of each label, `support` being the references that have it.
    """
    hits, false, missed = sums[:_COUNT], sums[_COUNT : 2 * _COUNT], sums[2 * _COUNT : 3 * _COUNT]
    by_label = np.stack(_ratios(hits, false, missed), axis=1)  # [14, 3]
    defined = hits + false + missed > 0
    figures: dict[str, Any] = {}
    for number, (name, chosen) in enumerate(SETS.items()):
        averages = sums[3 * _COUNT + 3 * number :][:3] / max(1, studies)
        known = [label for label in chosen if defined[label]]
        figures[name] = {
            "micro": _named(_ratios(hits[chosen].sum(), false[chosen].sum(), missed[chosen].sum())),
            "macro": _named(by_label[chosen].mean(axis=0)),
            "macro_defined": _named(by_label[known].mean(axis=0) if known else np.zeros(3)),
            "example": _named(averages),
            "undefined": len(chosen) - len(known),
        }
    figures["labels"] = {
        name: {**_named(by_label[label]), "support": int(hits[label] + missed[label])}
        for label, name in enumerate(OBSERVATIONS)
    }
    return figures


def headline(sums: Floats, studies: int) -> Floats:
    """Micro and macro F1 over 14 labels `[..., 2]`, from sums `[..., 48]`; macro counts an undefined label as 0."""
    hits, false, missed = (sums[..., start : start + _COUNT] for start in range(0, 3 * _COUNT, _COUNT))
    micro = _ratios(hits.sum(axis=-1), false.sum(axis=-1), missed.sum(axis=-1))[2]
    return np.stack([micro, _ratios(hits, false, missed)[2].mean(axis=-1)], axis=-1)


HEADLINE = ("F1_micro_14", "F1_macro_14")


def _ratios(hits: Any, false: Any, missed: Any) -> list[Any]:
    """Precision, recall and F1; a ratio of nothing by nothing is 0."""

    def ratio(part: Any, whole: Any) -> Any:
        part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
        return np.divide(part, whole, np.zeros_like(whole), where=whole > 0)

    return [ratio(hits, hits + false), ratio(hits, hits + missed), ratio(2 * hits, 2 * hits + false + missed)]


def _named(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in zip(("precision", "recall", "f1"), values, strict=True)}
