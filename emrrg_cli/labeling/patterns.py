"""Analyses regular expressions: their alternatives, and the characters that a match can begin with.

Supports the syntax of the patterns of this package: letters, digits, `\\w`, `\\d`, `[...]`, `(?:...)`, look-around and
quantifiers, but no capturing groups.
"""

from __future__ import annotations

import string

_WORD = frozenset(string.ascii_lowercase + string.digits + "_")
_CLASSES = {"w": _WORD, "d": frozenset(string.digits)}


def alternatives(pattern: str) -> list[str]:
    """Splits a pattern at each `|` outside brackets."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(pattern):
        depth += (character in "([") - (character in ")]")
        if character == "|" and not depth:
            parts.append(pattern[start:place])
            start = place + 1
    return [*parts, pattern[start:]]


def first_characters(pattern: str) -> frozenset[str]:
    """Returns the word characters that a match of the pattern can begin with.

    Raises:
        ValueError: The pattern can match the empty string.
    """
    found, empty = _first(pattern)
    if empty:
        raise ValueError(f"{pattern!r} can match the empty string")
    return found & _WORD


def _first(pattern: str) -> tuple[frozenset[str], bool]:
    """Returns the first characters, and whether the pattern can match the empty string."""
    found: frozenset[str] = frozenset()
    any_empty = False
    for alternative in alternatives(pattern):
        place, empty = 0, True
        while empty and place < len(alternative):
            characters, empty, place = _atom(alternative, place)
            found |= characters
        any_empty |= empty
    return found, any_empty


def _atom(pattern: str, place: int) -> tuple[frozenset[str], bool, int]:
    """Returns the first characters of the atom at `place`, whether it can be empty, and the next atom's position."""
    character = pattern[place]
    if character == "(":
        end = _closing(pattern, place)
        if pattern.startswith("(?:", place):
            characters, empty = _first(pattern[place + 3 : end])
        else:  # look-around has no width
            characters, empty = frozenset(), True
    elif character == "[":
        end = pattern.index("]", place)
        characters, empty = frozenset(pattern[place + 1 : end]), False
    elif character == "\\":
        end = place + 1
        characters, empty = _CLASSES.get(pattern[end], frozenset(pattern[end])), False
    else:
        end = place
        characters, empty = frozenset(character), False
    following = pattern[end + 1 : end + 2]
    if following == "{":
        empty |= pattern[end + 2] == "0"
        return characters, empty, pattern.index("}", end) + 1
    quantified = following in ("?", "*", "+")
    return characters, empty or following in ("?", "*"), end + 1 + quantified


def _closing(pattern: str, place: int) -> int:
    depth = 0
    for end in range(place, len(pattern)):
        depth += (pattern[end] == "(") - (pattern[end] == ")")
        if not depth:
            return end
    raise ValueError(f"unbalanced brackets in {pattern!r}")
