"""Contexts of studies (indication, age, ...) in the form of the model's prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from emrrg_cli.datasets.context import context_text
from emrrg_cli.decoding.studies import StudyFiles
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import DataSettings
from emrrg_cli.vocabulary import ContextField


def read_context(given: Mapping[str, Any], settings: DataSettings) -> dict[ContextField, str]:
    """Returns the context of a study for its prompt, without empty texts.

    Args:
        settings: data settings of the run; its `context` lists the fields that the model reads.

    Raises:
        UsageError: for a field that the model does not read.
    """
    if unknown := sorted(map(str, set(given) - set(settings.context))):
        known = f"it reads {', '.join(settings.context)}" if settings.context else "it was trained without any context"
        raise UsageError(f"this model does not read {', '.join(unknown)}: {known} (data.context)")
    texts = {
        name: context_text(name, given.get(name), settings.cleaning, settings.context_words)
        for name in settings.context
    }
    return {name: text for name, text in texts.items() if text}


def with_contexts(studies: Sequence[StudyFiles], given: Mapping[str, str], settings: DataSettings) -> list[StudyFiles]:
    """Returns the studies with their contexts for the prompt; `given` applies to all studies and has priority.

    Fields of a study that the model does not read are dropped.

    Raises:
        UsageError: as `read_context`, for `given`.
    """
    read_context(given, settings)
    found = []
    for study in studies:
        own: dict[str, str] = {name: text for name, text in study.context.items() if name in settings.context}
        found.append(replace(study, context=read_context(own | dict(given), settings)))
    return found
