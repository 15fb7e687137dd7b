"""The context of a study for the prompt: indication, comparison, technique, age and sex as text."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.vocabulary import CONTEXT_FIELDS, CONTEXT_PLACE, IMAGE_PLACE, ContextField

NO_TOKEN = -100  # padding behind the shorter contexts of a batch

_MOST_CHARACTERS = 5_000  # of a text before it is split into words, because headers and tables may contain anything
_LEAST_WORDS = 4  # of a sentence that may reveal the report
# Marks that de-identification puts in place of words: XXXX, XXXX-year-old, x-XXXX; ___; [**2101-1-1**].
_MARKS = re.compile(r"(?:\b[\w-]{0,20}-)?X{3,}(?:-[\w-]+)?|_{2,}(?:-[\w-]+)?|\[\*\*.{0,100}?\*\*\]")
_AGE = re.compile(r"(\d{1,3})(?:\.\d+)?[ -]*(y|m|w|d)?[a-z]*[. -]*(?:old)?", re.IGNORECASE)
_UNITS = {"y": "years", "m": "months", "w": "weeks", "d": "days"}
_OLDEST = 130
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}


def prompt_parts(prompt: str) -> tuple[str, str, str]:
    """Splits a prompt into the text before the image, between image and context, and after the context.

    Without `<ContextHere>`, the context follows directly after the image.
    """
    before, rest = prompt.split(IMAGE_PLACE)
    between, mark, after = rest.partition(CONTEXT_PLACE)
    return (before, between, after) if mark else (before, "", rest)


def context_text(field: ContextField, raw: Any, cleaning: str, words: int) -> str:
    """Returns one field as text for the prompt; "" if it has no content.

    Marks of de-identification are removed. Age becomes `45 years` or `6 months`, also from DICOM's `045Y`; sex becomes
    `male` or `female`.

    Args:
        raw: Value in the data set, table or header.
        cleaning: Cleaning rule of the reports; unless it is `none`, texts are cleaned by R2Gen's rule for MIMIC-CXR.
        words: Largest number of words; longer text is cut.
    """
    text = "" if raw is None else str(raw)[:_MOST_CHARACTERS].strip()
    if field == "age":
        return _age(text)
    if field == "sex":
        return _SEXES.get(text.lower(), "")
    text = _MARKS.sub(" ", text)
    if cleaning != "none":
        text = clean_report(text, "r2gen-mimic").removesuffix(" .")
    # Punctuation beside a mark, and sentences of only marks, were removed with the marks.
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
    """Returns the fields of a study that have content, as `context_text` returns them, in the order of `fields`.

    Args:
        row: The fields and `findings`, `impression`, `report` as keys; each is a text, None or missing.
    """
    texts = {name: context_text(name, without_report(row, name), cleaning, words) for name in fields}
    return {name: text for name, text in texts.items() if text}


def without_report(row: Mapping[str, Any], field: ContextField) -> str:
    """Returns the raw text of a field without sentences of four or more words that are also in the report.

    Otherwise the context would reveal the report.

    Args:
        row: As in `select_context`.
    """
    reports = [_plain(row.get(name) or "") for name in ("findings", "impression", "report")]
    sentences = re.split(r"(?<=[.;!?])\s+", str(row.get(field) or "")[:_MOST_CHARACTERS])
    return " ".join(sentence for sentence in sentences if not _is_in_reports(_plain(sentence), reports))


def _plain(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def _is_in_reports(sentence: str, reports: Sequence[str]) -> bool:
    return len(sentence.split()) >= _LEAST_WORDS and any(sentence in text for text in reports)


def drop_fields(
    context: Mapping[ContextField, str], rate: float, seed: int, epoch: int, study_id: str
) -> dict[ContextField, str]:
    """Drops each field of the context with probability `rate`, drawn for the study and the epoch."""
    draw = random.Random(f"{seed} {epoch} {study_id}")
    kept = {name: draw.random() >= rate for name in CONTEXT_FIELDS}
    return {name: text for name, text in context.items() if kept[name]}


def context_sentence(context: Mapping[ContextField, str]) -> str:
    """Formats the context for the prompt: ` Indication: cough. Age: 45 years.`"""
    return "".join(f" {name.capitalize()}: {text}." for name, text in context.items())


def encode_contexts(tokenizer: Any, contexts: Sequence[Mapping[ContextField, str]]) -> Tensor | None:
    """Encodes the contexts of studies: int64 `[b, c]`, padded with `NO_TOKEN`; None if all are empty."""
    if not any(contexts):
        return None
    rows = [tokenizer.encode(context_sentence(context), add_special_tokens=False) for context in contexts]
    longest = max(map(len, rows))
    return torch.tensor([row + [NO_TOKEN] * (longest - len(row)) for row in rows])
