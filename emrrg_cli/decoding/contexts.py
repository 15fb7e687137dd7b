"""Contexts of studies (indication, age, ...) in the form of the model's prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from emrrg_cli.datasets.context import context_text
from emrrg_cli.decoding.studies import StudyFiles
from emrrg_cli.errors import UsageError
from emrrg_cli.ingest.sources.table import cell_text
from emrrg_cli.recipe.common import DataSettings
from emrrg_cli.vocabulary import ContextField

_NO_VALUES = (list, tuple, Mapping, set, bytes, bool)


def read_context(given: Mapping[str, Any], settings: DataSettings) -> dict[ContextField, str]:
    """Returns the context of a study for its prompt, without empty texts; None and NaN are empty.

    Args:
        settings: data settings of the run; its `context` lists the fields that the model reads.

    Raises:
        UsageError: for a field that the model does not read, or a value that is neither a text nor a number.
    """
    if unknown := sorted(map(str, set(given) - set(settings.context))):
        known = f"it reads {', '.join(settings.context)}" if settings.context else "it was trained without any context"
        raise UsageError(f"this model does not read {', '.join(unknown)}: {known} (data.context)")
    if wrong := next((name for name, value in given.items() if isinstance(value, _NO_VALUES)), None):
        raise UsageError(f"the context {wrong} must be a text or a number, not {type(given[wrong]).__name__}")
    raw = {name: value if isinstance(value, str) else cell_text(value) for name, value in given.items()}
    texts = {
        name: context_text(name, raw.get(name), settings.cleaning, settings.context_words) for name in settings.context
    }
    return {name: text for name, text in texts.items() if text}


def with_contexts(studies: Sequence[StudyFiles], given: Mapping[str, str], settings: DataSettings) -> list[StudyFiles]:
    """Returns the studies with their contexts for the prompt; `given` applies to all studies and has priority.

    Fields of a study that the model does not read are dropped.

    Raises:
        UsageError: as `read_context`, for `given`, which must also be understood.
    """
    understood = read_context(given, settings)
    for name, known in (("age", "45, 45Y, 6M or 3 days"), ("sex", "F, M, female or male")):
        if name in given and name not in understood:
            raise UsageError(f"the context {name}={given[name]} is not understood", hint=f"Write {known}.")
    found = []
    for study in studies:
        own: dict[str, str] = {name: text for name, text in study.context.items() if name in settings.context}
        found.append(replace(study, context=read_context(own | dict(given), settings)))
    return found
