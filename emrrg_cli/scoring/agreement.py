"""Chooses the report that agrees best with all others: minimum Bayes risk decoding among samples.

The likeliest report of a study is not the one with the best expected score. If the samples are taken as the possible
references, the expected score of each of them can be computed, and the best one is kept.

Source: minimum Bayes risk decoding (Kumar and Byrne, NAACL 2004; Eikema and Aziz, COLING 2020).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from emrrg_cli.labeling import ABNORMAL, OBSERVATIONS, contradicted_labels, positive_labels
from emrrg_cli.scoring.comparison import ORDERS, Corpus, Floats
from emrrg_cli.scoring.reward import FINDING_PRICE
from emrrg_cli.scoring.scores import Bleu
from emrrg_cli.vocabulary import BLEU_NAMES, F1_RULES, FINDINGS, ROUGE_1, WORD_RECALL


def most_agreed(texts: Sequence[str], scores: Mapping[str, float]) -> int:
    """Returns the index of the text with the highest mean score against all texts; the first one if several are equal.

    Args:
        scores: weights by name, of `emrrg_cli.vocabulary.AGREEMENTS`. Each is the score of a single pair.
    """
    times = Counter(texts)
    different = list(times)
    total = np.zeros((len(different), len(different)))
    of_findings = {F1_RULES, FINDINGS}
    if set(scores) - of_findings:
        total += _of_words(different, scores)
    if set(scores) & of_findings:
        total += _of_findings(different, scores)
    agreement = total @ np.array([times[text] for text in different], np.float64)
    return texts.index(different[int(agreement.argmax())])


def _of_words(texts: Sequence[str], scores: Mapping[str, float]) -> Floats:
    """Returns the weighted sum of BLEU and recall, `[n, n]`; rows are hypotheses, columns references."""
    matches = Corpus(()).matches(texts)
    lengths = np.array([len(text.split()) for text in texts], np.float64)
    possible = np.maximum(0, lengths[:, None] - np.arange(ORDERS))  # [n, 4]
    own = np.broadcast_to(np.column_stack([possible, lengths])[:, None], (len(texts), len(texts), ORDERS + 1))
    others = np.broadcast_to(lengths[None, :, None], (len(texts), len(texts), 1))
    bleu = Bleu().combine(np.concatenate([matches, own, others], axis=-1), 1)
    total = bleu @ np.array([scores.get(name, 0.0) for name in BLEU_NAMES])
    recall = matches[..., 0] / np.maximum(1, lengths)
    total += scores.get(ROUGE_1, 0.0) * recall
    if weight := scores.get(WORD_RECALL):
        total += weight * _word_recall(texts)
    return np.asarray(total, np.float64)


def _word_recall(texts: Sequence[str]) -> Floats:
    words = {word: number for number, word in enumerate(sorted({word for text in texts for word in text.split()}))}
    there = np.zeros((len(texts), len(words)))
    for row, text in zip(there, texts, strict=True):
        row[[words[word] for word in text.split()]] = 1
    return np.asarray(there @ there.T / np.maximum(1, there.sum(axis=1)), np.float64)


def _of_findings(texts: Sequence[str], scores: Mapping[str, float]) -> Floats:
    """Returns the weighted sum of the scores of findings, `[n, n]`, as in `scoring.reward`."""
    there = _table(positive_labels(texts))
    credible = there - there * _table([contradicted_labels(text) for text in texts])
    sums = there.sum(axis=1)
    both = sums[:, None] + sums
    f1 = np.divide(2 * credible @ there.T, both, np.ones_like(both), where=both > 0)
    abnormal = [name in ABNORMAL for name in OBSERVATIONS]
    found = there[:, abnormal]
    worth = credible[:, abnormal] @ found.T - FINDING_PRICE * found.sum(axis=1, keepdims=True)
    return np.asarray(scores.get(F1_RULES, 0.0) * f1 + scores.get(FINDINGS, 0.0) * worth, np.float64)


def _table(labels: Sequence[set[str]]) -> Floats:
    """Returns `[n, observations]`, 1 for each label of each text."""
    rows = [[name in found for name in OBSERVATIONS] for found in labels]
    return np.array(rows, np.float64).reshape(len(labels), len(OBSERVATIONS))
