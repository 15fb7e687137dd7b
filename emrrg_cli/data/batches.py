"""From a dataset directory to the batches of a stage: examples, collation, and the order of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.data.images import ImageError, read_image, resize_square
from emrrg_cli.data.report_text import clean_report, cleaning_for, select_section
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.recipe.schema import DataSettings

IGNORE = -100  # label of a position that carries no loss


@dataclass(frozen=True)
class Example:
    """One study as the model sees it: `pixels` is uint8 `[views, size, size]`, grey."""

    index: int
    study_id: str
    pixels: Tensor
    report: str


@dataclass
class Batch:
    """Several studies.

    `pixels`: uint8 `[n, size, size]`, all views one after the other; `views`: int64 `[b]`, views of each study, summing
    to `n`; `labels`: int64 `[b, t]`, report tokens, padded with `IGNORE` (None where reports are to be written).
    """

    indices: list[int]
    study_ids: list[str]
    pixels: Tensor
    views: Tensor
    reports: list[str]
    labels: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader: page-locked tensors, so that the copy to a GPU overlaps with work."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        labels = None if self.labels is None else function(self.labels)
        return replace(self, pixels=function(self.pixels), views=function(self.views), labels=labels)


class ReportDataset(Dataset[Example]):
    """Studies of one split with their cleaned reports.

    Args:
        split: a `datasets.Dataset` with the columns of a dataset directory, images not decoded.
        settings: section, cleaning, number of views, limit.
        image_size: side in pixels that images are resized to.

    Raises:
        RunError: when no study of the split has the text that `settings.section` asks for; on access to a study, when
            it has no images or one that cannot be read.
    """

    def __init__(self, split: Any, settings: DataSettings, image_size: int) -> None:
        self.split = split
        self.image_size = image_size
        self.max_views = settings.max_views
        columns = ("findings", "impression", "report", "source")
        texts = split.select_columns(list(columns))
        self.rows: list[int] = []
        self.reports: list[str] = []
        for row, record in enumerate(texts):
            text = select_section(record, settings.section)
            if not text.strip():
                continue
            self.rows.append(row)
            self.reports.append(clean_report(text, cleaning_for(record["source"] or "", settings.cleaning)))
            if settings.limit is not None and len(self.rows) == settings.limit:
                break
        self.without_text = 0 if settings.limit is not None else len(split) - len(self.rows)
        if not self.rows:
            raise RunError(
                f"no study of the {split.split} split has text for data.section={settings.section}",
                hint="Look at the columns of the dataset directory, or choose another section.",
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def study_ids(self) -> list[str]:
        """The ids of the studies, in order."""
        column = self.split["study_id"]
        return [column[row] for row in self.rows]

    def __getitem__(self, index: int) -> Example:
        record = self.split[self.rows[index]]
        images = record["images"][: self.max_views]
        if not images:
            raise RunError(f"study {record['study_id']} has no images")
        try:
            views = [read_image(image["bytes"] or image["path"]) for image in images]
        except ImageError as error:
            raise RunError(f"study {record['study_id']}: {error}") from error
        pixels = [torch.from_numpy(resize_square(view, self.image_size)) for view in views]
        return Example(index, record["study_id"], torch.stack(pixels), self.reports[index])


def collate(examples: Sequence[Example], encode: Callable[[str], list[int]] | None = None) -> Batch:
    """Joins examples into a batch; `encode` turns a report into label tokens, None leaves labels out."""
    labels = None
    if encode is not None:
        tokens = [torch.tensor(encode(example.report)) for example in examples]
        labels = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=IGNORE)
    return Batch(
        indices=[example.index for example in examples],
        study_ids=[example.study_id for example in examples],
        pixels=torch.cat([example.pixels for example in examples]),
        views=torch.tensor([len(example.pixels) for example in examples]),
        reports=[example.report for example in examples],
        labels=labels,
    )


@runtime_checkable
class DrawsEpoch(Protocol):
    """A data set that has its own rule for which examples make up an epoch."""

    @property
    def epoch_length(self) -> int:
        """Examples of an epoch, the same for all epochs."""

    def draw_epoch(self, generator: torch.Generator) -> Tensor:
        """Indices of the examples of an epoch in order, int64 `[epoch_length]`; random by the generator alone."""


@runtime_checkable
class FollowsEpochs(Protocol):
    """A data set whose examples are others in each epoch, as with random crops."""

    def set_epoch(self, epoch: int) -> None:
        """Called before an example of an epoch, counted from 0, is loaded."""


class Epochs(Dataset[Any]):
    """The examples of a data set by epoch and index, so that one set of loading processes serves all epochs.

    Args:
        dataset: it is told of another epoch where its examples follow epochs (`FollowsEpochs`).
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset
        self._follows = dataset if isinstance(dataset, FollowsEpochs) else None

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        if self._follows is not None:
            self._follows.set_epoch(epoch)
        return self._dataset[index]


