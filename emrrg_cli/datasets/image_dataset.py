"""Images without reports for stage 1, from a dataset directory or any folder, cropped at random or whole."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.console import err, printable, progress_bar
from emrrg_cli.datasets.splits import draw_splits
from emrrg_cli.datasets.stored_images import stored_image
from emrrg_cli.errors import RunError
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.image_paths import find_images
from emrrg_cli.imaging.raster import to_grey
from emrrg_cli.imaging.read import load_image

RATIO = (3 / 4, 4 / 3)  # of width to height of a random crop
Box = tuple[float, float, float, float]


@dataclass
class ImageBatch:
    """A batch of images: `pixels` is uint8 `[b, size, size]`, grey."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> ImageBatch:
        """Returns the same batch with its tensor on `device`."""
        return ImageBatch(self.pixels.to(device, non_blocking=True))

    def pin_memory(self) -> ImageBatch:
        """Returns page-locked tensors, so that copies to a GPU overlap with computation; the DataLoader calls it."""
        return ImageBatch(self.pixels.pin_memory())


def collate_images(examples: Sequence[Tensor]) -> ImageBatch:
    """Joins images of one size into a batch."""
    return ImageBatch(torch.stack(list(examples)))


class ImageSource(Protocol):
    """Encoded images by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | Path:
        """Returns the file or the bytes of an image."""

    def name(self, index: int) -> str:
        """Returns the name of an image for error messages."""


class SplitImages:
    """Every view of every study of a split of a dataset directory; reports are not read.

    Args:
        split: a `datasets.Dataset` from `open_dataset`.
        limit: number of images to use from the start; None: all.
    """

    def __init__(self, split: Any, limit: int | None = None) -> None:
        self._split, self._limit = split, limit
        self._images: Any = None
        if not len(self):
            raise RunError(f"the {split.split} split has no images")

    def _table(self) -> Any:
        # The memory-mapped column itself, with all views in sequence: other columns are not read.
        if self._images is None:
            import pyarrow as pa

            lists = self._split.with_format("arrow")[:].column("images")
            images = [chunk.flatten() for chunk in lists.chunks]
            self._images = pa.chunked_array(images, type=lists.type.value_type)[: self._limit]
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}  # the receiving process opens it again

    def __len__(self) -> int:
        return len(self._table())

    def read(self, index: int) -> bytes | Path:
        """Returns the bytes of an image."""
        return stored_image(self._table()[index].as_py(), self._split, self.name(index))

    def name(self, index: int) -> str:
        """Returns the name of the image in the raw data."""
        image = self._table()[index].as_py() or {}
        return f"{printable(str(image.get('path') or f'image {index}'))} of the {self._split.split} split"


class FolderImages:
    """Files below a folder.

    Args:
        root: the folder.
        names: paths of the files, relative to it.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, list(names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Path:
        """Returns the file of an image."""
        return self._root / self._names[index]

    def name(self, index: int) -> str:
        """Returns the path of an image."""
        return str(self.read(index))


class JoinedImages:
    """The images of several sources in sequence."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = list(sources)
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> bytes | Path:
        """Returns the file or the bytes of an image."""
        source, own = self._place(index)
        return source.read(own)

    def name(self, index: int) -> str:
        """Returns the name that the source gives the image."""
        source, own = self._place(index)
        return source.name(own)

    def _place(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class Augmentation:
    """A random crop of `scale` (smallest and largest fraction of the area), mirrored with probability 0.5 if `flip`."""

    scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True


class ImageDataset(Dataset[Tensor]):
    """Images as squares, uint8 `[size, size]`, grey.

    The augmentation of an image depends only on the seed, the epoch and the index of the image.

    Args:
        source: source of the images.
        image_size: side of the square in pixels.
        augmentation: random crops; None: the whole image, resized without keeping its aspect ratio.
        seed: random seed of the augmentation.

    Raises:
        RunError: on access to an image that cannot be read.
    """

    def __init__(
        self, source: ImageSource, image_size: int, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.source, self.image_size, self.augmentation, self.seed = source, image_size, augmentation, seed
        self.epoch = 0
        # A JPEG may be decoded at half its size or less if no crop must then be enlarged.
        self._enough = None
        if augmentation is not None:
            self._enough = math.ceil(image_size / math.sqrt(augmentation.scale[0] * RATIO[0]))

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the crops of an epoch, counted from 0."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Tensor:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about odd metadata
                image = to_grey(load_image(self.source.read(index), enough=self._enough))
        except ImageError as error:
            detail = f" ({error.detail})" if error.detail else ""
            raise RunError(f"{self.source.name(index)}: {error.reason}{detail}") from error
        return torch.from_numpy(self._square(image, index))

    def _square(self, image: Image.Image, index: int) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        if self.augmentation is None:
            return np.array(image.resize(size, Image.Resampling.BICUBIC))
        rng = np.random.default_rng([self.seed, self.epoch, index])
        box = random_box(rng, image.width, image.height, self.augmentation.scale)
        mirrored = self.augmentation.flip and rng.random() < 0.5
        square = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
        return np.array(square[:, ::-1] if mirrored else square)


def random_box(rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> Box:
    """Draws a crop: a fraction of the area, uniform in `scale`, and an aspect ratio, log-uniform from 3:4 to 4:3.

    If ten draws do not fit into the image, returns the largest centre crop with an aspect ratio of at most 4:3.

    Returns:
        Left, top, right, bottom in pixels, not rounded, for Pillow's `resize`.

    Source: the random resized crop of Szegedy et al., Going deeper with convolutions (arXiv 1409.4842), section 6.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for part, shape, across, down in rng.random((10, 4)).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * part)
        ratio = math.exp(low + (high - low) * shape)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = (width - w) * across, (height - h) * down
            return left, top, left + w, top + h
    w, h = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class FolderSplit:
    """The images of a folder, by their relative paths, and the reasons why other files are skipped.

    `sizes` are the file sizes in bytes, training then validation; empty in records of older versions.
    """

    train: list[str]
    validation: list[str]
    left_out: dict[str, int]
    sizes: list[int] = field(default_factory=list)

    def changed(self, root: Path) -> list[str]:
        """Returns the images that are missing from `root` or have another size now."""
        names = [*self.train, *self.validation]
        return [name for name, size in zip(names, self.sizes, strict=False) if _size(root / name) != size]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def split_folder(root: Path, validation: float, *, workers: int = 0) -> FolderSplit:
    """Finds the images below a folder. Every file is decoded once, so that training gets only readable images.

    Prints one line on stderr with the number of skipped files and the reasons.

    Args:
        root: the folder; files and folders that begin with a dot are ignored.
        validation: fraction of the images for validation, chosen by a hash of their paths.
        workers: number of decoding processes.

    Raises:
        UsageError: the folder does not exist or has no files.
        RunError: none of the files is an image.
    """
    files = find_images([str(root)])
    names = [file.relative_to(root).as_posix() for file in files]
    reasons: list[str | None] = []
    with progress_bar("checking images", len(files)) as advance:
        # A process takes about half a second to start.
        jobs = max(1, min(workers, len(files) // 256))
        parallel = joblib.Parallel(n_jobs=jobs, return_as="generator")
        for reason in parallel(joblib.delayed(_problem)(file) for file in files):
            reasons.append(reason)
            advance(1)
    good = [name for name, reason in zip(names, reasons, strict=True) if reason is None]
    left_out = Counter(reason for reason in reasons if reason is not None)
    if left_out:
        shown = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        first = next(name for name, reason in zip(names, reasons, strict=True) if reason is not None)
        line = f"{root}: {left_out.total():,} of {len(files):,} files are skipped: {shown}; first: {printable(first)}"
        if not good:
            raise RunError(line, hint="Name a folder of PNG, JPEG or DICOM files, or a dataset directory.")
        err.print(line, markup=False, soft_wrap=True)
    split = draw_splits(good, (1 - validation, validation, 0.0), seed=0)
    training = [name for name in good if split[name] == "train"]
    validating = [name for name in good if split[name] == "validation"]
    sizes = [(root / name).stat().st_size for name in (*training, *validating)]
    return FolderSplit(training, validating, dict(left_out), sizes)


def _problem(file: Path) -> str | None:
    """Returns why a file cannot be decoded as an image; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            to_grey(load_image(file, enough=1))
    except ImageError as error:
        return error.reason
    return None
