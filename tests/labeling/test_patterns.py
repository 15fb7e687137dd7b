"""Which characters a pattern can begin with, against `re` itself; and that the labeler's patterns compile."""

from __future__ import annotations

import re

import pytest

from emrrg_cli.labeling.events import find_events
from emrrg_cli.labeling.patterns import alternatives, first_characters
from tests.benchmarks.mesh import observations_from_mesh


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("abc", "a"),
        ("a?bc", "ab"),
        ("(?:ab|cd)* ?ef", "ace"),
        ("[xy]z|q", "xyq"),
        ("(?<!a )b", "b"),
        (r"(?:x{0,2}|y)\d", "xy0123456789"),
        ("(?:a(?:b|c)?)?d", "ad"),
        ("a+b", "a"),
    ],
)
def test_first_characters(pattern: str, expected: str) -> None:
    assert first_characters(pattern) == set(expected)


def test_pattern_that_can_be_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        first_characters("(?:a|b)?")


def test_alternatives_split_outside_brackets_only() -> None:
    assert alternatives("a(?:b|c)|[|]d|e") == ["a(?:b|c)", "[|]d", "e"]


def test_events_of_a_sentence() -> None:
    events = find_events("heart size is normal, no pleural effusion")
    assert [event.name or event.kind for event in events] == ["heart", "verb", "normal", "comma", "absent", "mention"]
    assert events[-1].observations == ("Pleural Effusion",)


def test_words_inside_words_are_not_events() -> None:
    assert not re.search("mention", " ".join(event.kind for event in find_events("defusion amasses unedematouslike")))


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("normal", set()),
        ("Cardiomegaly/borderline;Pulmonary Atelectasis/base/left", {"Cardiomegaly", "Atelectasis"}),
        ("Cardiac Shadow/irregular;Costophrenic Angle/obscured", set()),
        ("Cardiac Shadow/enlarged;Costophrenic Angle/right/blunted", {"Cardiomegaly", "Pleural Effusion"}),
        ("Hydropneumothorax/right", {"Pneumothorax", "Pleural Effusion"}),
        ("Pulmonary Congestion/mild;Fractures, Bone/ribs/healed", {"Edema", "Fracture"}),
    ],
)
def test_observations_from_mesh(terms: str, expected: set[str]) -> None:
    assert observations_from_mesh(terms) == expected
