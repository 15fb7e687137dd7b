"""Layers: where each setting of a recipe was said, and how layers become one document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str, ...]

COMMAND_LINE = "command line"

# Settings whose value is a mapping. A section is merged key by key; of weights, a layer means those it names.
MAPPINGS = frozenset({"score_weights"})


@dataclass(frozen=True)
class Layer:
    """The settings that one source states.

    Args:
        name: The source as people know it: a file, `command line`, or `protocol published`.
        values: The settings, nested as in the file.
        lines: The line of each key (and list item, by its index) in the file; empty where there are no lines.
    """

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """`file.yaml:12`, or the bare name where the line is not known."""
        line = self.lines.get(path)
        return self.name if line is None else f"{self.name}:{line}"

    def states(self, path: KeyPath) -> bool:
        """Whether this layer itself says something at `path`."""
        value: Any = self.values
        for key in path:
            if isinstance(value, list) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                return False
        return True


def merge(layers: Iterable[Layer]) -> dict[str, Any]:
    """One document from layers, weakest first: sections are merged key by key, values are replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _lay_over(merged, layer.values)
    return merged


def _lay_over(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict) and key not in MAPPINGS:
            _lay_over(below[key], value)
        else:
            below[key] = deepcopy(value)


def with_presets(
    layers: Sequence[Layer], presets: dict[str, dict[str, Any]], *, default: str | None, without: frozenset[str]
) -> list[Layer]:
    """Puts the preset of each stated `protocol` just below the layer that states it.

    So a preset beats the layers below that one, and loses to the keys written beside `protocol`.

    Args:
        layers: Weakest first.
        presets: Settings by protocol. A name that is not here is left for the schema to refuse.
        default: Protocol whose preset goes to the bottom where no layer states one; None: no preset then.
        without: Top-level keys that presets leave alone.
    """

    def preset(name: str) -> Layer:
        kept = {key: value for key, value in presets[name].items() if key not in without}
        return Layer(f"protocol {name}", {"protocol": name, **kept})

    placed: list[Layer] = []
    for layer in layers:
        name = layer.values.get("protocol")
        if isinstance(name, str) and name in presets:
            placed.append(preset(name))
        placed.append(layer)
    if default is not None and not any("protocol" in layer.values for layer in layers):
        placed.insert(0, preset(default))
    return placed
