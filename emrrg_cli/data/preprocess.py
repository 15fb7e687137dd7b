"""Raw data to a dataset directory: the work behind `emrrg preprocess`, whatever the source."""

from __future__ import annotations

import platform
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import joblib
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from emrrg_cli.console import err
from emrrg_cli.data.dataset_dir import EncodedImage, new_dataset
from emrrg_cli.data.image_notes import INVERTED, image_notes
from emrrg_cli.data.images import ImageError, encode, fit_shorter_side, is_plain_jpeg, load_image, to_grey
from emrrg_cli.data.study import Account, HasColumns, ImageProblem, RenderedImage, Study, StudySource, printable
from emrrg_cli.errors import RunError
from emrrg_cli.recipe.schema import PreprocessRecipe
from emrrg_cli.signals import interrupted_by

# joblib hands results over in order but goes on dispatching while they wait, so the studies in flight are bounded by
# feeding it blocks: at most this many studies for each worker are held in memory.
_STUDIES_PER_WORKER = 32

# Views in which bright lungs are no sign of an inverted film.
SIDEWAYS = ("LATERAL", "L", "LL", "RL")

# A file is kept as it is only while it is not much larger than its raw pixels (it may carry anything beside them).
_KEPT_OVERHEAD = 16 * 1024


@dataclass(frozen=True)
class PreparedStudy:
    """A study whose images were tried: `images` and `views` are those that can be used, `problems` the others.

    `notes` are pairs of an image's name and what should be said about it.
    """

    study: Study
    images: tuple[EncodedImage, ...]
    views: tuple[str, ...]
    problems: tuple[ImageProblem, ...]
    notes: tuple[tuple[str, str], ...] = ()


