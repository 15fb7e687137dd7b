"""What `score` takes: lists, arrays, columns or generators of texts, or the field's dictionaries `{id: ["text"]}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emrrg_cli.console import counted
from emrrg_cli.errors import UsageError

_SHOWN = 3


def paired_texts(references: Any, hypotheses: Any) -> tuple[list[list[str]], list[str]]:
    """References as lists of texts and hypotheses as texts, item by item; a mistake names the item.

    Raises:
        UsageError: Different items, no items, or an item that is no text.
    """
    for what, given in (("references", references), ("hypotheses", hypotheses)):
        if isinstance(given, str | bytes):
            raise UsageError("references and hypotheses must be lists of texts, not one text")
        if hasattr(given, "columns"):
            raise UsageError(f"{what} are a table", hint='Give one column of it, such as table["report"].')
        if isinstance(given, set | frozenset):
            raise UsageError(f"{what} are a set, which has no order", hint="Give a list.")
    if isinstance(references, Mapping) != isinstance(hypotheses, Mapping):
        raise UsageError(
            "one of references and hypotheses is a dictionary, the other is not", hint="Give both alike, so they match."
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
        raise UsageError(f"{here} for {there}: one of each is needed")
    if not written:
        raise UsageError("there is nothing to score: no references and no hypotheses")
    for name, text in zip(ids, written, strict=True):
        if not isinstance(text, str):
            raise UsageError(f"hypothesis {name} is not a text but {_kind(text)}")
    return [_reference(texts, name) for name, texts in zip(ids, truth, strict=True)], written


def check_ids(references: Mapping[Any, Any], hypotheses: Mapping[Any, Any]) -> None:
    """Makes sure that both sides speak of the same studies.

    Raises:
        UsageError: They do not; the message counts and names what is missing on either side.
    """
    unanswered = [i for i in references if i not in hypotheses]
    unknown = [i for i in hypotheses if i not in references]
    if not unanswered and not unknown:
        return
    said = []
    if unanswered:
        said.append(f"{counted(len(unanswered), 'reference')} without a hypothesis ({_named(unanswered)})")
    if unknown:
        said.append(f"{counted(len(unknown), 'hypothesis')} without a reference ({_named(unknown)})")
    common = len(references) - len(unanswered)
    hint = "Both sides must list the same ids."
    if not common and references and hypotheses:
        hint = f"No id is in both: {next(iter(references))!r} here, {next(iter(hypotheses))!r} there."
    raise UsageError(f"the ids do not match: {'; '.join(said)}; {common} match", hint=hint)


def _named(ids: Sequence[Any]) -> str:
    return ", ".join(map(str, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")


def _listed(given: Any, what: str) -> list[Any]:
    try:
        return list(given)
    except TypeError:  # an array of no dimension calls itself iterable
        raise UsageError(f"{what} must be a list of texts, not {type(given).__name__}") from None


def _single(value: Any, name: Any) -> Any:
    """The one text of a dictionary's entry, which the field writes as a list of one."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    texts = list(value)
    if len(texts) != 1:
        raise UsageError(f"hypothesis {name} has {len(texts)} texts: one is needed")
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
