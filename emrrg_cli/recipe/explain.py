"""Writes the settings of a recipe as YAML, each with its meaning as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from emrrg_cli.recipe.suggest import is_literal, is_section, members
from emrrg_cli.recipe.yaml12 import dump

_WIDTH = 120


def explained(values: Mapping[str, Any], schema: type[BaseModel], indent: str = "") -> str:
    """Returns the YAML text of settings. A comment that is too long for the line of its key is above it.

    Args:
        values: The settings, in their order. `parse_layer` reads them back.
        schema: The recipe class, whose fields have descriptions.
        indent: Space before each line.
    """
    text = ""
    for key, value in values.items():
        field = schema.model_fields[key]
        kinds = members(field.annotation)
        section = next(filter(is_section, kinds), None)
        note = _note(field.description, kinds)
        if section is not None and isinstance(value, dict):
            first, rest = f"{key}:\n", explained(value, section, indent + "  ")
        else:
            first, *others = textwrap.indent(dump({key: value}), indent).splitlines(keepends=True)
            first, rest = first.removeprefix(indent), "".join(others)
        line = f"{indent}{first.rstrip()}  # {note}" if note else indent + first.rstrip()
        inside = rest and not isinstance(value, dict)  # a comment would be inside a value of several lines
        if note and (inside or len(line) > _WIDTH):
            mark = f"{indent}# "
            line = textwrap.fill(note, _WIDTH, initial_indent=mark, subsequent_indent=mark)
            line += f"\n{indent}{first.rstrip()}"
        text += f"{line}\n{rest}"
    return text


def _note(description: str | None, kinds: tuple[Any, ...]) -> str:
    """Joins the description of a setting and the names among which it chooses."""
    inner = [get_args(kind)[0] if get_origin(kind) is list else kind for kind in kinds]
    names = [str(name) for kind in inner if is_literal(kind) for name in get_args(kind)]
    choices = f"({' | '.join(names)})" if len(names) > 1 else ""
    return " ".join(filter(None, (description, choices)))
