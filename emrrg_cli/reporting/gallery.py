"""Writes the gallery: pages with studies, reports, maps of where the model looked, and word confidence.

Pages are written piece by piece, so that only one study is in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.report_text import readable_report, sentence_spans
from emrrg_cli.files.atomic import atomic_file
from emrrg_cli.reporting.rendering import render_parts

STUDIES_A_PAGE = 500
_LEVELS = 9  # of shading
_WORDS = {"good": "found", "bad": "invented", "missed": "missed"}
_PUNCTUATION = re.compile(r"[.,;:!?)\]]+")


@dataclass(frozen=True)
class About:
    """The content at the top of the pages.

    Args:
        facts: names and values, such as the model and the command.
        skipped: path and reason of the first files that could not be read.
        skipped_count: number of files that could not be read.
        reports: number of reports of the run, including those not shown.
        map_note: explanation of the maps; "" if there are none.
        limits: limits of the model, from `read_limits`.
        intro: introduction, if the page shows more than reports.
        tables: rows of `name -> columns` by title, as in `Page`.
        legend: explanations of the tags, each with its kind (`good`, `bad` or `missed`).
    """

    facts: Sequence[tuple[str, str]]
    skipped: Sequence[tuple[str, str]] = ()
    skipped_count: int = 0
    reports: int = 0
    map_note: str = ""
    limits: str = ""
    title: str = "Generated reports"
    intro: str = ""
    tables: Sequence[tuple[str, Mapping[str, Sequence[str]]]] = ()
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Pictures:
    """Pictures and maps of a study's card.

    Args:
        images: data URLs of the pictures, one per view.
        grid: number of patches on a side of a map.
        maps: map of each sentence, uint8 `[views, grid, grid]` in base64, 255 at the largest value; "": no map.
        peaks: largest value of each sentence's map, as a multiple of an even spread.
    """

    images: Sequence[str] = ()
    grid: int = 0
    maps: Sequence[str] = ()
    peaks: Sequence[float] = ()


@dataclass(frozen=True)
class _Sentence:
    pieces: list[tuple[str, int]]  # text, and uncertainty of the model, 0 to 9
    confidence: float | None
    map: str
    peak: float
    tag: str  # "good" or "bad" if it is compared with a reference


@dataclass(frozen=True)
class _Card:
    name: str
    folder: str  # the name is split into folder and file
    title: str
    images: list[tuple[str, str]]  # address and caption
    grid: int
    sentences: list[_Sentence]
    confidence: float | None
    findings: dict[str, list[str]]  # by "positive", "uncertain", "negative"
    context: str  # context given to the model
    notes: list[str]
    filters: list[str]  # entries of the findings filter
    tags: list[tuple[str, str]]  # findings compared with the truth: good, bad or missed
    reference: list[tuple[str, str]]  # sentences of the reference, each with a tag or ""


def write_gallery(
    folder: Path, about: About, studies: Iterable[tuple[Mapping[str, Any], Pictures]], count: int
) -> list[Path]:
    """Writes `page.html`, and `page-2.html` and so on if there are more than 500 studies; removes older pages.

    Args:
        studies: records of `generate` with their pictures, one at a time. If the truth is known, a record also has
            `tags` (findings, each with `good`, `bad` or `missed`), `sentence_tags` (`good`, `bad` or "" for each
            sentence) and `reference` (sentences, each with `good`, `missed` or "").
        count: number of studies.

    Returns:
        The written files.

    Raises:
        RunError: a file cannot be written; it is unchanged then.
    """
    rest = iter(studies)
    names = page_names(count)
    for number, name in enumerate(names):
        first = number * STUDIES_A_PAGE
        cards = (_card(row, pictures) for row, pictures in islice(rest, STUDIES_A_PAGE))
        parts = render_parts(
            "gallery.html",
            title=about.title,
            intro=about.intro,
            about=about,
            first=first + 1,
            last=min(count, first + STUDIES_A_PAGE),
            count=count,
            names=names,
            number=number,
            cards=cards,
        )
        with atomic_file(folder / name) as file:
            for part in parts:
                file.write(part.encode("utf-8"))
    for file_path in folder.glob("page-*.html"):
        found = re.fullmatch(r"page-(\d+)\.html", file_path.name)
        if found and file_path.name not in names:
            file_path.unlink()
    return [folder / name for name in names]


def page_names(count: int) -> list[str]:
    """Returns the names of the pages for `count` studies."""
    return ["page.html", *(f"page-{number}.html" for number in range(2, -(-count // STUDIES_A_PAGE) + 1))]


def _card(row: Mapping[str, Any], pictures: Pictures) -> _Card:
    views = [*(row.get("views") or ()), *[None] * len(pictures.images)]
    captions = [view or ("" if len(pictures.images) == 1 else f"view {n + 1}") for n, view in enumerate(views)]
    findings: dict[str, list[str]] = {"positive": [], "uncertain": [], "negative": []}
    for name, label in (row.get("findings") or {}).items():
        findings[label].append(name)
    mean = row.get("mean_token_logprob")
    name = row["study"]
    tags = list(row.get("tags") or ())
    compared = [f"{finding}: {_WORDS[tag]}" for finding, tag in tags]
    title = max(name.rfind("/"), name.rfind("\\")) + 1
    return _Card(
        name=name,
        folder=name[:title],
        title=name[title:],
        images=list(zip(pictures.images, captions, strict=False)),
        grid=pictures.grid,
        sentences=list(_sentences(row, pictures)),
        confidence=None if mean is None else math.exp(mean),
        findings=findings,
        context="; ".join(f"{field}: {value}" for field, value in (row.get("context") or {}).items()),
        notes=list(row.get("notes") or ()),
        filters=compared if "tags" in row else findings["positive"] + findings["uncertain"],
        tags=tags,
        reference=list(row.get("reference") or ()),
    )


def _sentences(row: Mapping[str, Any], pictures: Pictures) -> Iterator[_Sentence]:
    text = row["report"]
    kept = row.get("sentences")
    spans = sentence_spans(text) if kept is None else [(one["start"], one["end"]) for one in kept]
    sure, tags = row.get("word_confidence") or [], row.get("sentence_tags") or ()
    for number, (start, end) in enumerate(spans):
        first = text[:start].count(" ")
        pieces = shaded_words(text[start:end], sure[first : first + text[start:end].count(" ") + 1])
        yield _Sentence(
            pieces=pieces,
            confidence=None if kept is None else kept[number]["confidence"],
            map=pictures.maps[number] if number < len(pictures.maps) else "",
            peak=pictures.peaks[number] if number < len(pictures.peaks) else 0.0,
            tag=tags[number] if number < len(tags) else "",
        )


def shaded_words(sentence: str, sure: Sequence[float]) -> list[tuple[str, int]]:
    """Formats a sentence for display and splits it into pieces, each with the model's uncertainty: 0 (sure) to 9.

    Args:
        sentence: words separated by single spaces.
        sure: probability of each word; if its length differs from the number of words, it is ignored.
    """
    readable, words = readable_report(sentence), sentence.split(" ")
    if len(sure) != len(words):
        return [(readable, 0)]
    pieces: list[tuple[str, int]] = []
    for word, value in zip(words, sure, strict=True):
        level = min(_LEVELS, int((1 - value) * (_LEVELS + 1)))
        space = " " if pieces and not _PUNCTUATION.fullmatch(word) else ""
        pieces.append((space + word, level))
    # The readable text can differ, for example "." for ". .".
    if len("".join(text for text, _ in pieces)) != len(readable):
        return [(readable, 0)]
    shown, place = [], 0
    for text, level in pieces:
        shown.append((readable[place : place + len(text)], level))
        place += len(text)
    return shown
