"""Reads the images of studies in order and ahead of the model."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from emrrg_cli.decoding.cards import small_picture
from emrrg_cli.decoding.reports import study_pixels
from emrrg_cli.decoding.studies import Film, StudyFiles, path_name
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.notes import image_notes
from emrrg_cli.imaging.read import read_image
from emrrg_cli.imaging.views import view_token


@dataclass
class ReadStudy:
    """The images of a study.

    Args:
        pixels: uint8 `[views, size, size]`; None if no image can be read.
        used: the files that were read.
        projections: their indices into `VIEW_TOKENS`.
        notes: notes about the images for the reader.
        skipped: files that could not be read, with the reasons.
        pictures: data URLs of small pictures of the files that were read; empty unless requested.
    """

    study: StudyFiles
    pixels: torch.Tensor | None
    used: list[Film]
    notes: list[str]
    skipped: list[tuple[str, str]]
    projections: list[int] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


def read_study(study: StudyFiles, size: int, most: int | None, *, pictured: bool = False) -> ReadStudy:
    """Reads the first `most` readable images of a study; with `pictured`, also makes small pictures."""
    read = ReadStudy(study, None, [], [], [])
    views: list[torch.Tensor] = []
    if not study.files:
        read.skipped.append((study.name, "no images"))
    for file, view in zip(study.files, study.views, strict=True):
        if len(views) == most:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about odd metadata
                image = read_image(file if isinstance(file, Path) else file.content())
            pixels = study_pixels(image, size)
        except ImageError as error:
            read.skipped.append((path_name(file), ": ".join(filter(None, [error.reason, error.detail]))))
            continue
        if pictured:
            read.pictures.append(small_picture(image))
        views.append(pixels)
        read.notes += [note for note in image_notes(image) if note not in read.notes]
        read.used.append(file)
        read.projections.append(view_token(view))
    if views:
        read.pixels = torch.cat(views)
        if read.skipped:
            read.notes.append(f"{len(read.skipped)} of {len(study.files)} images could not be read")
    return read


def read_studies(
    studies: Iterable[StudyFiles], size: int, most: int | None, threads: int, pictures: int = 0
) -> Iterator[ReadStudy]:
    """Yields studies in order; `threads` (0: none) read a few studies ahead.

    Args:
        size, most: as in `read_study`.
        pictures: number of first studies that get small pictures.
    """

    def read(numbered: tuple[int, StudyFiles]) -> ReadStudy:
        number, study = numbered
        return read_study(study, size, most, pictured=number < pictures)

    rest = enumerate(studies)
    if not threads:
        yield from map(read, rest)
        return
    waiting: deque[Future[ReadStudy]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for study in islice(rest, 4 * threads):
                waiting.append(pool.submit(read, study))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(read, study) for study in islice(rest, 1))
                yield done
        finally:
            for future in waiting:
                future.cancel()
