"""Rewards of reports in self-critical training: weighted sums of the scores of a single report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from emrrg_cli.labeling import ABNORMAL, contradicted_labels, positive_labels
from emrrg_cli.scoring.comparison import Corpus
from emrrg_cli.scoring.scores import SCORES
from emrrg_cli.vocabulary import CIDER, F1_RULES, FINDINGS, ROUGE_1, WORD_RECALL

# The price of a finding in `findings`. The micro F1 over all studies is highest if a report has the findings whose
# probability is above half of this F1 (Lipton et al., ECML 2014), here of about 0.3. The F1 of single reports is not
# a substitute: most reports have no finding, and a finding of a smaller probability than a half would lower it.
FINDING_PRICE = 0.15
_REMEMBERED = 20_000


class Reward:
    """The weighted sum of scores of each report against its reference; CIDEr counts as a part of 10.

    CIDEr's n-grams are weighted by how rare they are in the training reports. `ROUGE_1` is recall of words,
    `word_recall` is recall of different words, so that a repeated sentence gains nothing. `F1_rules` is the F1
    of the positive labels of the pair, including "No Finding". `findings` is the number of correct positive labels
    without "No Finding", minus `FINDING_PRICE` for each label of the report. A finding that the report also denies is
    never correct: otherwise "Cardiomegaly. Normal heart." would earn the finding and the words of a normal report.

    Args:
        corpus: the training reports.
        weights: weight of each score, by name.
    """

    def __init__(self, corpus: Sequence[str], weights: Mapping[str, float]) -> None:
        self._texts, self._weights = list(corpus), dict(weights)
        self._corpus, self._compared = Corpus(self._texts), 0

    def __call__(self, references: Sequence[str], hypotheses: Sequence[str], *, contrast: bool = False) -> list[float]:
        """Returns one number per pair.

        Args:
            contrast: the references are those of other studies; `findings` counts 0, because its price already makes a
                report that fits every study worthless.
        """
        if self._compared > _REMEMBERED:  # it keeps all texts that it has compared
            self._corpus, self._compared = Corpus(self._texts), 0
        self._compared += len(hypotheses)
        pairs = self._corpus.compare(references, hypotheses)
        total = np.zeros(len(pairs))
        for score in SCORES:
            if wanted := set(score.names) & set(self._weights):
                values = score.combine(score.statistics(pairs), 1)  # each pair as a corpus of its own
                for name in wanted:
                    scale = self._weights[name] / (10 if name == CIDER else 1)
                    total += scale * values[:, score.names.index(name)]
        if weight := self._weights.get(ROUGE_1):
            total += weight * pairs.matches[:, 0] / np.maximum(1, pairs.reference_lengths)
        if weight := self._weights.get(WORD_RECALL):
            total += weight * np.array([_word_recall(*pair) for pair in zip(references, hypotheses, strict=True)])
        f1 = self._weights.get(F1_RULES, 0.0)
        findings = 0.0 if contrast else self._weights.get(FINDINGS, 0.0)
        if f1 or findings:
            different = list({*references, *hypotheses})
            labels = dict(zip(different, positive_labels(different), strict=True))
            for index, (truth, text) in enumerate(zip(references, hypotheses, strict=True)):
                correct = (labels[truth] & labels[text]) - contradicted_labels(text)
                total[index] += f1 * _f1(labels[truth], labels[text], correct)
                total[index] += findings * _findings(labels[text], correct)
        return [float(value) for value in total]


def _word_recall(reference: str, hypothesis: str) -> float:
    words = set(reference.split())
    return len(words & set(hypothesis.split())) / max(1, len(words))


def _f1(truth: set[str], found: set[str], correct: set[str]) -> float:
    return 2 * len(correct) / (len(truth) + len(found)) if truth or found else 1.0


def _findings(found: set[str], correct: set[str]) -> float:
    abnormal = set(ABNORMAL)
    return len(correct & abnormal) - FINDING_PRICE * len(found & abnormal)
