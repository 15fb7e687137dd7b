"""The order of the data: which examples make up an epoch, a batch, and the share of a process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.errors import UsageError


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
        dataset: a `FollowsEpochs` dataset is notified of each new epoch.
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
    """Refuse a batch size that does not fit. Fast, so it is called before models are loaded.

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
