"""A report as sentences, and a sentence as the events in it: mentions of findings, organs, their states, cues."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from emrrg_cli.labeling import cues, vocabulary


class Event(NamedTuple):
    """A phrase that matters: its kind, what it is of that kind, and where it stands in the sentence."""

    kind: str  # "mention", "absence", "organ", "state", "cue", "comma"
    name: str  # the organ, state or cue; the text of a mention
    observations: tuple[str, ...]  # of a mention or absence
    start: int
    end: int


_SPLIT = re.compile(r"\.(?!\d)|(?<!\d)\.|[;?!\n]|<br>")
_SPACE = re.compile(r"[^\S\n]+")


def split_sentences(text: str) -> list[str]:
    """Lower-case sentences of a report, raw or cleaned (" . " between sentences); a decimal point splits nothing."""
    text = _SPACE.sub(" ", text.lower().replace("vs.", "vs").replace("’", "'"))
    return [sentence for part in _SPLIT.split(text) if (sentence := part.strip(" .,"))]


def _compile() -> tuple[re.Pattern[str], list[tuple[str, str, tuple[str, ...]]]]:
    """One pattern with a group for each kind of event, in order of priority, and what each group means."""
    meanings: list[tuple[str, str, tuple[str, ...]]] = []
    groups: list[str] = []

    def add(kind: str, name: str, observations: tuple[str, ...], patterns: Iterable[str]) -> None:
        meanings.append((kind, name, observations))
        groups.append("(" + "|".join(patterns) + ")")

    add("noise", "", (), vocabulary.NOISE)
    for observations, patterns in vocabulary.ABSENCES:
        add("absence", "", observations, patterns)
    for observations, patterns in vocabulary.MENTIONS:
        add("mention", "", observations, patterns)
    for organ, patterns in vocabulary.ORGANS.items():
        add("organ", organ, (), patterns)
    for state, pattern in cues.STATES:
        add("state", state, (), [pattern])
    for cue, pattern in cues.CUES:
        add("cue", cue, (), [pattern])
    return re.compile(r"\b(?:" + "|".join(groups) + r")\b|(,)"), [*meanings, ("comma", "", ())]


_PATTERN, _MEANINGS = _compile()


def find_events(sentence: str) -> list[Event]:
    """Events of a lower-case sentence, in order; phrases that only look like a finding are left out."""
    events = []
    for match in _PATTERN.finditer(sentence):
        kind, name, observations = _MEANINGS[(match.lastindex or 1) - 1]
        if kind != "noise":
            events.append(Event(kind, name, observations, match.start(), match.end()))
    return events
