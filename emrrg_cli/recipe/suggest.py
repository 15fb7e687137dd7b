"""Suggests valid keys for an unknown key of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from emrrg_cli.recipe.layers import KeyPath
from emrrg_cli.recipe.synonyms import SYNONYMS


def annotation_at(schema: type[BaseModel], path: KeyPath) -> Any:
    """Returns the type of the value at `path` in the schema; None if there is no such key."""
    current: Any = schema
    for key in path:
        inner = [found for member in members(current) if (found := _child(member, key)) is not None]
        if not inner:
            return None
        current = inner[0]
    return current


def members(annotation: Any) -> tuple[Any, ...]:
    """Returns the alternatives of a union, or the type itself."""
    plain = isinstance(annotation, type) or get_origin(annotation) in (list, dict) or not get_args(annotation)
    return (annotation,) if plain or is_literal(annotation) else get_args(annotation)


def is_literal(annotation: Any) -> bool:
    """Whether a type is `Literal[...]`."""
    return str(annotation).startswith("typing.Literal")


def is_section(annotation: Any) -> bool:
    """Whether a type is a section of settings."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def nearest_keys(schema: type[BaseModel], path: KeyPath) -> list[str]:
    """Returns dotted keys that resemble an unknown key at `path`, best first; empty if there is none.

    Looks for names of other toolkits and for the same name in other sections before it compares spelling, because a key
    that exists elsewhere is misplaced, not misspelt.
    """
    *section, key = path
    places = list(_places(schema))
    around = annotation_at(schema, tuple(section))  # also an item of a list of sections
    siblings = {name: (*section, name) for name in around.model_fields} if is_section(around) else {}
    by_synonym = {name: siblings[ours] for name, ours in SYNONYMS.items() if ours in siblings}
    name = key.lower().replace("-", "_")

    if name in siblings or name in by_synonym:
        return [_dotted(siblings.get(name) or by_synonym[name])]
    elsewhere = [place for place in places if place[-1] in (name, SYNONYMS.get(name))]
    if elsewhere:
        return [_dotted(place) for place in elsewhere[:3]]
    if close := get_close_matches(name, [*siblings, *by_synonym], n=1, cutoff=0.6):
        return [_dotted(siblings.get(close[0]) or by_synonym[close[0]])]
    if close := get_close_matches(name, [*SYNONYMS, *(place[-1] for place in places)], n=1, cutoff=0.8):
        meant = SYNONYMS.get(close[0], close[0])
        return [_dotted(place) for place in places if place[-1] == meant][:3]
    return []


def _child(annotation: Any, key: str) -> Any:
    if is_section(annotation):
        field = annotation.model_fields.get(key)
        return None if field is None else field.annotation
    if get_origin(annotation) in (list, dict):
        return get_args(annotation)[-1]
    return None


def _places(schema: type[BaseModel], path: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in schema.model_fields.items():
        yield (*path, name)
        if is_section(field.annotation):
            yield from _places(field.annotation, (*path, name))  # type: ignore[arg-type]


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in path).removeprefix(".")
