"""Describes the problems of a recipe in plain words, each with its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from emrrg_cli.recipe.layers import KeyPath, Layer
from emrrg_cli.recipe.suggest import annotation_at, is_literal, is_section, members, nearest_keys

MAX_PROBLEMS = 50  # of one recipe; suggesting a name for each unknown key takes time

_LIMITS = {
    "greater_than": "must be more than {gt:.10g}, got {got}",
    "greater_than_equal": "must be {ge:.10g} or more, got {got}",
    "less_than": "must be less than {lt:.10g}, got {got}",
    "less_than_equal": "must be {le:.10g} or less, got {got}",
    "too_short": "must have at least {min_length} items, got {actual_length}",
    "too_long": "must have at most {max_length} items, got {actual_length}",
}


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe. `conflict`: a conflict between several valid settings."""

    where: str
    path: KeyPath
    message: str
    order: tuple[int, int]
    conflict: bool = False

    def __str__(self) -> str:
        indices = (f"[{key}]" if key.isdigit() else f".{key}" for key in self.path)
        place = "".join(indices).removeprefix(".")
        return ": ".join(part for part in (self.where, place, self.message) if part)


def find_problems(
    error: ValidationError, schema: type[BaseModel], values: dict[str, Any], layers: Sequence[Layer]
) -> list[Problem]:
    """Returns the problems of a validation, one per place, in the order of the recipe.

    Args:
        error: The error of pydantic.
        schema: The model that was validated against.
        values: The document that was validated.
        layers: The layers it was merged from, weakest first.
    """
    by_path: dict[KeyPath, Any] = {}
    for entry in error.errors(include_url=False)[:MAX_PROBLEMS]:
        path = _path_in(values, entry["loc"], missing=entry["type"] == "missing")
        # Each branch of a union reports an error: a broken limit is more useful than "not of this type".
        if path not in by_path or entry["type"] in _LIMITS:
            by_path[path] = entry
    innermost = [path for path in by_path if not any(other[: len(path)] == path for other in by_path if other != path)]
    problems = [_problem(path, by_path[path], schema, values, layers) for path in innermost]
    return sorted(problems, key=lambda problem: problem.order)


def place_of(path: KeyPath, layers: Sequence[Layer]) -> tuple[str, tuple[int, int]]:
    """Returns `(where, order)` of the strongest layer that sets `path`, whose value is used."""
    for index in range(len(layers) - 1, -1, -1):
        if layers[index].states(path):
            return layers[index].where(path), (index, layers[index].lines.get(path, 0))
    return "", (-1, 0)


def _path_in(values: dict[str, Any], loc: tuple[int | str, ...], *, missing: bool) -> KeyPath:
    """Returns the part of pydantic's location that is in the document, because unions add the names of branches."""
    path: list[str] = []
    current: Any = values
    for position, key in enumerate(loc):
        in_list = isinstance(current, list) and isinstance(key, int) and key < len(current)
        if in_list or (isinstance(current, dict) and key in current):
            current = current[key]
            path.append(str(key))
        elif missing and position == len(loc) - 1:
            path.append(str(key))
    return tuple(path)


def _problem(
    path: KeyPath, entry: Any, schema: type[BaseModel], values: dict[str, Any], layers: Sequence[Layer]
) -> Problem:
    kind = entry["type"]
    where, order = place_of(path, layers)
    if kind == "value_error":
        message = str(entry["ctx"]["error"])
        where, order = _place_of_conflict(path, message, layers)
        return Problem(where, path, message, order, conflict=True)
    if kind == "extra_forbidden":
        return Problem(where, path, _unknown_key(schema, path), order)
    if kind == "missing":
        return Problem(where, path, "must be given", order)
    if kind in _LIMITS:
        return Problem(where, path, _LIMITS[kind].format(got=show(entry["input"]), **entry["ctx"]), order)
    value: Any = values
    for key in path:
        value = value[int(key)] if isinstance(value, list) else value[key]
    annotation = annotation_at(schema, path)
    if value is None and is_section(annotation):  # most often each of its settings is commented out
        return Problem(where, path, "a section without settings; remove it", order)
    message = f"expected {describe(annotation)}, got {show(value)}{_nearest(annotation, value)}"
    return Problem(where, path, message, order)


def _unknown_key(schema: type[BaseModel], path: KeyPath) -> str:
    if "." in path[-1]:
        return "dotted keys are for the command line; in a file, nest the key in its section"
    nearest = nearest_keys(schema, path)
    return f"unknown key; did you mean {' or '.join(nearest)}?" if nearest else "unknown key"


def _place_of_conflict(section: KeyPath, message: str, layers: Sequence[Layer]) -> tuple[str, tuple[int, int]]:
    """Returns the last layer that sets a key named in the message, which usually caused the conflict."""
    words = set(re.findall(r"[A-Za-z_0-9]+", message))
    for index in range(len(layers) - 1, -1, -1):
        layer = layers[index]
        for path in _stated(layer.values):
            if path[: len(section)] == section and len(path) > len(section) and path[-1] in words:
                return layer.where(path), (index, layer.lines.get(path, 0))
    return place_of(section, layers)


def _stated(values: dict[str, Any], path: KeyPath = ()) -> list[KeyPath]:
    found: list[KeyPath] = []
    for key, value in values.items():
        found += _stated(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found


def show(value: Any) -> str:
    """Formats a value as in a recipe; containers by their type."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f'the text "{value if len(value) <= 200 else value[:200] + "..."}"'
        case dict():
            return "a mapping"
        case list():
            return "a list"
    return str(value) if isinstance(value, float) or abs(value) < 10**30 else f"{value:.6g}"


_PLAIN: dict[Any, tuple[str, str]] = {
    type(None): ("null", "nulls"),
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}


def describe(annotation: Any) -> str:
    """Describes a type in plain words."""
    options = []
    for member in members(annotation):
        if is_section(member):
            options.append("a section of settings")
        elif is_literal(member):
            choices = [str(choice) for choice in get_args(member)]
            options.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        elif get_origin(member) is list:
            options.append(f"a list of {_describe_many(get_args(member)[0])}")
        elif get_origin(member) is dict:
            options.append(f"a mapping of names to {_describe_many(get_args(member)[1])}")
        else:
            options.append(_PLAIN[member][0] if member in _PLAIN else "another kind of value")
    return ", or ".join(options)


def _describe_many(annotation: Any) -> str:
    if is_literal(annotation):
        return f"names from {', '.join(map(str, get_args(annotation)))}"
    if is_section(annotation):
        return "sections of settings"
    return _PLAIN[annotation][1] if annotation in _PLAIN else "values"


def _nearest(annotation: Any, value: Any) -> str:
    if not isinstance(value, str):
        return ""
    choices: dict[str, str] = {}
    for member in members(annotation):
        if is_literal(member):
            choices |= {str(choice).lower(): str(choice) for choice in get_args(member)}
        elif get_origin(member) is list and is_literal(get_args(member)[0]):
            choices |= {str(choice).lower(): f"[{choice}]" for choice in get_args(get_args(member)[0])}
    close = get_close_matches(value.lower(), choices, n=1, cutoff=0.6)
    return f"; did you mean {choices[close[0]]}?" if close else ""
