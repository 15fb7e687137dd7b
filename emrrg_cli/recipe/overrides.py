"""`key=value` on the command line: `train.lr=5e-5 model.adapter.targets=[X,Z] model.encoder.weights=null`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.layers import COMMAND_LINE, Layer, lay_over
from emrrg_cli.recipe.limits import MAX_DEPTH
from emrrg_cli.recipe.yaml12 import parse_value

_FORM = "Write key=value; the value is YAML: a number, text, [a, list] or null. Flags such as --resume take no value."


def parse_overrides(overrides: Sequence[str]) -> Layer:
    """Parses overrides to the layer of the command line. Later overrides win.

    Raises:
        UsageError: As `require_texts`, or an override has no `=`, an empty key or value, bad YAML, a key below a value
            that is not a section, or the key `stage`, which cannot change.
    """
    values: dict[str, Any] = {}
    for override in require_texts(overrides):
        key, equals, text = override.partition("=")
        keys = key.split(".")
        if not equals:
            raise UsageError(f"{COMMAND_LINE}: {override}: not of the form key=value", hint=_FORM)
        if len(keys) > MAX_DEPTH:
            raise UsageError(f"{COMMAND_LINE}: {override[:80]}: the key has more than {MAX_DEPTH} parts", hint=_FORM)
        if not all(part.strip() for part in keys):
            raise UsageError(f"{COMMAND_LINE}: {override}: the key has an empty part", hint=_FORM)
        if not text.strip():  # most often a shell variable that is not set
            raise UsageError(f"{COMMAND_LINE}: {key}: no value after =", hint=f"To unset it, write {key}=null.")
        if keys == ["stage"]:
            raise UsageError(f"{COMMAND_LINE}: stage: cannot be overridden", hint="Name a recipe of that stage.")
        _put(values, keys, _value(key, text))
    return Layer(COMMAND_LINE, values)


def require_texts(overrides: Sequence[str]) -> tuple[str, ...]:
    """Returns overrides that were given in Python.

    Raises:
        UsageError: They are not a list of texts.
    """
    if not isinstance(overrides, list | tuple) or not all(isinstance(one, str) for one in overrides):
        raise UsageError(f"overrides must be a list of texts, not {overrides!r}", hint='Give ["train.lr=5e-5"].')
    return tuple(overrides)


def _value(key: str, text: str) -> Any:
    try:
        value = parse_value(text, COMMAND_LINE)
    except UsageError as error:
        # The line number within one argument is not useful.
        reason = error.message.removeprefix(f"{COMMAND_LINE}:1: ").removeprefix(f"{COMMAND_LINE}: ")
        raise UsageError(
            f"{COMMAND_LINE}: {key}: {reason}", hint=f"Quote text with special characters: {key}='\"...\"'."
        ) from error
    # In YAML, a # after a space begins a comment; a path may contain it.
    return text.strip() if isinstance(value, str) and text.strip().startswith(value) else value


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    section = values
    for depth, key in enumerate(keys[:-1], start=1):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            above = ".".join(keys[:depth])
            raise UsageError(f"{COMMAND_LINE}: {'.'.join(keys)}: {above} already has a value, so it is not a section")
    if isinstance(value, dict) and isinstance(section.get(keys[-1]), dict):
        lay_over(section, {keys[-1]: value})
    else:
        section[keys[-1]] = value
