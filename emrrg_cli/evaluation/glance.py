"""What is wrong with a set of reports, at a glance: copies, lengths, repetition, findings invented and missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emrrg_cli.evaluation.clinical import POLICIES, Labels
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.labeling import OBSERVATIONS
from emrrg_cli.vocabulary import CIDER, ROUGE_L

# Findings of a study that are compared: an uncertain one counts, and "No Finding" is none.
_COUNTED = POLICIES["uncertain_positive"]
FINDINGS = tuple(name for name in OBSERVATIONS if name != "No Finding")
_NOT_MENTIONED = "not mentioned"
_BIN = 10  # words


def at_a_glance(
    predictions: Predictions, truth: Sequence[Labels], found: Sequence[Labels], train_reports: Sequence[str] | None
) -> dict[str, Any]:
    """Figures that show at once how reports go wrong.

    Args:
        truth, found: labels of references and hypotheses.
        train_reports: None leaves out what stands verbatim in training.

    Returns:
        `distinct_reports`, `verbatim_reports`, `verbatim_sentences` (shares, the last two only with training reports),
        `repetition`, `lengths`, `findings` (invented and missed) and `confusion` by label.
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
    record["confusion"] = {name: _confusion(name, truth, found) for name in OBSERVATIONS}
    return record


def compare_findings(truth: Labels, found: Labels) -> dict[str, list[str]]:
    """Findings of a study that reference and report share (`agreed`), and that only one has (`invented`, `missed`)."""
    here = [name for name in FINDINGS if truth.get(name) in _COUNTED]
    said = [name for name in FINDINGS if found.get(name) in _COUNTED]
    return {
        "agreed": [name for name in here if name in said],
        "invented": [name for name in said if name not in here],
        "missed": [name for name in here if name not in said],
    }


def split_sentences(text: str) -> list[str]:
    """Sentences of a report with single spaces, cleaned (" . ") or as written (". ")."""
    parts = text.replace(" . ", ". ").removesuffix(" .").removesuffix(".").split(". ")
    return [part.strip() for part in parts if part.strip()]


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
    every = list(values)
    return sum(every) / len(every) if every else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.split())


def study_rows(
    predictions: Predictions,
    statistics: Mapping[str, Any],
    labels: tuple[Sequence[Labels], Sequence[Labels]],
    train_reports: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """One record a study: its texts, scores and findings.

    Args:
        statistics: ROUGE-L and CIDEr of each study, as `assess` finds them.
        labels: of references and hypotheses.
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
