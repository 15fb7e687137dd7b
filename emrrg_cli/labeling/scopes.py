"""Labels each mention in a sentence by the scopes of negation, doubt, history and requests, and by organ states."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from emrrg_cli.labeling.events import Event, find_events
from emrrg_cli.labeling.policy import Label
from emrrg_cli.labeling.vocabulary import STATES

# A scope that opens before a mention -> the label of the mention; None means that it does not count.
_SCOPE_LABELS: dict[str, Label | None] = {
    "": "positive",
    "absent": "negative",
    "doubt": "uncertain",
    "ignore": None,
    "history": None,
    "removed": "positive",
}
_PAST = re.compile(
    r"(?<!from )(?<!to )(?<!than )\b(?:prior|previous|past|treated)"
    r"(?: (?!seen|noted|described|exam|study|chest|the|possibl|with)\w+){0,3} $"
)
_OLD = re.compile(r"\b(?:old|remote|healed)(?: \w+){0,2} $")
_CONTINUES = re.compile(r" ?(?:to|or|nor|of|,? ?or)\b")
_PREPOSITION = re.compile(r"\b(?:of|in|within|at|on|over|from|to)(?: the)? $")


@dataclass
class Mention:
    """An observation named in a sentence."""

    observations: tuple[str, ...]
    label: Label | None
    only_absence: bool = False


@dataclass
class SentenceReader:
    """Reads the events of one sentence from left to right and collects its `mentions`."""

    text: str
    events: list[Event] = field(init=False)
    mentions: list[Mention] = field(default_factory=list)
    _scope: str = ""
    _used: bool = False  # the scope already contains a mention
    _joined: bool = False  # the previous event was "or" or "and"
    _either: bool = False  # the previous event was "or", outside a negation
    _verb: bool = False  # a verb followed the group or the organs
    _prefix: str = ""  # a state before its organ, as in "normal heart size"
    _group: list[Mention] = field(default_factory=list)  # mentions that a later "is not seen" applies to
    _organs: list[str] = field(default_factory=list)  # organs whose state may follow
    _stated: bool = False  # these organs already have a state

    def __post_init__(self) -> None:
        self.events = find_events(self.text)

    def read(self) -> list[Mention]:
        """Returns the mentions of the sentence with their labels, without those that do not count."""
        for index, event in enumerate(self.events):
            match event.kind:
                case "mention" | "absence":
                    self._on_mention(event)
                case "organ":
                    self._on_organ(event)
                case "state":
                    self._on_state(event.name)
                case "comma":
                    self._on_comma(index)
                case _:
                    self._on_cue(event, index)
        return [m for m in self.mentions if m.label and not (m.only_absence and m.label != "negative")]

    # Mentions and organs

    def _on_mention(self, event: Event) -> None:
        if self._verb:
            self._group = []
        mention = Mention(event.observations, self._label(event), event.kind == "absence")
        before = self._group[-1] if self._group else None
        differ = before is not None and before.observations != mention.observations
        if self._either and before and differ and before.label == mention.label == "positive":
            before.label = mention.label = "uncertain"
        self.mentions.append(mention)
        self._group.append(mention)
        self._used, self._joined, self._either, self._verb, self._prefix = True, False, False, False, ""

    def _label(self, event: Event) -> Label | None:
        device, fracture = "Support Devices" in event.observations, "Fracture" in event.observations
        if self._scope == "removed" and device:
            return "negative"
        if self._scope == "history" and (device or fracture):
            return "positive"
        before = self._before(event)
        old = "Pneumonia" in event.observations and _OLD.search(before)
        if self._scope != "absent" and not device and not fracture and (old or _PAST.search(before)):
            return None
        return _SCOPE_LABELS[self._scope]

    def _on_organ(self, event: Event) -> None:
        if self._used and not self._joined and not _PREPOSITION.search(self._before(event)):
            self._end_scope()
        if self._prefix:
            self._state_organ(event.name, self._prefix)
            return
        if self._verb or self._stated:
            self._organs, self._stated = [], False
        self._organs.append(event.name)
        self._verb = False

    def _on_state(self, state: str) -> None:
        if state != "large" and self._scope in ("absent", "doubt") and self._used and not self._joined:
            self._end_scope()
        fitting = [organ for organ in self._organs if state in STATES[organ]]
        if fitting and not self._stated:
            for organ in fitting:
                self._state_organ(organ, state)
            self._stated = True
        elif state == "other":
            self._organs, self._prefix = [], ""
        else:
            self._prefix = state
        if state == "borderline" and not self._scope:
            self._open("doubt")

    def _state_organ(self, organ: str, state: str) -> None:
        for observation, given in STATES[organ].get(state, {}).items():
            label = _SCOPE_LABELS[self._scope]
            if given == "negative":
                label = None if label in (None, "negative") else "negative"
            elif given == "uncertain" and label == "positive":
                label = "uncertain"
            mention = Mention((observation,), label)
            self.mentions.append(mention)
            if label != "negative":
                self._group.append(mention)
        self._used = True

    def _before(self, event: Event) -> str:
        """Returns the words before an event, but not all, because some texts repeat one word thousands of times."""
        return self.text[max(0, event.start - 60) : event.start]

    # Cues

    def _on_cue(self, event: Event, index: int) -> None:
        name = event.name
        match name:
            case "absent" | "doubt" | "ignore" | "history":
                self._on_scope(name)
            case "affirm" | "stop":
                self._end_scope()
                self._end_clause()
            case "doubt_around":
                self._on_doubt_around(event)
            case "absent_before":
                self._relabel_group("negative")
                self._verb = True
            case "resolved" | "removed":
                self._on_gone(event)
            case "or" | "and" | "versus":
                self._on_join(name)
            case "strong" | "weak":
                self._on_adjective(name, index)
            case "present":
                if self._used and not _CONTINUES.match(self.text, event.end):
                    self._end_scope()
                self._verb = True
            case _:
                self._verb = True

    def _on_scope(self, name: str) -> None:
        # "No opacity to suggest pneumonia", "no possible source": a doubt inside a negation has no effect.
        if name == "doubt" and self._scope in ("absent", "ignore", "history"):
            self._used = False
            return
        # "No history of fracture" says nothing about this film.
        self._open("ignore" if name == "history" and self._scope == "absent" and not self._used else name)

    def _open(self, name: str) -> None:
        self._scope, self._used = name, False

    def _end_scope(self) -> None:
        self._scope, self._used, self._joined = "", False, False

    def _end_clause(self) -> None:
        self._group, self._organs, self._prefix = [], [], ""
        self._either, self._verb, self._stated = False, False, False

    def _on_doubt_around(self, event: Event) -> None:
        active = (
            self.text[: event.end].endswith((" exclude", " rule out"))
            and " be " not in self.text[event.start : event.end]
        )
        if self._group and not active:
            self._relabel_group("uncertain")
        else:
            self._open("doubt")

    def _relabel_group(self, label: Label) -> None:
        for mention in self._group:
            if mention.label is not None:
                mention.label = label

    def _on_gone(self, event: Event) -> None:
        forward = not self._group or self.text[: event.end].endswith(" of")
        if event.name == "resolved":
            if forward:
                self._open("absent")
            else:
                self._relabel_group("negative")
        elif forward:
            self._open("removed")
        else:
            for mention in self._group:
                if "Support Devices" in mention.observations:
                    mention.label = "negative"

    def _on_join(self, name: str) -> None:
        self._joined = True
        if name == "or":
            self._either = True
        elif name == "versus" and self._scope in ("", "doubt"):
            if self._group and self._group[-1].label == "positive":
                self._group[-1].label = "uncertain"
            self._open("doubt")

    def _on_adjective(self, name: str, index: int) -> None:
        if not self._used or self._scope not in ("absent", "doubt"):
            return
        if _PREPOSITION.search(self._before(self.events[index])):  # "no effusion in the left chest or ..."
            return
        listed = self._joined and (self._scope == "doubt" or self.events[index - 1].name == "or")
        if listed or (name == "weak" and (self._joined or self._list_goes_on(index, ("or",)))):
            return
        self._end_scope()

    def _on_comma(self, index: int) -> None:
        if not self._list_goes_on(index, ("or", "and", "absent")):
            self._group = []
        self._prefix = ""
        # "No effusion, pneumothorax": a list, unless the next event is not a finding.
        following = self.events[index + 1] if index + 1 < len(self.events) else None
        ended = self._used and (not following or following.kind == "organ")
        if ended or (self._scope in ("ignore", "history") and not self._list_goes_on(index, ("or",))):
            self._end_scope()

    def _list_goes_on(self, index: int, joins: tuple[str, ...]) -> bool:
        """Whether one of `joins` follows in the same clause."""
        for event in self.events[index + 1 : index + 40]:
            if event.name in joins:
                return True
            if event.name in ("stop", "verb", "present", "absent_before"):
                return False
        return False
