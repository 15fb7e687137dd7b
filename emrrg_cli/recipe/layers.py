"""Layers: the source of each setting of a recipe, and how layers are merged into one document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str, ...]

COMMAND_LINE = "command line"

# Settings whose value is a mapping. Sections are merged key by key, but a layer replaces these mappings as a whole.
MAPPINGS = frozenset({"score_weights", "rewards", "consensus_scores"})


@dataclass(frozen=True)
class Layer:
    """The settings of one source.

    Args:
        name: Name of the source: a file, `command line`, or `protocol published`.
        values: The settings, nested as in the file.
        lines: Line of each key (and list item, by its index) in the file; empty if there is no file.
    """

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Returns `file.yaml:12`, or only the name if the line is unknown."""
        line = self.lines.get(path)
        return self.name if line is None else f"{self.name}:{line}"

    def states(self, path: KeyPath) -> bool:
        """Whether this layer sets a value at `path`."""
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
    """Merges layers, weakest first, into one document: sections are merged key by key, values are replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        lay_over(merged, layer.values)
    return merged


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Overwrites settings of `below` with those of `above`."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict) and key not in MAPPINGS:
            lay_over(below[key], value)
        else:
            below[key] = deepcopy(value)


def with_presets(
    layers: Sequence[Layer], presets: dict[str, dict[str, Any]], *, default: str | None, without: frozenset[str]
) -> list[Layer]:
    """Inserts the preset of each `protocol` just below the layer that sets it.

    A preset therefore overrides weaker layers, but not keys in the same layer as `protocol`.

    Args:
        layers: Layers, weakest first.
        presets: Settings by protocol. The schema refuses unknown names later.
        default: Protocol whose preset is the weakest layer if no layer sets a protocol; None: no preset.
        without: Top-level keys that presets do not change.
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
