"""Selects the report text of a study, and cleans it for training and scoring.

Published scores compare cleaned strings, so cleaning is part of the measurement. It follows R2Gen exactly, including
its oddities (an enumeration's "1. " is deleted everywhere, also in "11. "; empty sentences stay).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emrrg_cli.errors import UsageError, require_report
from emrrg_cli.vocabulary import CLEANING_RULES, SECTIONS, Cleaning, CleaningRule, Section

# (old, new, times): one replacement over the whole text, repeated `times` times.
_ENUMERATION: tuple[tuple[str, str, int], ...] = (
    ("1. ", "", 1),
    *((f". {n}. ", ". ", 1) for n in (2, 3, 4, 5)),
    *((f" {n}. ", ". ", 1) for n in (2, 3, 4, 5)),
)
_REPLACEMENTS: dict[str, tuple[tuple[str, str, int], ...]] = {
    "r2gen-iu": (("..", ".", 3), *_ENUMERATION),
    "r2gen-mimic": (
        ("\n", " ", 1),
        ("__", "_", 7),
        ("  ", " ", 6),
        ("..", ".", 8),
        *_ENUMERATION,
        (":", " :", 1),
    ),
}

# Sentences are stripped between these two deletions: `" a` becomes `a`, but `? a` keeps its space.
_QUOTES = str.maketrans("", "", "\"/\\'")
_PUNCTUATION = {
    "r2gen-iu": str.maketrans("", "", ".,?;*!%^&_+()[]{}:<=>@"),
    "r2gen-mimic": str.maketrans("", "", ".,?;*!%^&_+()[]{}"),
}


def unix_line_ends(text: str) -> str:
    """Converts line ends to LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def whole_characters(text: str) -> str:
    """Replaces lone surrogates, which JSON can contain but UTF-8 cannot, by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_report(text: str, style: CleaningRule | str) -> str:
    """Cleans a report for training and scoring.

    Args:
        text: Raw report.
        style: `r2gen-iu` (R2Gen's rule for IU X-Ray), `r2gen-mimic` (its rule for MIMIC-CXR, also used for all other
            data sets), or `none` (only removes white space at the ends).

    Returns:
        Lower-case sentences joined by " . " and ended by " .". An empty report becomes " .".

    Raises:
        UsageError: `text` is not a text, or `style` is unknown.

    Source: R2Gen (Chen et al., EMNLP 2020); published scores are computed on its cleaned reports.
    """
    require_report(text)
    if style == "none":
        return text.strip()
    if not isinstance(style, str) or style not in _REPLACEMENTS:
        raise UsageError(f"unknown cleaning style {style!r}", hint=f"Choose one of: {', '.join(CLEANING_RULES)}.")
    for old, new, times in _REPLACEMENTS[style]:
        for _ in range(times):
            text = text.replace(old, new)
    sentences = text.strip().lower().split(". ")
    punctuation = _PUNCTUATION[style]
    return " . ".join(sentence.translate(_QUOTES).strip().translate(punctuation) for sentence in sentences) + " ."


def cleaning_for(source: str, cleaning: Cleaning | str) -> CleaningRule:
    """Returns the cleaning style of a data set: `cleaning` itself, or for `auto` the style R2Gen used for `source`.

    Args:
        source: Name in the dataset's `source` column, such as `iu_xray`.
        cleaning: `auto` or a style of `clean_report`.

    Raises:
        UsageError: `cleaning` is unknown.
    """
    if cleaning == "auto":
        return "r2gen-iu" if source == "iu_xray" else "r2gen-mimic"
    if cleaning not in CLEANING_RULES:
        raise UsageError(f"unknown cleaning {cleaning!r}", hint=f"Choose one of: auto, {', '.join(CLEANING_RULES)}.")
    return cleaning


def select_section(row: Mapping[str, Any], section: Section | str) -> str:
    """Returns the raw text of one section of a study.

    Args:
        row: A dataset row with any of the keys `report`, `findings`, `impression` (a string or None).
        section: One of these keys, or `both`: findings and impression, joined by a space.

    Returns:
        The text; "" if the study has none.

    Raises:
        UsageError: `section` is unknown.
    """
    if section not in SECTIONS:
        raise UsageError(f"unknown section {section!r}", hint=f"Choose one of: {', '.join(SECTIONS)}.")
    names = ("findings", "impression") if section == "both" else (section,)
    return " ".join(text for name in names if (text := row.get(name) or "").strip())


_SENTENCE_END = re.compile(r"(?<!\bvs)\.(?=\s|$)|[;?!](?=\s|$)|\n")
_ENUMERATED = re.compile(r"\s*\d+\.")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Finds the sentences of a raw or cleaned report (" . " between sentences).

    Returns:
        Start and end of each sentence, with its full stop and without outer spaces; together they cover all characters
        except spaces. A number with a full stop belongs to the next sentence; other parts without letters belong to the
        previous one.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    for end in (*(found.end() for found in _SENTENCE_END.finditer(text)), len(text)):
        part = text[start:end]
        if not part.strip() or (end < len(text) and _ENUMERATED.fullmatch(part)):
            continue
        first, last = start + len(part) - len(part.lstrip()), start + len(part.rstrip())
        if spans and not any(letter.isalpha() for letter in part):
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
        start = end
    return spans


def readable_report(text: str) -> str:
    """Formats a report for display: joins punctuation to its word and capitalises each sentence.

    Scores use the unchanged text. A text that already has capitals keeps its letters.
    """
    joined = re.sub(r"\s+([.,;:!?)\]])", r"\1", " ".join(text.split()))
    joined = re.sub(r"\.(?:\s*\.)+", ".", joined).lstrip(" .,;")  # empty sentences
    if any(letter.isupper() for letter in joined):
        return joined
    return re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), joined)
