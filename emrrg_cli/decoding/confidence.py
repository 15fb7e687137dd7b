"""Confidence of the model in its report: probabilities of words and sentences from the probabilities of tokens."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from emrrg_cli.datasets.report_text import sentence_spans


@dataclass(frozen=True)
class Sentence:
    """A sentence of a report: `text[start:end]`, and the geometric mean of the probabilities of its tokens."""

    start: int
    end: int
    confidence: float


@dataclass(frozen=True)
class Confidence:
    """Confidence of the model in a report.

    The probabilities are those of the chosen report's tokens, before penalties, temperature and other decoding options.
    They measure how usual the words are, not whether they are true.

    Args:
        mean_token_logprob: mean log-probability of all tokens, including the end token.
        sentences: the sentences, in order.
        words: product of the token probabilities of each word between spaces, `[words]`.
        sentence_of_token: number of the sentence of each token, -1 for the end token, `[tokens]`.
    """

    mean_token_logprob: float
    sentences: list[Sentence]
    words: list[float]
    sentence_of_token: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Returns the values for a record."""
        return {
            "mean_token_logprob": round(self.mean_token_logprob, 4),
            "sentences": [
                {"start": one.start, "end": one.end, "confidence": round(one.confidence, 4)} for one in self.sentences
            ],
            "word_confidence": [round(value, 3) for value in self.words],
        }


def read_confidence(
    text: str, tokens: Sequence[int], log_probabilities: Sequence[float], decode: Callable[[Sequence[int]], str]
) -> Confidence:
    """Computes the confidence in each part of a report.

    Args:
        text: the report, with single spaces between words.
        tokens: tokens that `decode` turns into `text`.
        log_probabilities: log-probability of each token.
        decode: converts tokens to text, without special tokens.
    """
    places = token_places(text, tokens, decode)
    spans = sentence_spans(text)
    sentence_of_token = _part_of(places, [start for start, _ in spans], len(text))
    starts = [0, *(place + 1 for place, letter in enumerate(text) if letter == " ")] if text else []
    word_of_token = _part_of(places, starts, len(text))
    sentences, words = (
        [[value for value, part in zip(log_probabilities, parts, strict=True) if part == number] for number in range(n)]
        for parts, n in ((sentence_of_token, len(spans)), (word_of_token, len(starts)))
    )
    return Confidence(
        mean_token_logprob=sum(log_probabilities) / max(1, len(log_probabilities)),
        sentences=[
            Sentence(start, end, math.exp(sum(values) / max(1, len(values))))
            for (start, end), values in zip(spans, sentences, strict=True)
        ],
        words=[math.exp(sum(values)) for values in words],
        sentence_of_token=sentence_of_token,
    )


def token_places(text: str, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Returns the position in a text at which each token begins, after spaces; `len(text)` for tokens without text.

    A token's text is what it adds to the text of the previous tokens, because some tokenizers decode a token
    differently at the start of a text, and several tokens can form one letter.
    """
    ends = accumulate((_common(text, decode(tokens[: count + 1])) for count in range(len(tokens))), max, initial=0)
    places = []
    for start, _ in pairwise(ends):
        while start < len(text) and text[start] == " ":
            start += 1
        places.append(start)
    return places


def _common(text: str, other: str) -> int:
    # Length of the common prefix of two texts.
    if text.startswith(other):
        return len(other)
    return next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(text))


def _part_of(places: Sequence[int], starts: Sequence[int], length: int) -> list[int]:
    return [bisect_right(starts, place) - 1 if place < length else -1 for place in places]
