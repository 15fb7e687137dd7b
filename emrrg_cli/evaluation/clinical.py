"""Compares labels of generated reports with those of references: "clinical F1" under every common definition.

Published figures of this name differ in how they count uncertain labels, how they average, how many labels they use,
and how they treat labels that never occur. This module reports all of these variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.labeling import ABNORMAL, FIVE, OBSERVATIONS
from emrrg_cli.scoring.comparison import Floats

# Name of each policy in the results, and the label values that it counts as positive.
POLICIES = {"uncertain_positive": ("positive", "uncertain"), "uncertain_negative": ("positive",)}
# Most reports have no findings, and "No Finding" counts as a hit for these: a model that finds nothing may have a high
# micro F1 over 14 labels. The 13 are without it.
SETS: dict[str, list[int]] = {
    "14": list(range(len(OBSERVATIONS))),
    "13": [OBSERVATIONS.index(name) for name in ABNORMAL],
    "5": [OBSERVATIONS.index(name) for name in FIVE],
}
_COUNT = len(OBSERVATIONS)

Labels = Mapping[str, str | None]


def present(labels: Sequence[Labels], policy: str) -> NDArray[np.bool_]:
    """Returns which of the 14 observations each report has, `[n, 14]`."""
    counted = POLICIES[policy]
    return np.array([[row.get(name) in counted for name in OBSERVATIONS] for row in labels], bool).reshape(-1, _COUNT)


def label_statistics(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> Floats:
    """Returns statistics `[n, 51]` of each study; every figure is computed from their sums.

    Columns: hits, false alarms and misses of each label, then precision, recall and F1 over 14, 13 and 5 labels.
    """
    hits, false, missed = truth & found, ~truth & found, truth & ~found
    single = []
    for chosen in SETS.values():
        counts = [kind[:, chosen].sum(axis=1).astype(np.float64) for kind in (hits, false, missed)]
        single += _ratios(*counts)
    return np.concatenate([hits, false, missed, np.stack(single, axis=1)], axis=1).astype(np.float64)


def clinical_figures(sums: Floats, studies: int) -> dict[str, Any]:
    """Computes the clinical figures from the sums `[51]` of `label_statistics`.

    Returns:
        For `14`, `13` (without "No Finding") and `5` labels: `micro`, `macro` and `example`, each with `precision`,
        `recall` and `f1`. A label that no reference and no report has is undefined. It counts as 0 in `macro`;
        `macro_defined` excludes it; `undefined` is the number of such labels. `labels` has the figures of each label,
        where `support` is the number of references with the label.
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
    """Computes the F1 scores of `HEADLINE`, `[..., 3]`, from sums `[..., 51]`; an undefined label counts as 0."""
    hits, false, missed = (sums[..., start : start + _COUNT] for start in range(0, 3 * _COUNT, _COUNT))

    def micro(chosen: list[int]) -> Floats:
        found: Floats = _ratios(*(kind[..., chosen].sum(axis=-1) for kind in (hits, false, missed)))[2]
        return found

    macro = _ratios(hits, false, missed)[2].mean(axis=-1)
    return np.stack([micro(SETS["14"]), macro, micro(SETS["13"])], axis=-1)


HEADLINE = ("F1_micro_14", "F1_macro_14", "F1_micro_13")


def _ratios(hits: Any, false: Any, missed: Any) -> list[Any]:
    """Returns precision, recall and F1; 0 / 0 counts as 0."""

    def ratio(part: Any, whole: Any) -> Any:
        part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
        return np.divide(part, whole, np.zeros_like(whole), where=whole > 0)

    return [ratio(hits, hits + false), ratio(hits, hits + missed), ratio(2 * hits, 2 * hits + false + missed)]


def _named(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in zip(("precision", "recall", "f1"), values, strict=True)}
