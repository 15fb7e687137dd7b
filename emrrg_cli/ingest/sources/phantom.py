"""Synthetic studies as a source for the dataset writer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from emrrg_cli.datasets.directory import Column
from emrrg_cli.errors import UsageError
from emrrg_cli.ingest.study import ImportLog, Study
from emrrg_cli.phantom.grid import generator
from emrrg_cli.phantom.parameters import Case, Film
from emrrg_cli.phantom.render import render
from emrrg_cli.phantom.report import Report, write_report
from emrrg_cli.phantom.sampling import draw_case
from emrrg_cli.vocabulary import Split

NAME = "phantom"
_ABOUT = (
    "**Synthetic.** Every image is drawn by a program from random parameters, and every report is written by a grammar "
    "from the same parameters. They show no patient, and results on them say nothing about clinical performance."
)
_COLUMNS = {
    "labels": Column("texts", "findings that are present; empty if there are none"),
    "parameters": Column("text", "JSON: parameters of image and report (lengths in cm unless the name says otherwise)"),
}


def synthetic_study(seed: int, index: int, *, plain: bool = False) -> tuple[Case, Report]:
    """Makes study `index` of a seed. It depends only on the arguments; `plain` as in `draw_case`."""
    rng = generator(seed, index)
    case = draw_case(rng, plain=plain)
    return case, write_report(case, rng)


def split_of(index: int, fractions: Sequence[float] = (0.8, 0.1, 0.1)) -> Split:
    """Returns the split of a study. It depends only on the index, so it does not change when more studies are made.

    The last three digits of the index, reversed and shuffled, are a position from 0 to 999. Ten consecutive studies are
    therefore spread evenly over the positions, and so are a hundred.
    """
    place = index % 10 * 7 % 10 * 100 + index // 10 % 10 * 3 % 10 * 10 + index // 100 % 10
    if place < round(1000 * fractions[0]):
        return "train"
    return "validation" if place < round(1000 * (fractions[0] + fractions[1])) else "test"


@dataclass(frozen=True)
class PhantomImage:
    """A synthetic radiograph that is drawn on request."""

    name: str
    case: Case
    film: Film

    def render(self, size: int) -> Image.Image:
        """Draws the film: `size` x `size` pixels, mode `L`."""
        return Image.fromarray(render(self.case, size, film=self.film))


class PhantomSource:
    """`count` synthetic studies, each with a frontal film and some with a lateral film.

    Args:
        count: Number of studies.
        seed: Random seed, 0 or more.
        fractions: Fractions of train, validation and test, which add up to 1.
        limit: Number of studies to make from the start of each split; None: all.
        plain: As in `draw_case`.

    Raises:
        UsageError: A number is out of range.
    """

    name = NAME
    root: Path | None = None
    image_folders: tuple[Path, ...] = ()
    columns = _COLUMNS
    about = _ABOUT

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        limit: int | None = None,
        plain: bool = False,
    ) -> None:
        if count < 1 or seed < 0:
            raise UsageError("the number of phantoms must be 1 or more, the seed 0 or more")
        self._count, self._seed, self._fractions, self._limit = count, seed, fractions, limit
        self._plain = plain

    def __len__(self) -> int:
        return sum(1 for _ in self._indices())

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields studies 0 to `count` - 1; images are drawn later."""
        for index, split in self._indices():
            log.read += 1
            case, report = synthetic_study(self._seed, index, plain=self._plain)
            study_id = f"phantom-{self._seed}-{index:06d}"
            yield Study(
                study_id=study_id,
                patient_id=study_id,
                split=split,
                image_paths=(),
                views=tuple(film.view for film in case.films),
                findings=report.findings,
                impression=report.impression,
                report=report.text,
                source=self.name,
                rendered=tuple(
                    PhantomImage(f"{study_id}{'-lateral' if film is case.lateral else ''}.png", case, film)
                    for film in case.films
                ),
                extra={"labels": sorted(case.findings.labels()), "parameters": json.dumps(case.as_dict())},
            )

    def _indices(self) -> Iterator[tuple[int, Split]]:
        made: Counter[Split] = Counter()
        for index in range(self._count):
            split = split_of(index, self._fractions)
            if self._limit is None or made[split] < self._limit:
                made[split] += 1
                yield index, split
