"""Checks the inputs of `score`: lists, arrays, columns or generators of texts, or dictionaries `{id: ["text"]}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emrrg_cli.console import counted
from emrrg_cli.errors import UsageError

_SHOWN = 3


def paired_texts(references: Any, hypotheses: Any) -> tuple[list[list[str]], list[str]]:
    """Returns the references of each item as a list of texts, and the hypotheses as texts in the same order.

    Raises:
        UsageError: The items differ, there are none, or an item is not a text. The message names the item.
    """
    for what, given in (("references", references), ("hypotheses", hypotheses)):
        if isinstance(given, str | bytes):
            raise UsageError("references and hypotheses must be lists of texts, not one text")
        if hasattr(given, "columns"):
            raise UsageError(f"{what} are a table", hint='Give one of its columns, such as table["report"].')
        if isinstance(given, set | frozenset):
            raise UsageError(f"{what} are a set, which has no order", hint="Give a list.")
    if isinstance(references, Mapping) != isinstance(hypotheses, Mapping):
        raise UsageError(
            "one of references and hypotheses is a dictionary, the other is not", hint="Give both in the same form."
        )
    if isinstance(references, Mapping):
        check_ids(references, hypotheses)
        ids: Sequence[Any] = list(references)
        truth, written = [references[i] for i in ids], [_single(hypotheses[i], i) for i in ids]
    else:
        truth, written = _listed(references, "references"), _listed(hypotheses, "hypotheses")
        ids = range(len(truth))
    if len(truth) != len(written):
        here, there = counted(len(truth), "reference"), counted(len(written), "hypothesis")
        raise UsageError(f"there are {here} and {there}; their numbers must be equal")
    if not written:
        raise UsageError("there is nothing to score: no references and no hypotheses")
    for name, text in zip(ids, written, strict=True):
        if not isinstance(text, str):
            raise UsageError(f"hypothesis {name} is not a text but {_kind(text)}")
    return [_reference(texts, name) for name, texts in zip(ids, truth, strict=True)], written


def check_ids(references: Mapping[Any, Any], hypotheses: Mapping[Any, Any]) -> None:
    """Checks that references and hypotheses have the same ids.

    Raises:
        UsageError: The ids differ; the message counts and names the missing ones on both sides.
    """
    unanswered = [i for i in references if i not in hypotheses]
    unknown = [i for i in hypotheses if i not in references]
    if not unanswered and not unknown:
        return
    problems = []
    if unanswered:
        problems.append(f"{counted(len(unanswered), 'reference')} without a hypothesis ({_named(unanswered)})")
    if unknown:
        problems.append(f"{counted(len(unknown), 'hypothesis')} without a reference ({_named(unknown)})")
    common = len(references) - len(unanswered)
    hint = "Both sides must list the same ids."
    if not common and references and hypotheses:
        first, other = next(iter(references)), next(iter(hypotheses))
        hint = f"No id is in both: the first reference has {first!r}, the first hypothesis {other!r}."
    raise UsageError(f"the ids do not match: {'; '.join(problems)}; {common} match", hint=hint)


def _named(ids: Sequence[Any]) -> str:
    return ", ".join(map(str, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")


def _listed(given: Any, what: str) -> list[Any]:
    try:
        return list(given)
    except TypeError:  # a zero-dimensional array has __iter__ but cannot be iterated
        raise UsageError(f"{what} must be a list of texts, not {type(given).__name__}") from None


def _single(value: Any, name: Any) -> Any:
    """Returns the only text of a dictionary entry; pycocoevalcap's format puts it in a list."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    texts = list(value)
    if len(texts) != 1:
        raise UsageError(f"hypothesis {name} has {len(texts)} texts, but must have one")
    return texts[0]


def _reference(value: Any, name: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping) else []
    if not items or not all(isinstance(text, str) for text in items):
        found = f", not {_kind(value)}" if not items else ""
        raise UsageError(f"reference {name} must be a text or a list of texts with at least one entry{found}")
    return items


def _kind(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, float) and value != value:
        return "float (NaN, an empty cell)"
    return f"{name} (an empty cell)" if name in ("NoneType", "NAType", "NaTType") else name
