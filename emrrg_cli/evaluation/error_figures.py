"""Figures on typical errors of a set of reports: copies, lengths, repetition, invented and missed findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emrrg_cli.evaluation.clinical import POLICIES, Labels
from emrrg_cli.evaluation.findings import finding_scores
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.labeling import ABNORMAL, OBSERVATIONS, contradicted_labels
from emrrg_cli.vocabulary import CIDER, ROUGE_L

# An uncertain label counts as a finding in the comparison of each study.
_COUNTED = POLICIES["uncertain_positive"]
_NOT_MENTIONED = "not mentioned"
_BIN = 10  # words


def error_figures(
    predictions: Predictions, truth: Sequence[Labels], found: Sequence[Labels], train_reports: Sequence[str] | None
) -> dict[str, Any]:
    """Computes figures that show typical errors of generated reports.

    Args:
        predictions: Generated reports and references.
        truth: Labels of the references.
        found: Labels of the generated reports.
        train_reports: Training reports; None skips the shares of text copied from them.

    Returns:
        `distinct_reports`, `most_common`, `verbatim_reports` and `verbatim_sentences` (shares copied from training
        reports), `repetition`, `lengths`, `findings` (agreed, invented and missed), `contradictory_reports` (shares of
        reports that affirm and deny the same finding, and the micro F1 of 13 findings if these do not count as found)
        and `confusion` for each label.
    """
    texts = [_spaced(text) for text in predictions.hypotheses]
    record: dict[str, Any] = {
        "distinct_reports": {"number": len(set(texts)), "share": len(set(texts)) / max(1, len(texts))},
        "most_common": [{"report": text, "studies": n} for text, n in Counter(texts).most_common(3)],
    }
    if train_reports is not None:
        known = {_spaced(report) for report in train_reports}
        sentences = {sentence for report in known for sentence in split_sentences(report)}
        written = [sentence for text in texts for sentence in split_sentences(text)]
        record["verbatim_reports"] = _share(text in known for text in texts)
        record["verbatim_sentences"] = _share(sentence in sentences for sentence in written)
    record["repetition"] = {
        "reports_with_a_repeated_sentence": _share(_repeats(split_sentences(text)) for text in texts),
        "repeated_four_word_sequences": float(np.mean([_repeated_sequences(text) for text in texts])),
        "empty_reports": sum(not text for text in texts),
    }
    references = [_spaced(text) for text in predictions.references]
    record["lengths"] = {"hypotheses": _lengths(texts), "references": _lengths(references), "bin": _BIN}
    differences = [compare_findings(t, f) for t, f in zip(truth, found, strict=True)]
    record["findings"] = {
        f"{kind}_per_study": float(np.mean([len(one[kind]) for one in differences])) for kind in ("invented", "missed")
    } | {kind: sum(len(one[kind]) for one in differences) for kind in ("agreed", "invented", "missed")}
    record["contradictory_reports"] = _contradictions(texts, references, truth, found)
    record["confusion"] = {name: _confusion(name, truth, found) for name in OBSERVATIONS}
    return record


def compare_findings(truth: Labels, found: Labels) -> dict[str, list[str]]:
    """Returns the findings in both texts (`agreed`), only in the report (`invented`), or only in the reference
    (`missed`)."""
    present = [name for name in ABNORMAL if truth.get(name) in _COUNTED]
    reported = [name for name in ABNORMAL if found.get(name) in _COUNTED]
    return {
        "agreed": [name for name in present if name in reported],
        "invented": [name for name in reported if name not in present],
        "missed": [name for name in present if name not in reported],
    }


def split_sentences(text: str) -> list[str]:
    """Splits a report with single spaces into sentences; they end in " . " (cleaned text) or ". " (original text)."""
    parts = text.replace(" . ", ". ").removesuffix(" .").removesuffix(".").split(". ")
    return [part.strip() for part in parts if part.strip()]


def _contradictions(
    texts: Sequence[str], references: Sequence[str], truth: Sequence[Labels], found: Sequence[Labels]
) -> dict[str, float]:
    contradicted = [contradicted_labels(text) for text in texts]
    present, reported = (
        [{name for name in ABNORMAL if labels.get(name) == "positive"} for labels in side] for side in (truth, found)
    )
    credible = [one - other for one, other in zip(reported, contradicted, strict=True)]
    return {
        "hypotheses": _share(map(bool, contradicted)),
        "references": _share(bool(contradicted_labels(text)) for text in references),
        "micro_f1_without": finding_scores(present, credible)["micro"]["f1"],
    }


def _confusion(name: str, truth: Sequence[Labels], found: Sequence[Labels]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = {}
    for own, other in zip(truth, found, strict=True):
        row = table.setdefault(own.get(name) or _NOT_MENTIONED, Counter())
        row[other.get(name) or _NOT_MENTIONED] += 1
    return {state: dict(counts) for state, counts in sorted(table.items())}


def _lengths(texts: Sequence[str]) -> dict[str, Any]:
    words = np.array([len(text.split()) for text in texts])
    bins = Counter((words // _BIN * _BIN).tolist())
    low, middle, high = np.percentile(words, [10, 50, 90])
    return {
        "mean": float(words.mean()),
        "p10": float(low),
        "median": float(middle),
        "p90": float(high),
        "histogram": {str(start): bins[start] for start in sorted(bins)},
    }


def _repeated_sequences(text: str) -> float:
    words = text.split()
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _repeats(sentences: Sequence[str]) -> bool:
    return len(set(sentences)) < len(sentences)


def _share(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.split())


def study_rows(
    predictions: Predictions,
    statistics: Mapping[str, Any],
    labels: tuple[Sequence[Labels], Sequence[Labels]],
    train_reports: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Returns one record per study: its texts, scores and findings.

    Args:
        predictions: Generated reports and references.
        statistics: ROUGE-L and CIDEr of each study, as `assess` returns them.
        labels: Labels of the references, and labels of the generated reports.
        train_reports: Training reports; None leaves out `verbatim_in_training`.
    """
    known = None if train_reports is None else {_spaced(report) for report in train_reports}
    rows = []
    for number, (study, truth, text) in enumerate(
        zip(predictions.study_ids, predictions.references, predictions.hypotheses, strict=True)
    ):
        row: dict[str, Any] = {"study_id": study, "reference": truth, "hypothesis": text}
        row |= {name: float(statistics[name][number, 0]) for name in (CIDER, ROUGE_L)}
        row |= compare_findings(labels[0][number], labels[1][number])
        row["words"] = len(text.split())
        if known is not None:
            row["verbatim_in_training"] = _spaced(text) in known
        rows.append(row)
    return rows
