"""Splits a report into sentences, and a sentence into events: mentions of findings, organs, their states, cues."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from emrrg_cli.labeling import cues, vocabulary
from emrrg_cli.labeling.patterns import alternatives, first_characters


class Event(NamedTuple):
    """A relevant phrase of a sentence: its kind, its name and its position."""

    kind: str  # "mention", "absence", "organ", "state", "cue", "comma"
    name: str  # the organ, state or cue; the text of a mention
    observations: tuple[str, ...]  # of a mention or absence
    start: int
    end: int


_SPLIT = re.compile(r"\.(?!\d)|(?<!\d)\.|[;?!\n]|<br>")
# Cleaning deletes the slash of "scarring/atelectasis".
_JOINED = re.compile(
    r"(?<=[a-z]{3})(?=(?:atelecta|airspace|infiltrat|consolidat|effusion|scarring|thicken|defibrill|pneumonia))"
)
# "Isn't", also as cleaning leaves it. "Effusion: no" at the end of a sentence.
_CONTRACTED = re.compile(r"\b(is|are|was|were|do|does|did|has|have|had)n'?t\b")
_ANSWERED = re.compile(r" ?: ?no$")
_SPACE = re.compile(r"[^\S\n]+")


def split_sentences(text: str) -> list[str]:
    """Splits a raw or cleaned report (" . " between sentences) into lower-case sentences, but not at decimal points."""
    text = _SPACE.sub(" ", text.lower().replace("vs.", "vs").replace("’", "'"))
    text = _CONTRACTED.sub(r"\1 not", _JOINED.sub(" / ", text))
    sentences = (_ANSWERED.sub(" not seen", part.strip(" .,")) for part in _SPLIT.split(text))
    return [sentence for sentence in sentences if sentence]


Meaning = tuple[str, str, tuple[str, ...]]


@lru_cache(maxsize=1)
def _compile() -> dict[str, tuple[re.Pattern[str], list[Meaning]]]:
    """Compiles, for each first character of an event, a pattern in order of priority and the meanings of its parts.

    A single pattern would try hundreds of alternatives at each word and take four times as long. Compiled at the first
    report, so that the import is fast.
    """
    kinds: list[tuple[Meaning, tuple[str, ...]]] = [(("noise", "", ()), vocabulary.NOISE)]
    kinds += [(("absence", "", observations), patterns) for observations, patterns in vocabulary.ABSENCES]
    kinds += [(("mention", "", observations), patterns) for observations, patterns in vocabulary.MENTIONS]
    kinds += [(("organ", organ, ()), patterns) for organ, patterns in vocabulary.ORGANS.items()]
    kinds += [(("state", state, ()), (pattern,)) for state, pattern in cues.STATES]
    kinds += [(("cue", cue, ()), (pattern,)) for cue, pattern in cues.CUES]
    by_letter: dict[str, list[tuple[str, Meaning]]] = {}
    for meaning, patterns in kinds:
        for alternative in (part for pattern in patterns for part in alternatives(pattern)):
            for letter in first_characters(alternative):
                by_letter.setdefault(letter, []).append((alternative, meaning))
    # The empty group at the end of each alternative shows which one matched.
    return {
        letter: (re.compile("|".join(rf"{pattern}\b()" for pattern, _ in found)), [meaning for _, meaning in found])
        for letter, found in by_letter.items()
    }


_START = re.compile(r"\b\w|,")
_NOTHING: tuple[re.Pattern[str], list[Meaning]] = (re.compile(r"(?!)"), [])
_DEVICES = ("Support Devices",)


def find_events(sentence: str) -> list[Event]:
    """Finds the events of a lower-case sentence, in order, without phrases that only look like a finding."""
    compiled = _compile()
    events: list[Event] = []
    end = 0
    for word in _START.finditer(sentence):
        start = word.start()
        if start < end:
            continue
        if sentence[start] == ",":
            events.append(Event("comma", "", (), start, start + 1))
            continue
        pattern, meanings = compiled.get(sentence[start], _NOTHING)
        if match := pattern.match(sentence, start):
            end = match.end()
            _append(events, Event(*meanings[(match.lastindex or 1) - 1], start, end))
    return events


def _append(events: list[Event], event: Event) -> None:
    """Adds an event, unless it is noise or the previous event changes its meaning."""
    before = events[-1] if events and event.start - events[-1].end <= 1 else None
    if event.kind == "noise" or (before and "Fracture" in event.observations and before.observations == _DEVICES):
        return  # a broken catheter or wire is not a fracture
    if before and before.kind == "organ" and event.kind == "mention":
        events.pop()  # "lung consolidation" does not describe the state of the lung
    events.append(event)
