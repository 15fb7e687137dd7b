"""The images of stage 1, from one or several data sets, without studies that are kept for validation or test."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.image_dataset import (
    FolderImages,
    FolderSplit,
    ImageSource,
    JoinedImages,
    SplitImages,
    split_folder,
)
from emrrg_cli.datasets.manifest import is_dataset_dir
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.records import read_bounded
from emrrg_cli.recipe.pretraining import PretrainRecipe
from emrrg_cli.training.heartbeat import beating, wait_for
from emrrg_cli.training.run_setup import Session

IMAGES = "images.json"
_IU_UID = re.compile(r"CXR\d+(?=_|$)")


def check_roots(recipe: PretrainRecipe) -> list[Path]:
    """Returns the folders that a recipe names. It is called before anything is written.

    Raises:
        UsageError: The recipe names no folder, or a folder does not exist.
    """
    named = {"data.root": recipe.data.root} if recipe.data.root is not None else {}
    named |= {f"data.sets[{number}].root": one.root for number, one in enumerate(recipe.data.sets)}
    if not named:
        raise UsageError(
            "data.root is not set",
            hint="Set data.root=DIR to a dataset directory, as `emrrg preprocess` writes, or to a folder of images. "
            "For several data sets, use data.sets.",
        )
    for key, root in named.items():
        if not Path(root).is_dir():
            raise UsageError(f"{key}={root}: " + ("not a folder" if Path(root).exists() else "no such folder"))
    return [Path(root) for root in named.values()]


def open_images(
    recipe: PretrainRecipe, roots: Sequence[Path], session: Session
) -> tuple[ImageSource, ImageSource | None]:
    """Opens the images for training and for validation; the second is None if there are none for validation.

    Each data set has its own validation images: a dataset directory has a split for them, a folder a part of its files.

    Raises:
        UsageError: An image belongs to a held-out study, or the images have changed since the run was started.
        RunError: The images cannot be read.
    """
    opened = [open_dataset(root) if is_dataset_dir(root) else None for root in roots]
    for root, splits in zip(roots, opened, strict=True):
        if splits is not None and "train" not in splits:
            raise RunError(f"{root}: this dataset directory has no split named train")
    listed = _folder_splits(
        [root for root, splits in zip(roots, opened, strict=True) if splits is None], recipe, session
    )
    held_out = held_out_ids(recipe.data.held_out)
    limit = recipe.data.limit
    training: list[ImageSource] = []
    validation: list[ImageSource] = []
    for root, splits in zip(roots, opened, strict=True):
        if splits is not None:
            refuse_held_out(root, _ids_of(splits["train"]), held_out)
            training.append(SplitImages(splits["train"], limit))
            if "validation" in splits:
                validation.append(SplitImages(splits["validation"], limit))
        else:
            split = listed[root]
            refuse_held_out(root, ((name, parts_of(name)) for name in (*split.train, *split.validation)), held_out)
            training.append(FolderImages(root, split.train[:limit]))
            if split.validation:
                validation.append(FolderImages(root, split.validation[:limit]))
    return _joined(training), _joined(validation) if validation else None


def _joined(sources: Sequence[ImageSource]) -> ImageSource:
    return sources[0] if len(sources) == 1 else JoinedImages(sources)


def held_out_ids(directories: Iterable[str]) -> dict[str, str]:
    """Returns the ids of the validation and test studies of dataset directories, each with its directory."""
    found: dict[str, str] = {}
    for directory in directories:
        splits = open_dataset(directory)
        for name in ("validation", "test"):
            if name in splits:
                for _, ids in _ids_of(splits[name]):
                    found |= dict.fromkeys(ids, directory)
    return found


def _ids_of(split: Any) -> Iterator[tuple[str, set[str]]]:
    # each study with the ids of the study and of its patient
    for study, patient, source in zip(split["study_id"], split["patient_id"], split["source"], strict=True):
        yield study, _with_uids({study}) | ({f"patient {patient} of {source}"} if patient else set())


def parts_of(name: str) -> set[str]:
    """Returns the parts of a path that may be study ids: its folders and the file name without suffix."""
    path = Path(name)
    return _with_uids({*path.parent.parts, path.stem})


def _with_uids(ids: set[str]) -> set[str]:
    # IU X-Ray names start with the report number: CXR2384_IM-0942 for a study, CXR2384_IM-0942-1001 for an image.
    return ids | {match[0] for name in ids if (match := _IU_UID.match(name))}


def refuse_held_out(root: Path, named: Iterable[tuple[str, set[str]]], held_out: dict[str, str]) -> None:
    """Checks that a data set has no study that is kept for validation or test.

    Args:
        named: Each image or study with its possible ids.
        held_out: As `held_out_ids` returns them.

    Raises:
        UsageError: It has some. The message has their number and the first name.
    """
    if not held_out:
        return
    found = [(name, study) for name, ids in named for study in ids if study in held_out]
    if found:
        name, study = found[0]
        raise UsageError(
            f"{root}: {len(found):,} of its images or studies are kept for validation or test in {held_out[study]}; "
            f"the first is {printable(name)}",
            hint="Remove them from the training data: scores on studies that were used in training are not valid.",
        )


def _folder_splits(roots: Sequence[Path], recipe: PretrainRecipe, session: Session) -> dict[Path, FolderSplit]:
    """Returns the images that each folder had when the run was started; a resumed run ignores files added later."""
    if not roots:
        return {}
    record = session.run_dir / IMAGES
    if session.accelerator.is_main_process and not (session.resume and record.is_file()):
        with beating(session.run_dir / f"{IMAGES}.working"):
            made = [asdict(split_folder(root, recipe.data.validation, workers=recipe.data.workers)) for root in roots]
        content: Any = made[0] if recipe.data.root is not None else made
        atomic_write_text(record, json.dumps(content, indent=1) + "\n")  # ASCII: a name may not be valid UTF-8
    # Not a barrier: barriers time out after some minutes, and a large folder may take longer.
    wait_for(record, session.run_dir / f"{IMAGES}.working")
    try:
        content = json.loads(read_bounded(record, 2**30))
        rows = [content] if isinstance(content, dict) else content
        splits = {root: FolderSplit(**row) for root, row in zip(roots, rows, strict=True)}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{record}, the list of this run's images, cannot be read: {error}") from error
    for root, split in splits.items():
        if session.resume and (changed := split.changed(root)):
            raise UsageError(
                f"{len(changed)} images of {root} were removed or changed in size since {session.run_dir} was started; "
                f"the first is {printable(changed[0])}",
                hint="Restore these files, or start a new run with another --output.",
            )
    return splits
