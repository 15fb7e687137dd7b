"""Labels whole reports: reads each sentence once and keeps the strongest mention of each observation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from emrrg_cli.errors import require_report
from emrrg_cli.labeling.cues import NORMAL_REPORT
from emrrg_cli.labeling.events import split_sentences
from emrrg_cli.labeling.policy import OBSERVATIONS, Label, no_finding, stronger
from emrrg_cli.labeling.scopes import SentenceReader

_NORMAL = re.compile(NORMAL_REPORT)
# Words by which a sentence may affirm and deny a finding of different places.
_PLACE = re.compile(
    r"\b(?:left|right|upper|middle|mid|lower|bas(?:e|es|al|ilar)|apex|apical|other|further|new)\b", re.I
)
_NO_PLACE = {"Cardiomegaly", "Enlarged Cardiomediastinum"}  # there is only one heart


def label_report(text: str) -> dict[str, Label | None]:
    """Labels a chest X-ray report for CheXpert's 14 observations by our own rules (see `policy`).

    The labels differ from those of CheXbert and of CheXpert's labeler.

    Args:
        text: A report in English, raw or cleaned as R2Gen does (lower case, " . " between sentences).

    Returns:
        `OBSERVATIONS` in order, each "positive", "negative", "uncertain", or None if the report does not mention it.
        All are None for an empty report.

    Raises:
        UsageError: `text` is not a text.
    """
    require_report(text)
    labels: dict[str, Label | None] = dict.fromkeys(OBSERVATIONS)
    normal = False
    for sentence in split_sentences(text):
        found, calls_normal = _read_sentence(sentence)
        normal = normal or calls_normal
        for observation, label in found:
            labels[observation] = stronger(labels[observation], label)
    labels["No Finding"] = no_finding(labels, normal)
    return labels


def label_reports(texts: Iterable[str]) -> list[dict[str, Label | None]]:
    """Runs `label_report` on each text, in order; repeated sentences are read once."""
    return [label_report(text) for text in texts]


def positive_labels(texts: Iterable[str]) -> list[set[str]]:
    """Returns the positive observations of each text, or "No Finding" for a normal chest."""
    return [{name for name, label in labels.items() if label == "positive"} for labels in label_reports(texts)]


def contradicted_labels(text: str) -> set[str]:
    """Returns the observations that a report affirms and denies ("Cardiomegaly. Normal heart").

    Within one sentence, this counts only if the sentence does not distinguish places ("Left effusion, no right one").
    Correct reports do this too if their sentences are about different sides or parts: 5 percent in IU X-Ray, nearly
    always for lung opacity ("Opacity in the right base. The left lung is clear.").
    """
    affirmed: set[str] = set()
    denied: set[str] = set()
    for sentence in split_sentences(text):
        told: dict[str, set[Label]] = {}
        for observation, label in _read_sentence(sentence)[0]:
            told.setdefault(observation, set()).add(label)
        placed = bool(_PLACE.search(sentence))
        for name, labels in told.items():
            if "positive" in labels:
                affirmed.add(name)
            if "negative" in labels and ("positive" not in labels or not placed or name in _NO_PLACE):
                denied.add(name)
    return affirmed & denied


# Sentences repeat: about half of the sentences in IU X-Ray occur in several reports.
@lru_cache(maxsize=65_536)
def _read_sentence(sentence: str) -> tuple[tuple[tuple[str, Label], ...], bool]:
    """Returns (observation, label) for each mention that counts, and whether the sentence calls something normal."""
    mentions = SentenceReader(sentence).read()
    found = ((name, mention.label) for mention in mentions for name in mention.observations)
    return tuple((name, label) for name, label in found if label is not None), bool(_NORMAL.search(sentence))
