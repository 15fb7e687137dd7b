"""Compares two sets of findings: precision, recall and F1 of each finding and of all together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from emrrg_cli.errors import UsageError


def finding_scores(truth: Sequence[Collection[str]], found: Sequence[Collection[str]]) -> dict[str, dict[str, float]]:
    """Scores findings extracted from reports against the known findings.

    Args:
        truth: The known findings of each study.
        found: The findings in each generated report, in the same order.

    Returns:
        `{"micro": ..., "macro": ..., <finding>: ...}`, each with `precision`, `recall`, `f1` and `support`, the number
        of studies with the finding. `macro` averages over all findings that occur in `truth`; 0 / 0 counts as 0.

    Raises:
        UsageError: The two lists differ in length, or are empty.
    """
    if len(truth) != len(found) or not truth:
        raise UsageError(
            f"findings are known for {len(truth)} studies, but there are reports for {len(found)}; "
            "both numbers must be equal and above 0"
        )
    names = sorted(set().union(*map(set, truth), *map(set, found)))
    counts = {name: _counts(name, truth, found) for name in names}
    scores = {name: _ratios(*counts[name]) for name in names}
    known = [name for name in names if counts[name][0] + counts[name][2]]
    macro = {
        key: sum(scores[name][key] for name in known) / max(1, len(known)) for key in ("precision", "recall", "f1")
    }
    totals = [sum(column) for column in zip(*counts.values(), strict=True)] or [0, 0, 0]
    micro = _ratios(totals[0], totals[1], totals[2])
    return {"micro": micro, "macro": {**macro, "support": micro["support"]}, **scores}


def _counts(name: str, truth: Sequence[Collection[str]], found: Sequence[Collection[str]]) -> tuple[int, int, int]:
    pairs = [(name in t, name in f) for t, f in zip(truth, found, strict=True)]
    return pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False))


def _ratios(hits: int, false: int, missed: int) -> dict[str, float]:
    precision = hits / (hits + false) if hits + false else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    f1 = 2 * hits / (2 * hits + false + missed) if hits + false + missed else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": float(hits + missed)}
