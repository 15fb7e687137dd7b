"""Measures whether the model looks where the finding is: maps of sentences on films with one finding on one side.

    python -m tests.benchmarks.grounding RUN [--count 200] [--seed 1000]

RUN is a run of `emrrg finetune` on phantoms. Films are drawn with a seed that no training set has. The energy of a map
is its share on the half of the film where the finding is: 0.5 for a map without information. It is measured for the
sentence that names the finding

- in the film's own reference, read by the model (teacher forcing), and in the same reference with right and left
  exchanged: a map that follows the word and not the image would move to the other side;
- in the report that the model writes itself, if it names the finding with a side.

The control of each is the map of another, random film. Means with 95 % intervals by bootstrap.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from emrrg_cli.datasets.report_text import clean_report, cleaning_for
from emrrg_cli.decoding.confidence import read_confidence
from emrrg_cli.decoding.grounding import ground_reports
from emrrg_cli.decoding.reports import Generator, load_generator
from emrrg_cli.evaluation.bootstrap import interval, resampled_sums
from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.phantom.parameters import Case, Side
from emrrg_cli.phantom.reader import read_labels
from emrrg_cli.phantom.render import render

BATCH = 50


@dataclass(frozen=True)
class Film:
    """A film with one finding that has a side, its reference and its pixels, uint8 `[1, size, size]`."""

    label: str
    side: Side
    reference: str
    pixels: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """A sentence about the finding of a film: its map `[grid, grid]`, and the film it belongs to."""

    film: int
    map: torch.Tensor


def one_sided(case: Case) -> tuple[str, Side] | None:
    """Returns the only finding of a case with a side; None if there is none, or more than one."""
    found = case.findings
    sided: list[tuple[str, Any]] = [
        *(("pleural_effusion", one) for one in found.effusions),
        *(("consolidation", one) for one in found.consolidations),
        *(("atelectasis", one) for one in found.atelectases),
        *((name, one) for name, one in (("pneumothorax", found.pneumothorax), ("nodule", found.nodule)) if one),
        *(("support_device", one) for one in found.devices if one.side is not None),
    ]
    return (sided[0][0], sided[0][1].side) if len(sided) == 1 else None


def draw_films(count: int, seed: int, size: int, cleaning: Any) -> list[Film]:
    """Returns the first films of a seed that have exactly one finding with a side."""
    films: list[Film] = []
    index = 0
    while len(films) < count:
        case, report = synthetic_study(seed, index)
        index += 1
        found = one_sided(case)
        if found is not None:
            text = clean_report(report.findings, cleaning_for("phantom", cleaning))
            films.append(Film(*found, text, torch.from_numpy(render(case, size))[None]))
    return films


def named(text: str, spans: Sequence[Any], label: str) -> list[tuple[int, str]]:
    """Returns the sentences that state a finding with one side: their number and the side."""
    found = []
    for number, one in enumerate(spans):
        sentence = text[one.start : one.end]
        sides = set(re.findall(r"\b(?:right|left)\b", sentence))
        if label in read_labels(sentence) and len(sides) == 1:
            found.append((number, sides.pop()))
    return found


def exchanged(text: str) -> str:
    """Exchanges right and left in a report."""
    return re.sub(r"\b(right|left)\b", lambda found: {"right": "left", "left": "right"}[found[1]], text)


def read_reports(generator: Generator, films: Sequence[Film], texts: Sequence[str]) -> Iterator[Reading]:
    """Returns the maps of the sentences that name the finding, in given reports."""
    model = generator.model
    for start in range(0, len(films), BATCH):
        some = range(start, min(start + BATCH, len(films)))
        reports = [model.encode_report(texts[number]) for number in some]
        shown = [model.decode(tokens) for tokens in reports]
        sure = [read_confidence(a, b, [0.0] * len(b), model.decode) for a, b in zip(shown, reports, strict=True)]
        pixels = torch.cat([films[number].pixels for number in some]).to(generator.device)
        views = torch.ones(len(some), dtype=torch.long, device=generator.device)
        maps = ground_reports(model, pixels, views, reports, [one.sentence_of_token for one in sure])
        for number, text, one, each in zip(some, shown, sure, maps, strict=True):
            for sentence, _ in named(text, one.sentences, films[number].label)[:1]:
                yield Reading(number, each[sentence, 0])


def energy(one: torch.Tensor, side: Side) -> float:
    """Returns the share of a map on a side; the patient's right is at the left of the film."""
    half = one.shape[1] // 2
    return (one[:, :half] if side == "right" else one[:, -half:]).sum().item() / max(one.sum().item(), 1e-9)


def summary(values: Sequence[float]) -> str:
    """Computes mean and 95 % interval."""
    if not values:
        return "-"
    low, high = interval(resampled_sums(np.array(values)[:, None], 2000)[:, 0] / len(values))
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def rows(readings: Sequence[Reading], films: Sequence[Film], rng: np.random.Generator) -> Iterator[list[str]]:
    """Makes one row per finding, the first for all: count, energy on the right side, and that of another film's map."""
    others = [readings[int(place)].map for place in rng.permutation(len(readings))]
    for label in (None, *sorted({film.label for film in films})):
        chosen = [place for place, one in enumerate(readings) if label in (None, films[one.film].label)]
        own = [energy(readings[place].map, films[readings[place].film].side) for place in chosen]
        control = [energy(others[place], films[readings[place].film].side) for place in chosen]
        yield [label or "all", str(len(chosen)), summary(own), summary(control)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    generator = load_generator(arguments.run, device=arguments.device)
    recipe = generator.recipe
    films = draw_films(arguments.count, arguments.seed, recipe.model.encoder.image_size, recipe.data.cleaning)
    references = [film.reference for film in films]
    own = generator.generate_pixels([film.pixels for film in films])
    readings = {
        "reference": list(read_reports(generator, films, references)),
        "reference, sides exchanged": list(read_reports(generator, films, [exchanged(text) for text in references])),
        "own report": list(read_reports(generator, films, own)),
    }
    table = Table(title=f"share of the map on the side of the finding, {len(films)} films", title_justify="left")
    for name in ("sentence in", "finding", "n", "own map", "map of another film"):
        table.add_column(name, no_wrap=True)
    for name, found in readings.items():
        for row in rows(found, films, np.random.default_rng(0)):
            table.add_row(name, *row)
        table.add_section()
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
