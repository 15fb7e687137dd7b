"""What two texts of a pair have in common: n-grams and the longest common subsequence, for many pairs quickly.

BLEU, ROUGE-L and CIDEr are computed from these numbers for controls and intervals, which need tens of thousands of
pairs. With one reference per study, they equal pycocoevalcap's scores to 1e-9.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDERS = 4  # n-grams of one to four words

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Numbers of `n` pairs of a reference and a hypothesis, and the texts themselves.

    Attributes:
        lengths, reference_lengths: `[n]`, words.
        matches: `[n, 4]`, n-grams in common, each as often as both have it.
        products: `[n, 4]`, scalar products of CIDEr's vectors, hypothesis clipped to the reference.
        norms, reference_norms: `[n, 4]`, lengths of CIDEr's vectors.
        tokens, reference_tokens: `[n]`, parts between single spaces; between two spaces, there is an empty part.
        subsequences: `[n]`, parts of the longest common subsequence; 0 if one text has no words.
    """

    references: Sequence[str]
    hypotheses: Sequence[str]
    lengths: Floats
    reference_lengths: Floats
    matches: Floats
    products: Floats
    norms: Floats
    reference_norms: Floats
    tokens: Floats
    reference_tokens: Floats
    subsequences: Floats

    def __len__(self) -> int:
        return len(self.hypotheses)


@dataclass(frozen=True)
class _Text:
    words: list[int]
    counts: tuple[dict[int, int], ...]  # number of an n-gram -> how often, for n = 1..4
    norms: tuple[float, ...]
    tokens: list[int]  # parts between single spaces, as ROUGE-L of pycocoevalcap takes them
    positions: dict[int, int]  # token -> bits of its positions


class Corpus:
    """References, which define how rare each n-gram is, and the texts that are compared with them."""

    def __init__(self, references: Sequence[str]) -> None:
        self._words: dict[str, int] = {}
        self._ngrams: dict[tuple[int, ...], int] = {}
        self._texts: dict[str, _Text] = {}
        self._weights: list[float] = []
        frequencies: Counter[int] = Counter()
        for text in references:
            for counts in self._count(self._split(text)):
                frequencies.update(counts.keys())
        studies = math.log(len(references)) if references else 0.0
        # An n-gram that no reference has is weighted as if one had it.
        self._unseen = studies**2
        self._weights = [(studies - math.log(max(1, frequencies[number]))) ** 2 for number in range(len(self._ngrams))]

    def compare(self, references: Sequence[str], hypotheses: Sequence[str]) -> Pairs:
        """Compares each hypothesis with the reference at the same index."""
        pairs = [(self._text(truth), self._text(text)) for truth, text in zip(references, hypotheses, strict=True)]
        common = np.array([self._common(*pair) for pair in pairs], np.float64).reshape(len(pairs), 2 * ORDERS)
        return Pairs(
            references=references,
            hypotheses=hypotheses,
            lengths=np.array([len(text.words) for _, text in pairs], np.float64),
            reference_lengths=np.array([len(truth.words) for truth, _ in pairs], np.float64),
            matches=common[:, :ORDERS],
            products=common[:, ORDERS:],
            norms=np.array([text.norms for _, text in pairs], np.float64).reshape(len(pairs), ORDERS),
            reference_norms=np.array([truth.norms for truth, _ in pairs], np.float64).reshape(len(pairs), ORDERS),
            tokens=np.array([len(text.tokens) for _, text in pairs], np.float64),
            reference_tokens=np.array([len(truth.tokens) for truth, _ in pairs], np.float64),
            subsequences=np.array([_longest_common(truth, text) for truth, text in pairs], np.float64),
        )

    def matches(self, texts: Sequence[str]) -> Floats:
        """Counts the n-grams that each pair of the texts has in common, `[n, n, 4]`, as in `Pairs.matches`."""
        counted = [self._text(text).counts for text in texts]
        return np.stack([_common_of_all([counts[order] for counts in counted]) for order in range(ORDERS)], axis=-1)

    def _split(self, text: str) -> list[int]:
        return [self._words.setdefault(word, len(self._words)) for word in text.split()]

    def _count(self, words: list[int]) -> tuple[dict[int, int], ...]:
        numbers = self._ngrams
        counted = []
        for order in range(1, ORDERS + 1):
            grams = zip(*(words[start:] for start in range(order)), strict=False)
            counted.append(dict(Counter(numbers.setdefault(gram, len(numbers)) for gram in grams)))
        return tuple(counted)

    def _text(self, text: str) -> _Text:
        if (known := self._texts.get(text)) is not None:
            return known
        words = self._split(text)
        counts = self._count(words)
        self._weights += [self._unseen] * (len(self._ngrams) - len(self._weights))
        weights = self._weights
        norms = tuple(math.sqrt(sum(n * n * weights[gram] for gram, n in grams.items())) for grams in counts)
        tokens = [self._words.setdefault(token, len(self._words)) for token in text.split(" ")]
        positions: dict[int, int] = {}
        for place, token in enumerate(tokens):
            positions[token] = positions.get(token, 0) | 1 << place
        made = self._texts[text] = _Text(words, counts, norms, tokens, positions)
        return made

    def _common(self, truth: _Text, text: _Text) -> list[float]:
        matches: list[float] = []
        products: list[float] = []
        weights = self._weights
        for wanted, got in zip(truth.counts, text.counts, strict=True):
            matched, product = 0, 0.0
            for gram in wanted.keys() & got.keys():
                both = min(wanted[gram], got[gram])
                matched += both
                product += both * wanted[gram] * weights[gram]
            matches.append(matched)
            products.append(product)
        return matches + products


def _common_of_all(counted: Sequence[Mapping[int, int]]) -> Floats:
    """Returns the sum of the smaller counts of each pair, `[n, n]`, for counts by n-gram of n texts."""
    columns = {gram: column for column, gram in enumerate(dict.fromkeys(gram for row in counted for gram in row))}
    counts = np.zeros((len(counted), len(columns)), np.float32)
    for place, row in enumerate(counted):
        counts[place, [columns[gram] for gram in row]] = list(row.values())
    # min(a, b) is the number of k from 1 with a >= k and b >= k: a sum of products.
    common = np.zeros((len(counted), len(counted)), np.float64)
    for k in range(1, int(counts.max(initial=0)) + 1):
        reached = (counts[:, (counts >= k).any(axis=0)] >= k).astype(np.float32)
        common += reached @ reached.T
    return common


def _longest_common(truth: _Text, text: _Text) -> int:
    """Returns the length of the longest common subsequence; the bits of an integer hold a column of the table.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited" (2004).
    """
    if not (truth.words and text.words):
        return 0
    full = (1 << len(truth.tokens)) - 1
    row = full
    places = truth.positions
    for token in text.tokens:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(truth.tokens) - row.bit_count()