def preprocess(
    source: StudySource,
    out: Path,
    recipe: PreprocessRecipe,
    *,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Decodes, shrinks and writes every usable study of `source`.

    The directory's Parquet files are the same for any number of workers. Memory does not grow with the number of
    studies.

    Args:
        source: Studies to read.
        out: Dataset directory to make; see `new_dataset`.
        recipe: Image size and format, shard size, workers.
        overwrite: Replace a dataset directory at `out`.
        options: Of the command, recorded in the manifest beside the recipe.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: `out` cannot be used.
        RunError: No study is usable (nothing is written), the disk refuses, or a worker process died.
        Interrupted: SIGTERM.
    """
    started = time.monotonic()
    account = Account()
    described = source if isinstance(source, HasColumns) else None
    workers = _workers(recipe.workers, len(source))
    with (
        # Of a scheduler, for example: it cleans up as Ctrl-C does, and leaves no process behind.
        interrupted_by(signal.SIGTERM, message=lambda: "terminated; nothing was written"),
        new_dataset(
            out,
            studies_per_shard=recipe.studies_per_shard,
            overwrite=overwrite,
            protect=source.root,
            columns=described.columns if described else None,
            about=described.about if described else None,
        ) as writer,
        _progress() as progress,
    ):
        task = progress.add_task("preprocess", total=len(source), skipped=0, rate=0.0)
        images = 0
        for prepared in _prepare_all(source.studies(account), source.root, recipe, workers):
            if prepared.images:
                writer.add(prepared.study, prepared.images, prepared.views)
                for problem in prepared.problems:
                    account.drop_image(prepared.study.study_id, problem)
                for name, note in prepared.notes:
                    account.note_image(prepared.study.study_id, name, note)
            else:
                _skip(prepared, account)
            images += len(prepared.images)
            progress.update(
                task,
                completed=writer.studies + account.studies_skipped,
                skipped=account.studies_skipped,
                rate=images / (time.monotonic() - started),
            )
        progress.update(task, completed=account.read, skipped=account.studies_skipped)
        if not writer.studies:
            raise _nothing_usable(source, account)
        return writer.finish(
            {
                "emrrg": version("emrrg"),
                "python": platform.python_version(),
                "libraries": {name: version(name) for name in ("datasets", "pyarrow", "pillow", "numpy", "joblib")},
                "source": source.name,
                "root": None if source.root is None else printable(str(source.root)),
                "recipe": recipe.model_dump(),
                "options": options or {},
                "studies_read": account.read,
                "studies_written": writer.studies,
                "studies_skipped": account.studies_skipped,
                "skipped": account.as_dict(),
                "notes": account.notes_as_dict(),
                "remarks": account.remarks,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - started, 2),
            }
        )


def prepare_study(study: Study, root: Path | None, recipe: PreprocessRecipe) -> PreparedStudy:
    """Decodes (or renders) and encodes the images of one study. Runs in a worker process.

    An image that is already what would be written (a grey baseline JPEG, upright, not above the size, and JPEG is asked
    for) keeps its bytes, so that it is not compressed twice; it is decoded all the same, to know that it can be.
    """
    images: list[EncodedImage] = []
    views: list[str] = []
    problems = list(study.problems)
    notes: list[tuple[str, str]] = []
    sources: tuple[Path | RenderedImage, ...] = (*study.image_paths, *study.rendered)
    for image, view in zip(sources, study.views, strict=True):
        name = _name(image, root)
        try:
            with warnings.catch_warnings():
                # Pillow warns about odd metadata; an image either decodes or is reported.
                warnings.simplefilter("ignore")
                data, about = _encoded(image, recipe) if isinstance(image, Path) else (_rendered(image, recipe), ())
        except ImageError as error:
            problems.append(ImageProblem(name, error.reason, error.detail))
        except OSError as error:  # a network share that comes and goes
            problems.append(ImageProblem(name, "cannot be opened", error.strerror or str(error)))
        else:
            images.append(EncodedImage(name, data))
            views.append(view)
            notes += [(name, note) for note in about if note != INVERTED or view not in SIDEWAYS]
    return PreparedStudy(study, tuple(images), tuple(views), tuple(problems), tuple(notes))


def _name(image: Path | RenderedImage, root: Path | None) -> str:
    if not isinstance(image, Path):
        return image.name
    return printable((image if root is None else image.relative_to(root)).as_posix())


def _rendered(image: RenderedImage, recipe: PreprocessRecipe) -> bytes:
    if recipe.size == "original":
        raise ValueError("a rendered image has no original size")
    return encode(image.render(recipe.size), recipe.format, recipe.quality)


def _encoded(path: Path, recipe: PreprocessRecipe) -> tuple[bytes, tuple[str, ...]]:
    """The bytes to write, and notes about the image."""
    image = load_image(path, recipe.max_pixels)
    fits = recipe.size == "original" or min(image.size) <= recipe.size
    small = path.stat().st_size <= image.width * image.height + _KEPT_OVERHEAD
    if recipe.format == "jpeg" and fits and small and is_plain_jpeg(image):
        return path.read_bytes(), image_notes(image)
    grey = to_grey(image)
    notes = image_notes(grey)
    if recipe.size != "original":
        grey = fit_shorter_side(grey, recipe.size)
    return encode(grey, recipe.format, recipe.quality), notes


def _prepare_all(
    studies: Iterator[Study], root: Path | None, recipe: PreprocessRecipe, workers: int
) -> Iterator[PreparedStudy]:
    """`prepare_study` over all studies, in their order, in `workers` processes (joblib's backend of the moment)."""
    task = joblib.delayed(prepare_study)
    # The backend is left to `joblib.parallel_config`: loky by default.
    with joblib.Parallel(n_jobs=workers, return_as="generator", pre_dispatch="2*n_jobs") as parallel:
        while block := list(islice(studies, workers * _STUDIES_PER_WORKER)):
            try:
                yield from parallel(task(study, root, recipe) for study in block)
            except BrokenProcessPool:
                raise RunError(
                    "a decoding process was ended by the system, most often for want of memory",
                    hint="Use fewer processes (--workers 1) or a lower max_pixels.",
                ) from None


def _workers(asked: int | None, studies: int) -> int:
    """Processes to use. A process takes about half a second to start, so a handful of studies gets one."""
    return max(1, min(asked or joblib.cpu_count(), studies // 32))


def _skip(prepared: PreparedStudy, account: Account) -> None:
    if prepared.problems:
        first = prepared.problems[0]
        account.skip_study(first.reason, prepared.study.study_id, path=first.path, detail=first.detail)
    else:
        account.skip_study("no image listed", prepared.study.study_id)


def _nothing_usable(source: StudySource, account: Account) -> RunError:
    lines = [f"none of the {account.read:,} studies in {source.root} can be used, so nothing was written:"]
    for reason, entry in account.skipped.items():
        example = entry.examples[0]
        first = ", ".join(filter(None, (example["id"], example.get("path"), example.get("detail"))))
        lines.append(f"  {reason}: {entry.counted()}, first: {first}")
    looked_in = ", ".join(printable(str(folder)) for folder in source.image_folders)
    return RunError("\n".join(lines), hint=f"Images were looked for in: {looked_in}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.completed:,}/{task.total:,} studies"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[rate]:.0f} images/s, {task.fields[skipped]:,} skipped,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=err,
    )