def epoch_length(dataset: Dataset[Any]) -> int:
    """The examples of an epoch, by the data set's own rule where it has one."""
    return dataset.epoch_length if isinstance(dataset, DrawsEpoch) else len(dataset)  # type: ignore[arg-type]


def check_batch(batch_size: int, processes: int, examples: int | None = None) -> None:
    """Refuses a batch that the training could not be cut into; quick, so that it is asked before models are loaded.

    Args:
        batch_size: `train.batch_size`.
        processes: those that share a batch.
        examples: of an epoch; None: not known yet.

    Raises:
        UsageError: when the batch does not divide among the processes, or the split holds less than one batch.
    """
    if batch_size % processes:
        fewer = next(n for n in range(min(processes, batch_size), 0, -1) if batch_size % n == 0)
        below = batch_size // processes * processes
        sizes = f"{below} or {below + processes}" if below else str(processes)
        raise UsageError(
            f"train.batch_size={batch_size} does not divide among {processes} processes",
            hint="It counts the examples of an optimizer step over all processes: "
            f"take --num-processes {fewer}, or train.batch_size={sizes}.",
        )
    if examples is not None and examples < batch_size:
        largest = examples // processes * processes
        fits = f"train.batch_size={largest or examples}"
        remedy = fits if largest else f"--num-processes {examples} and {fits}"
        raise UsageError(
            f"the training split has {examples} usable examples, fewer than train.batch_size={batch_size}",
            hint=f"The largest that will do: {remedy}." if examples else None,
        )


class EpochOrder:
    """Which examples make up each micro-batch of this process, the same data whatever the number of processes.

    An epoch is a permutation drawn from `(seed, epoch)`, cut into global batches; a tail too short for one is left
    out. Process `r` of `w` takes every `w`-th example of a global batch, in micro-batches.

    Args:
        length: examples in an epoch.
        batch_size: examples of an optimizer step, over all processes.
        micro_batch_size: examples of one forward pass on one process; None: all of the process's share.
        draw: the examples of an epoch (`DrawsEpoch.draw_epoch`); None: a permutation of `range(length)`.

    Raises:
        UsageError: as `check_batch`.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        draw: Callable[[torch.Generator], Tensor] | None = None,
    ) -> None:
        check_batch(batch_size, world_size, length)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.draw = draw or self._permutation
        share = batch_size // world_size
        self.micro_batch_size = min(micro_batch_size or share, share)
        self.micro_batches_per_step = math.ceil(share / self.micro_batch_size)
        self.steps_per_epoch = length // batch_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[int]]:
        """The micro-batches of an epoch in order, from optimizer step `first_step` of it on."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = self.draw(generator)
        for step in range(first_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = batch[self.rank :: self.world_size].tolist()
            for start in range(0, len(share), self.micro_batch_size):
                yield share[start : start + self.micro_batch_size]

    def places(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """The micro-batches from a place in an epoch on, epoch after epoch without end, as `Epochs` takes them."""
        for number in count(epoch):
            for batch in self.epoch(number, first_step if number == epoch else 0):
                yield [(number, index) for index in batch]

    def _permutation(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.length, generator=generator)


def evaluation_batches(length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Batches of this process that together cover `range(length)` once; some may be empty.

    Every process gets the same number of batches, so that they may meet after each.
    """
    mine = list(range(length))[rank::world_size]
    share = math.ceil(length / world_size)
    count = math.ceil(share / batch_size)
    even = math.ceil(share / max(1, count))  # 33 in batches of 17 and 16, not of 32 and 1
    return [mine[i * even : (i + 1) * even] for i in range(count)]
