"""Loads batches in other processes; the parent process handles their signals, errors and random numbers."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from emrrg_cli.errors import EmrrgError


def load_batches(
    dataset: Dataset[Any],
    batches: Iterable[Sequence[Any]],
    collate: Callable[[Sequence[Any]], Any],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Yields the batches of a dataset in the given order, without empty ones.

    Args:
        batches: indices of the examples of each batch; read on demand, so the iterable may be endless.
        collate: joins examples into a batch.
        workers: number of reading processes; 0: this process reads.
        pin_memory: whether batches are in page-locked memory, for a GPU.

    Raises:
        EmrrgError: the unchanged error of reading an example.
    """
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsExamples(dataset),
        batch_sampler=(list(batch) for batch in batches if batch),
        collate_fn=partial(_join, collate),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        # Spawned processes, the default in some processes, would first import torch, one after another.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    # Workers are seeded from a separate generator, so that the training state does not change.
    loader.generator = torch.Generator()
    with _signals_held():  # until the new processes ignore them
        iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, EmrrgError):
                raise batch
            yield batch
    finally:
        # An error refers to its traceback and so to the iterator; the program would wait for its processes at exit.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


@contextmanager
def _signals_held() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _ErrorsAsExamples(Dataset[Any]):
    """Returns errors as examples, because torch would put the traceback of the other process into their message."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except EmrrgError as error:
            return error


def _join(collate: Callable[[Sequence[Any]], Any], examples: Sequence[Any]) -> Any:
    failed = next((example for example in examples if isinstance(example, EmrrgError)), None)
    return collate(examples) if failed is None else failed


def _leave_signals_to_parent(worker: int) -> None:
    """Ignores Ctrl-C, which a terminal sends to these processes too: training needs them until its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
