"""Decodes and encodes the images of a study. Runs in worker processes, so it has few imports."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emrrg_cli.imaging.base import EncodedImage, ImageError
from emrrg_cli.imaging.jpeg import without_metadata
from emrrg_cli.imaging.notes import INVERTED, image_notes
from emrrg_cli.imaging.raster import encode, fit_shorter_side, is_plain_jpeg, to_grey
from emrrg_cli.imaging.read import load_image
from emrrg_cli.imaging.views import projection
from emrrg_cli.ingest.duplicates import ImageHash, hash_image
from emrrg_cli.ingest.study import ImageProblem, RenderedImage, Study, image_name
from emrrg_cli.recipe.preprocessing import PreprocessRecipe

# A file is kept unchanged only if it is not much larger than its raw pixels (it may contain other data).
_KEPT_OVERHEAD = 16 * 1024


@dataclass(frozen=True)
class PreparedImages:
    """The images of a study: usable `images` with their `views`, and `problems` of the others.

    `notes` are pairs of an image's name and a note about it; `hashes` are the hashes of the images if duplicates are
    searched.
    """

    images: tuple[EncodedImage, ...]
    views: tuple[str, ...]
    problems: tuple[ImageProblem, ...]
    notes: tuple[tuple[str, str], ...] = ()
    hashes: tuple[ImageHash, ...] = ()


def prepare_studies(
    studies: Sequence[Study], root: Path | None, recipe: PreprocessRecipe
) -> tuple[list[PreparedImages], float]:
    """Runs `prepare_study` for several studies; also returns the seconds it took."""
    _leave_ctrl_c_to_parent()
    started = time.perf_counter()
    return [prepare_study(study, root, recipe) for study in studies], time.perf_counter() - started


def _leave_ctrl_c_to_parent() -> None:
    """Ignores Ctrl-C, which a terminal sends to worker processes too; the parent process ends them."""
    is_worker = multiprocessing.current_process().name != "MainProcess"
    if is_worker and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def prepare_study(study: Study, root: Path | None, recipe: PreprocessRecipe) -> PreparedImages:
    """Decodes (or renders) and encodes the images of one study.

    If JPEG is requested, an upright grey baseline JPEG that is not too large keeps its bytes without the metadata, so
    that it is not compressed twice. It is decoded only to check that it can be.
    """
    images: list[EncodedImage] = []
    views: list[str] = []
    problems = list(study.problems)
    notes: list[tuple[str, str]] = []
    hashes: list[ImageHash] = []
    sources: tuple[Path | RenderedImage, ...] = (*study.image_paths, *study.rendered)
    for image, view in zip(sources, study.views, strict=True):
        name = image_name(image, root)
        try:
            with warnings.catch_warnings():
                # Pillow warns about odd metadata; an image either decodes or is reported.
                warnings.simplefilter("ignore")
                encoded = _from_file(image, recipe) if isinstance(image, Path) else _rendered(image, recipe)
        except ImageError as error:
            problems.append(ImageProblem(name, error.reason, error.detail))
        except OSError as error:  # for example a network share that is not always reachable
            problems.append(ImageProblem(name, "cannot be opened", error.strerror or str(error)))
        else:
            images.append(EncodedImage(name, encoded.data))
            views.append(view)
            # In lateral views, bright lungs do not mean that the film is inverted.
            sideways = projection(view) == "lateral"
            notes += [(name, note) for note in encoded.notes if note != INVERTED or not sideways]
            hashes += encoded.hashes
    return PreparedImages(tuple(images), tuple(views), tuple(problems), tuple(notes), tuple(hashes))


@dataclass(frozen=True)
class _Encoded:
    data: bytes
    notes: tuple[str, ...] = ()
    hashes: tuple[ImageHash, ...] = ()


def _rendered(image: RenderedImage, recipe: PreprocessRecipe) -> _Encoded:
    if recipe.size == "original":
        raise ValueError("a rendered image has no original size")
    grey = image.render(recipe.size)
    data = encode(grey, recipe.format, recipe.quality)
    return _Encoded(data, (), () if recipe.dedupe == "off" else (hash_image(grey, data),))


def _from_file(path: Path, recipe: PreprocessRecipe) -> _Encoded:
    image = load_image(path, recipe.max_pixels, None if recipe.size == "original" else recipe.size)
    fits = recipe.size == "original" or min(image.size) <= recipe.size
    small = path.stat().st_size <= image.width * image.height + _KEPT_OVERHEAD
    plain = recipe.format == "jpeg" and fits and small and is_plain_jpeg(image)
    kept = without_metadata(path.read_bytes()) if plain else None
    if kept is not None:
        grey, data = image, kept
    else:
        grey = to_grey(image)
        if recipe.size != "original":
            grey = fit_shorter_side(grey, recipe.size)
        data = encode(grey, recipe.format, recipe.quality)
    return _Encoded(data, image_notes(grey), () if recipe.dedupe == "off" else (hash_image(grey, data),))
