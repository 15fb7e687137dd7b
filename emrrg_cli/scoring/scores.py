"""The registry of scores. A new score is a class here and an entry in `SCORES`.

A score turns each pair of reports into statistics, and sums of these over studies into its value. Controls, intervals
and tests follow from that. The values themselves equal those of the packages named.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from emrrg_cli.scoring import meteor
from emrrg_cli.scoring.comparison import ORDERS, Floats, Pairs
from emrrg_cli.vocabulary import BLEU_NAMES, CIDER, METEOR, ROUGE_L


class Score(Protocol):
    """One score, or several that share their statistics.

    Attributes:
        names: Keys in results.
        slow: Takes milliseconds or more per pair, so only a few shuffles of the control are scored.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def slow(self) -> bool: ...

    def statistics(self, pairs: Pairs) -> Floats:
        """Returns `[n, k]`, one row per pair; raises `Unavailable` if something that the score needs is missing."""
        ...

    def combine(self, sums: Floats, studies: int) -> Floats:
        """Returns scores `[..., len(names)]` from sums `[..., k]` over this number of studies."""
        ...


class Unavailable(Exception):
    """A score cannot be computed here; the message is the reason, without a full stop."""


class Bleu:
    """BLEU-1 to 4 of the corpus (Papineni et al., 2002), as pycocoevalcap computes it."""

    names = BLEU_NAMES
    slow = False

    def statistics(self, pairs: Pairs) -> Floats:
        possible = np.maximum(0, pairs.lengths[:, None] - np.arange(ORDERS))
        return np.concatenate(
            [pairs.matches, possible, pairs.lengths[:, None], pairs.reference_lengths[:, None]], axis=1
        )

    def combine(self, sums: Floats, studies: int) -> Floats:
        matches, possible = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
        # pycocoevalcap adds these small numbers to avoid a division by zero.
        precision = np.cumprod((matches + 1e-15) / (possible + 1e-9), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
        ratio = (sums[..., -2] + 1e-15) / (sums[..., -1] + 1e-9)
        with np.errstate(over="ignore"):
            brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
        return np.asarray(precision * brevity[..., None], np.float64)


class RougeL:
    """ROUGE-L with beta = 1.2, mean over studies (Lin, 2004)."""

    names = (ROUGE_L,)
    slow = False

    def statistics(self, pairs: Pairs) -> Floats:
        return self.values(*self.ratios(pairs))[:, None]

    def ratios(self, pairs: Pairs) -> tuple[Floats, Floats]:
        """Returns precision and recall of each pair, each `[n]`."""
        return pairs.subsequences / pairs.tokens, pairs.subsequences / pairs.reference_tokens

    def values(self, precision: Floats, recall: Floats) -> Floats:
        """Returns the F value of each precision and recall, `[n]`."""
        weight = 1.2**2
        divisor = recall + weight * precision
        return np.divide((1 + weight) * precision * recall, divisor, np.zeros_like(divisor), where=divisor > 0)

    def combine(self, sums: Floats, studies: int) -> Floats:
        return sums / max(1, studies)


class Cider:
    """CIDEr-D, mean over studies, from 0 to 10 (Vedantam et al., 2015)."""

    names = (CIDER,)
    slow = False

    def statistics(self, pairs: Pairs) -> Floats:
        norms = pairs.norms * pairs.reference_norms
        cosines = np.divide(pairs.products, norms, np.zeros_like(norms), where=norms > 0)
        # pycocoevalcap uses the number of bigrams as the length of a text.
        bigrams, reference_bigrams = (np.maximum(0, n - 1) for n in (pairs.lengths, pairs.reference_lengths))
        penalty = np.exp(-((bigrams - reference_bigrams) ** 2) / (2 * 6.0**2))
        return np.asarray(10 * cosines.mean(axis=1) * penalty, np.float64)[:, None]

    def combine(self, sums: Floats, studies: int) -> Floats:
        return sums / max(1, studies)


class Meteor:
    """METEOR 1.5 of the corpus (Denkowski and Lavie, 2014), by its own Java program."""

    names = (METEOR,)
    slow = True

    def statistics(self, pairs: Pairs) -> Floats:
        try:
            return meteor.statistics([[text] for text in pairs.references], pairs.hypotheses)
        except meteor.JavaFailure as failure:
            raise Unavailable(str(failure)) from failure

    def combine(self, sums: Floats, studies: int) -> Floats:
        return meteor.combine(sums)[..., None]


class BertScore:
    """BERTScore, F1 (Zhang et al., 2020), mean over studies, by the package bert-score.

    It is not in `SCORES`, since it needs a model.

    Args:
        model: Hub name or directory of a model that bert-score knows.
    """

    names = ("BERTScore",)
    slow = True

    def __init__(self, model: str) -> None:
        self.model = model

    def statistics(self, pairs: Pairs) -> Floats:
        try:
            from bert_score import score
        except ImportError as error:
            raise Unavailable(f"BERTScore needs the package bert-score: pip install bert-score ({error})") from error
        try:
            _, _, f1 = score(list(pairs.hypotheses), list(pairs.references), model_type=self.model, verbose=False)
        except Exception as error:  # any error of the package affects only this score
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise Unavailable(f"bert-score failed with {self.model}: {reason[:200]}") from error
        return np.asarray(f1.tolist(), np.float64)[:, None]

    def combine(self, sums: Floats, studies: int) -> Floats:
        return sums / max(1, studies)


SCORES: tuple[Score, ...] = (Bleu(), RougeL(), Meteor(), Cider())

NAMES: tuple[str, ...] = tuple(name for score in SCORES for name in score.names)
