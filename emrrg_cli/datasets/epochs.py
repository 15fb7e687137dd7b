"""The order of the data: the examples of an epoch, of a batch, and of each process."""

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
    """A data set that chooses the examples of an epoch by its own rule."""

    @property
    def epoch_length(self) -> int:
        """Number of examples in an epoch, the same for all epochs."""

    def draw_epoch(self, generator: torch.Generator) -> Tensor:
        """Draws the indices of an epoch's examples in order, int64 `[epoch_length]`, only from the generator."""


@runtime_checkable
class FollowsEpochs(Protocol):
    """A data set whose examples change in each epoch, for example by random crops."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0; called before an example is loaded."""


class Epochs(Dataset[Any]):
    """The examples of a data set by epoch and index, so that the same loading processes serve all epochs.

    Args:
        dataset: if it is a `FollowsEpochs`, `set_epoch` is called for each new epoch.
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
    """Returns the number of examples in an epoch, by the data set's own rule if it has one."""
    return dataset.epoch_length if isinstance(dataset, DrawsEpoch) else len(dataset)  # type: ignore[arg-type]


def check_batch(batch_size: int, processes: int, examples: int | None = None) -> None:
    """Refuse a batch size that does not fit. It is fast, so it is called before models are loaded.

    Args:
        batch_size: `train.batch_size`.
        processes: number of processes that share a batch.
        examples: number of examples in an epoch; None: not known yet.

    Raises:
        UsageError: if the processes cannot share the batch evenly, or the split has less than one batch.
    """
    if batch_size % processes:
        fewer = next(n for n in range(min(processes, batch_size), 0, -1) if batch_size % n == 0)
        below = batch_size // processes * processes
        sizes = f"{below} or {below + processes}" if below else str(processes)
        raise UsageError(
            f"train.batch_size={batch_size} does not divide among {processes} processes",
            hint="It is the number of examples of an optimizer step over all processes: "
            f"use --num-processes {fewer}, or train.batch_size={sizes}.",
        )
    if examples is not None and examples < batch_size:
        largest = examples // processes * processes
        fits = f"train.batch_size={largest or examples}"
        remedy = fits if largest else f"--num-processes {examples} and {fits}"
        raise UsageError(
            f"the training split has {examples} usable examples, fewer than train.batch_size={batch_size}",
            hint=f"The largest possible setting is {remedy}." if examples else None,
        )


class EpochOrder:
    """The examples of each micro-batch of this process. The global batches do not depend on the number of processes.

    An epoch is a permutation drawn from `(seed, epoch)` and cut into global batches; an incomplete last batch is
    dropped. Process `r` of `w` takes every `w`-th example of a global batch, in micro-batches.

    Args:
        length: number of examples in an epoch.
        batch_size: number of examples of an optimizer step, over all processes.
        micro_batch_size: number of examples of one forward pass on one process; None: its whole share of a batch.
        draw: draws the examples of an epoch (`DrawsEpoch.draw_epoch`); None: a permutation of `range(length)`.

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
        """Yields the micro-batches of an epoch in order, starting at optimizer step `first_step`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = self.draw(generator)
        for step in range(first_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = batch[self.rank :: self.world_size].tolist()
            for start in range(0, len(share), self.micro_batch_size):
                yield share[start : start + self.micro_batch_size]

    def places(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yields the micro-batches for `Epochs` from a step of an epoch on, for any number of epochs."""
        for number in count(epoch):
            for batch in self.epoch(number, first_step if number == epoch else 0):
                yield [(number, index) for index in batch]

    def _permutation(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.length, generator=generator)


def evaluation_batches(length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Returns the batches of this process. The batches of all processes cover `range(length)` once; some may be empty.

    Every process gets the same number of batches, so that processes can synchronize after each.
    """
    mine = list(range(length))[rank::world_size]
    share = math.ceil(length / world_size)
    count = math.ceil(share / batch_size)
    even = math.ceil(share / max(1, count))  # 33 in batches of 17 and 16, not of 32 and 1
    return [mine[i * even : (i + 1) * even] for i in range(count)]
