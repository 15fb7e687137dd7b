"""Reads and writes the YAML of recipes: the scalars of YAML 1.2, with the line of every key.

PyYAML reads YAML 1.1, where `1e-4` is text and `no` is false. Here `1e-4` is a number and only `true` and `false` are
booleans. Two rules are stricter than YAML: a key may occur only once, and numbers are finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any
from unicodedata import category

import yaml

from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.layers import KeyPath, Layer
from emrrg_cli.recipe.limits import MAX_DEPTH, MAX_DIGITS, MAX_VALUES

_TAG = "tag:yaml.org,2002:"
_SCALARS: list[tuple[str, str, str]] = [
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
]


class _Loader(yaml.SafeLoader):
    """Refuses a document that is too deep or too long while it reads it, before that takes time and memory."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own protocol)

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._file, self._nodes, self._depth = name, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        if self._nodes > MAX_VALUES:
            raise UsageError(f"{self._file}: more than {MAX_VALUES:,} values")
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if self._depth == MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise UsageError(f"{self._file}:{line}: more than {MAX_DEPTH} sections or lists inside each other")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type, so that a dump reads back the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence(_TAG + "seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)

for _kind, _pattern, _first in _SCALARS:
    _match = re.compile(rf"^(?:{_pattern})$")
    _firsts = [*_first, ""] if _kind == "null" else list(_first)
    _Loader.add_implicit_resolver(_TAG + _kind, _match, _firsts)
    _Dumper.add_implicit_resolver(_TAG + _kind, _match, _firsts)


def parse_layer(text: str, name: str) -> Layer:
    """Reads one YAML document that must be a mapping.

    Args:
        text: The document.
        name: Name of the file for error messages.

    Raises:
        UsageError: The syntax is wrong, a key occurs twice, or the top level is not a mapping; the message names file
            and line.
    """
    node = _compose(text, name)
    reader = _Reader(name)
    if node is None:
        return Layer(name, {})
    values = reader.read(node, ())
    if not isinstance(values, dict):
        raise UsageError(
            f"{name}:{_line(node)}: a recipe is a mapping of keys to values, this is {_kind_of(values)}",
            hint="A recipe looks like `stage: finetune` on one line and sections such as `train:` below it.",
        )
    if reader.problems:
        raise UsageError("\n".join(reader.problems))
    return Layer(name, values, reader.lines)


def parse_value(text: str, name: str) -> Any:
    """Reads one YAML value, such as the right side of `key=value`.

    Raises:
        UsageError: The syntax is wrong; the message starts with `name`.
    """
    node = _compose(text, name)
    if node is None:
        return None
    reader = _Reader(name)
    value = reader.read(node, ())
    if reader.problems:
        raise UsageError("\n".join(reader.problems))
    return value


def dump(values: dict[str, Any]) -> str:
    """Returns the YAML text of a document, keys in their order. `parse_layer` reads the same values back."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return _Loader(text, name).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"{where}: not valid YAML: {reason}") from error
    except yaml.reader.ReaderError as error:  # its own message contains the character
        character = error.character if isinstance(error.character, int) else ord(error.character)
        raise UsageError(f"{name}: not valid YAML: character #x{character:04x} is not allowed") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {printable(str(error))}") from error
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{name}: not valid YAML: {type(error).__name__}") from error


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"


class _Reader:
    """Turns nodes into values and records the line of each key and list item."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self._open: set[int] = set()
        self._count = 0

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:  # aliases of aliases
            raise UsageError(f"{self.name}: more than {MAX_VALUES:,} values, counting every use of an alias")
        if len(self._open) > MAX_DEPTH:
            raise UsageError(f"{self.name}:{_line(node)}: more than {MAX_DEPTH} sections or lists inside each other")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:  # an alias to a container of itself
            raise UsageError(f"{self.name}:{_line(node)}: this value contains itself")
        self._open.add(id(node))
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._open.remove(id(node))
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Hashable, Any]:
        values: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(f"{self.name}:{_line(key_node)}: a key must be a single word")
            key = str(key_node.value)  # keys are text as written, also those that look like numbers
            if len(key) > 200 or not key.isprintable():
                raise UsageError(f"{self.name}:{_line(key_node)}: no key has this name: {printable(key[:200])}")
            if key in values:
                first = self.lines[(*path, key)]
                full = ".".join((*path, key))
                self.problems.append(f"{self.name}:{_line(key_node)}: {full}: given twice, first on line {first}")
                continue
            self.lines[(*path, key)] = _line(key_node)
            values[key] = self.read(value_node, (*path, key))
        return values

    def _sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.lines[(*path, str(index))] = _line(item)
            values.append(self.read(item, (*path, str(index))))
        return values

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = str(node.value)
        kind = node.tag.removeprefix(_TAG)
        where = f"{self.name}:{_line(node)}"
        if any(category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text):
            raise UsageError(f"{where}: {printable(text[:80])!r} contains a control character")
        if kind in ("int", "float") and len(text) > MAX_DIGITS:
            raise UsageError(f"{where}: a number of {len(text):,} digits: {text[:MAX_DIGITS]}...")
        try:
            match kind:
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
                case "float" if math.isfinite(number := float(text)):
                    return number
        except (KeyError, ValueError):
            pass
        tag = printable(node.tag.replace(_TAG, "!!"))
        raise UsageError(f"{where}: cannot read {text[:80]!r} as {tag}")
