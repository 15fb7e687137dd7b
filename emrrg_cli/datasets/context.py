"""What is known before a film is read: indication, comparison, technique, age and sex, as text for the prompt."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.vocabulary import CONTEXT_FIELDS, CONTEXT_PLACE, IMAGE_PLACE, ContextField

NO_TOKEN = -100  # stands behind the context of a study that has less of it than another of the batch

_MOST_CHARACTERS = 5_000  # of a text before it is cut to words: headers and tables may hold anything
_LEAST_WORDS = 4  # of a sentence that tells what the report says
# What de-identification leaves in place of words: XXXX, XXXX-year-old, x-XXXX; ___; [**2101-1-1**].
_MARKS = re.compile(r"(?:\b[\w-]{0,20}-)?X{3,}(?:-[\w-]+)?|_{2,}(?:-[\w-]+)?|\[\*\*.{0,100}?\*\*\]")
_AGE = re.compile(r"(\d{1,3})(?:\.\d+)?[ -]*(y|m|w|d)?[a-z]*[. -]*(?:old)?", re.IGNORECASE)
_UNITS = {"y": "years", "m": "months", "w": "weeks", "d": "days"}
_OLDEST = 130
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}


def prompt_parts(prompt: str) -> tuple[str, str, str]:
    """The text of a prompt before the image, between image and context, and behind the context.

    Without `<ContextHere>` the context stands directly behind the image.
    """
    before, rest = prompt.split(IMAGE_PLACE)
    between, mark, after = rest.partition(CONTEXT_PLACE)
    return (before, between, after) if mark else (before, "", rest)


def context_text(field: ContextField, raw: Any, cleaning: str, words: int) -> str:
    """One field as the prompt has it; "" where it says nothing.

    Marks of de-identification are taken out. Age becomes `45 years` or `6 months`, from DICOM's `045Y` too; sex
    becomes `male` or `female`.

    Args:
        raw: As a data set, a table or a header has it.
        cleaning: Of the reports; unless it is `none`, texts are cleaned by R2Gen's rule for MIMIC-CXR.
        words: The text is cut to this many.
    """
    text = "" if raw is None else str(raw)[:_MOST_CHARACTERS].strip()
    if field == "age":
        return _age(text)
    if field == "sex":
        return _SEXES.get(text.lower(), "")
    text = _MARKS.sub(" ", text)
    if cleaning != "none":
        text = clean_report(text, "r2gen-mimic").removesuffix(" .")
    # Punctuation that stood beside a mark, and sentences that were nothing but marks, have gone with it.
    parts = (part.strip(" ,;:-") for part in re.split(r"\s\.(?=\s|$)", " ".join(text.split())))
    found = " . ".join(part for part in parts if re.search(r"\w", part))
    return " ".join(found.split()[:words])


def _age(text: str) -> str:
    match = _AGE.fullmatch(text)
    if match is None or int(match[1]) > _OLDEST:
        return ""
    return f"{int(match[1])} {_UNITS[(match[2] or 'y').lower()]}"


def select_context(
    row: Mapping[str, Any], fields: Sequence[ContextField], cleaning: str, words: int
) -> dict[ContextField, str]:
    """The fields of a study that say something, as `context_text` gives them, in the order of `fields`.

    Args:
        row: Has the fields as keys, and `findings`, `impression`, `report`, each a text or None or not there.
    """
    texts = {name: context_text(name, without_report(row, name), cleaning, words) for name in fields}
    return {name: text for name, text in texts.items() if text}


def without_report(row: Mapping[str, Any], field: ContextField) -> str:
    """The raw text of a field without sentences of four words or more that its study's report has too.

    A context that holds them would give the report away.

    Args:
        row: As in `select_context`.
    """
    told = [_plain(row.get(name) or "") for name in ("findings", "impression", "report")]
    sentences = re.split(r"(?<=[.;!?])\s+", str(row.get(field) or "")[:_MOST_CHARACTERS])
    return " ".join(sentence for sentence in sentences if not _is_told(_plain(sentence), told))


def _plain(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def _is_told(sentence: str, told: Sequence[str]) -> bool:
    return len(sentence.split()) >= _LEAST_WORDS and any(sentence in text for text in told)


def drop_fields(
    context: Mapping[ContextField, str], rate: float, seed: int, epoch: int, study_id: str
) -> dict[ContextField, str]:
    """The context without the fields that the draw for a study and an epoch leaves out, each at the same `rate`."""
    draw = random.Random(f"{seed} {epoch} {study_id}")
    kept = {name: draw.random() >= rate for name in CONTEXT_FIELDS}
    return {name: text for name, text in context.items() if kept[name]}


def context_sentence(context: Mapping[ContextField, str]) -> str:
    """As the prompt has it: ` Indication: cough. Age: 45 years.`"""
    return "".join(f" {name.capitalize()}: {text}." for name, text in context.items())


def encode_contexts(tokenizer: Any, contexts: Sequence[Mapping[ContextField, str]]) -> Tensor | None:
    """Tokens of what the prompts of studies say: int64 `[b, c]`, `NO_TOKEN` behind the shorter ones; None: nothing."""
    if not any(contexts):
        return None
    rows = [tokenizer.encode(context_sentence(context), add_special_tokens=False) for context in contexts]
    longest = max(map(len, rows))
    return torch.tensor([row + [NO_TOKEN] * (longest - len(row)) for row in rows])
