"""Batches read by other processes, which leave signals, errors and random numbers to the one that they work for."""

from __future__ import annotations

import signal
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
    """The batches of a dataset in the order given; those without examples are left out.

    Args:
        batches: indices of the examples of each; read as they are needed, so that there may be any number.
        collate: joins examples into a batch.
        workers: processes that read; 0: this one.
        pin_memory: batches in page-locked memory, for a GPU.

    Raises:
        EmrrgError: what reading an example raised, as it was raised.
    """
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsExamples(dataset),
        batch_sampler=(list(batch) for batch in batches if batch),
        collate_fn=partial(_join, collate),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
    )
    # Workers seed themselves from torch's generator: give them one that is not part of the training state.
    loader.generator = torch.Generator()
    with _signals_held():  # until the new processes ignore them
        iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, EmrrgError):
                raise batch
            yield batch
    finally:
        # An error holds its traceback, that the iterator, and at its end the program would wait for these processes.
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
    """Errors as examples: torch would put the traceback of the other process into their message."""

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
    """A terminal sends Ctrl-C to these processes too; the training must outlive it to write its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
