"""Reads labels from a report: the counterpart of the grammar, to score reports that a model writes about phantoms.

It knows only the vocabulary and the negations of the grammar; it is not a labeller for real reports.
"""

from __future__ import annotations

import re

# Words that name a finding; cardiomegaly needs both the heart and a word for its enlargement.
_NAMES: dict[str, re.Pattern[str]] = {
    "atelectasis": re.compile(r"\batelecta\w*"),
    "cardiomegaly": re.compile(
        r"\bcardiomegaly\b|\b(?:heart|cardiac|cardiomediastinal)\b.*?\benlarge\w*"
        r"|\benlarge\w*(?= of the (?:cardiac|heart))"
    ),
    "consolidation": re.compile(r"\bconsolidat\w*|\bairspace (?:opacit\w*|disease)|\bpneumonia\b"),
    "edema": re.compile(r"\bo?edema\b|\bvascular congestion\b"),
    "nodule": re.compile(r"\bnodul\w*"),
    "pleural_effusion": re.compile(r"\beffusions?\b|\bpleural fluid\b|\bblunt\w*"),
    "pneumothorax": re.compile(r"\bpneumothora\w*"),
    "support_device": re.compile(
        r"\b(?:endotracheal|nasogastric|enteric|ng|et) tube|\bcentral (?:venous )?(?:line|catheter)|\bpacemaker"
        r"|\bpicc\b"
    ),
}
_DENIAL = re.compile(r"\b(?:no|not|without|neither|negative for|free of|clear of|absence of)\b")
# Ends the scope of a denial.
_TURN = re.compile(r"\b(?:but|however|although|except)\b")
# Denials after the name. `cannot be excluded` and `not excluded` are not denials.
_DENIED_AFTER = re.compile(r"\b(?:is|are) (?:not (?:seen|identified|present|evident|visualized|demonstrated)|absent)\b")
_SENTENCE_END = re.compile(r"[.;\n]+(?:\s|$)|\s\.\s?")


def read_labels(text: str) -> set[str]:
    """Returns the findings that a report of the phantom grammar states, including uncertain ones.

    A finding that one sentence states and another denies counts as stated.

    Args:
        text: Raw or cleaned (lower case, without punctuation, sentences joined by " . ").

    Returns:
        A subset of `LABELS`.
    """
    found: set[str] = set()
    for sentence in _SENTENCE_END.split(text.lower()):
        for clause in _TURN.split(sentence):
            found |= _stated(clause)
    return found


def _stated(clause: str) -> set[str]:
    denial = _DENIAL.search(clause)
    after = _DENIED_AFTER.search(clause)
    stated = set()
    for label, name in _NAMES.items():
        match = name.search(clause)
        # The denial is after the heart: `the heart is not enlarged`.
        if match is None or (denial is not None and denial.start() < match.end()):
            continue
        if after is None or after.start() < match.start():
            stated.add(label)
    return stated
