"""The gallery: pages that show studies with their reports, where the model looked and how sure it was of each word.

Pages are written piece by piece, so that one study is in memory at a time, however many there are.
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
    """What heads the pages.

    Args:
        facts: names and values, such as the model and the command.
        skipped: path and reason of files that could not be read, the first of them.
        skipped_count: how many there are.
        reports: how many reports the run has, shown or not.
        map_note: what the maps are; "" where there are none.
        limits: what the model cannot do, as `read_limits` gives it.
        intro: what the page shows, where that is more than reports.
        tables, legend: as those of a `Page`.
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
    """What a study's card shows beside its record.

    Args:
        images: addresses of the pictures, one a view.
        grid: patches on a side of a map.
        maps: of each sentence uint8 `[views, grid, grid]` in base64, 255 at the largest value; "": no map.
        peaks: of each sentence the largest value of its map, as a multiple of an even spread.
    """

    images: Sequence[str] = ()
    grid: int = 0
    maps: Sequence[str] = ()
    peaks: Sequence[float] = ()


@dataclass(frozen=True)
class _Sentence:
    pieces: list[tuple[str, int]]  # text, and how unsure the model is of it, 0 to 9
    confidence: float | None
    map: str
    peak: float
    tag: str  # "good" or "bad" where it is compared with a reference


@dataclass(frozen=True)
class _Card:
    name: str
    folder: str  # the name is divided in two for reading
    title: str
    images: list[tuple[str, str]]  # address and caption
    grid: int
    sentences: list[_Sentence]
    confidence: float | None
    findings: dict[str, list[str]]  # by "positive", "uncertain", "negative"
    told: str  # to the model, beside the images
    notes: list[str]
    filters: list[str]  # what the list of findings offers
    tags: list[tuple[str, str]]  # findings compared with the known ones, as those of a `Card` of `Page`
    reference: list[tuple[str, str]]  # its sentences, each with a tag or ""


def write_gallery(
    folder: Path, about: About, studies: Iterable[tuple[Mapping[str, Any], Pictures]], count: int
) -> list[Path]:
    """Writes `page.html`, and `page-2.html` and so on where there are more than 500 studies; removes older ones.

    Args:
        studies: records of `generate` with their pictures, one at a time. Where the truth is known, a record also has
            `tags` (findings, each with `good`, `bad` or `missed`), `sentence_tags` (of each sentence `good`, `bad` or
            "") and `reference` (sentences, each with `good`, `missed` or "").
        count: how many there are.

    Returns:
        The files.

    Raises:
        RunError: one cannot be written; it is then as it was.
    """
    rest = iter(studies)
    names = [_page_name(number) for number in range(1, max(1, -(-count // STUDIES_A_PAGE)) + 1)]
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


def _page_name(number: int) -> str:
    return "page.html" if number == 1 else f"page-{number}.html"


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
        told="; ".join(f"{field}: {value}" for field, value in (row.get("context") or {}).items()),
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
    """A sentence as people write it, in pieces, each with how unsure the model is of it: 0 (sure) to 9.

    Args:
        sentence: words divided by single spaces.
        sure: probability of each word; anything but as many as words: nothing is known.
    """
    readable, words = readable_report(sentence), sentence.split(" ")
    if len(sure) != len(words):
        return [(readable, 0)]
    pieces: list[tuple[str, int]] = []
    for word, value in zip(words, sure, strict=True):
        level = min(_LEVELS, int((1 - value) * (_LEVELS + 1)))
        space = " " if pieces and not _PUNCTUATION.fullmatch(word) else ""
        pieces.append((space + word, level))
    if len("".join(text for text, _ in pieces)) != len(readable):  # it says something else, such as ". ." as "."
        return [(readable, 0)]
    shown, place = [], 0
    for text, level in pieces:
        shown.append((readable[place : place + len(text)], level))
        place += len(text)
    return shown
