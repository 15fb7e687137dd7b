"""Reads the images of studies in order and ahead of the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.decoding.cards import small_picture
from emrrg_cli.decoding.stamps import Stamp, stamp_of
from emrrg_cli.decoding.studies import Film, StudyFiles, path_name
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.notes import image_notes
from emrrg_cli.imaging.raster import resize_square
from emrrg_cli.imaging.read import read_image
from emrrg_cli.imaging.views import view_token

_AT_ONCE = 8  # studies that a process reads at a time
_MOST_VIEWS = 16  # of a study; a folder of 150 films that is taken for one study would need 10 GB


@dataclass
class ReadStudy:
    """The images of a study.

    Args:
        pixels: uint8 `[views, size, size]`; None if no image can be read.
        used: the files that were read.
        projections: their indices into `VIEW_TOKENS`.
        notes: notes about the images for the reader.
        skipped: files that could not be read, with the reasons.
        stamps: stamps of the used files, then of the others.
        pictures: data URLs of small pictures of the files that were read; empty unless requested.
    """

    study: StudyFiles
    pixels: NDArray[np.uint8] | None
    used: list[Film]
    notes: list[str]
    skipped: list[tuple[str, str]]
    projections: list[int] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    stamps: list[Stamp | None] = field(default_factory=list)


def view_limit(most: int | None) -> int:
    """Returns how many images of a study are used: `data.max_views`, or 16 if it is null."""
    return _MOST_VIEWS if most is None else most


def unused_note(images: int, study: str) -> str:
    """Returns the note on a study with more images than `view_limit(None)`."""
    return f"only {view_limit(None)} of {images} images of study {study} are used; data.max_views=N allows more"


def read_study(study: StudyFiles, size: int, most: int | None, *, pictured: bool = False) -> ReadStudy:
    """Reads the first `most` (None: 16) readable images of a study; with `pictured`, also makes small pictures."""
    read = ReadStudy(study, None, [], [], [])
    views: list[NDArray[np.uint8]] = []
    if not study.files:
        read.skipped.append((study.name, "no images"))
    for file, view in zip(study.files, study.views, strict=True):
        if len(views) == view_limit(most):
            if most is None:
                read.notes.append(unused_note(len(study.files), study.name))
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about odd metadata
                image = read_image(file if isinstance(file, Path) else file.content())
            pixels = resize_square(image, size)
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
        read.pixels = np.stack(views)
        read.stamps = [stamp_of(file, content=True) for file in read.used]
        read.stamps += [stamp_of(file, content=False) for file in study.files if file not in read.used]
        if read.skipped:
            read.notes.append(f"{len(read.skipped)} of {len(study.files)} images could not be read")
    return read


def read_studies(
    studies: Sequence[StudyFiles], size: int, most: int | None, workers: int, pictures: int = 0
) -> Iterator[ReadStudy]:
    """Yields studies in order; `workers` processes (0: none) read a few studies ahead.

    Args:
        size, most: as in `read_study`.
        pictures: number of first studies that get small pictures.
    """
    reading = _Reading(studies, size, most, pictures)
    if not workers:
        yield from map(reading.__getitem__, range(len(studies)))
        return
    starts = range(0, len(studies), _AT_ONCE)
    batches = [range(start, min(start + _AT_ONCE, len(studies))) for start in starts]
    for read in load_batches(reading, batches, list, workers=min(workers, len(batches))):
        yield from read


class _Reading(Dataset[ReadStudy]):
    def __init__(self, studies: Sequence[StudyFiles], size: int, most: int | None, pictures: int) -> None:
        self.studies, self.size, self.most, self.pictures = studies, size, most, pictures

    def __getitem__(self, index: int) -> ReadStudy:
        return read_study(self.studies[index], self.size, self.most, pictured=index < self.pictures)
