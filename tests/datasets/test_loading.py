"""Batches from other processes: in order, with their errors, and with no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.errors import RunError
from emrrg_cli.imaging.base import ImageError


class Numbers(Dataset[Any]):
    """The index, its process and how that one takes signals; an error at the index given."""

    def __init__(self, broken: int = -1, error: Exception | None = None) -> None:
        self.broken, self.error = broken, error

    def __getitem__(self, index: int) -> Any:
        if index == self.broken and self.error is not None:
            raise self.error
        ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
        return index, os.getpid(), ignored, torch.rand(1).item()


def reading_processes() -> list[Any]:
    """This process's children, without those that joblib keeps for its next call."""
    return [child for child in multiprocessing.active_children() if "loky" not in type(child).__module__]


def have_ended() -> bool:
    """Whether no reading process is left, after the time that a busy machine may need."""
    end = time.monotonic() + 120
    while reading_processes() and time.monotonic() < end:
        time.sleep(0.05)
    return not reading_processes()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert have_ended()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_their_order_without_empty_ones(workers: int) -> None:
    batches = load_batches(Numbers(), [[3, 1], [], [2], [0, 4, 5]], list, workers=workers)
    assert [[example[0] for example in batch] for batch in batches] == [[3, 1], [2], [0, 4, 5]]


def test_other_processes_read_and_ignore_signals() -> None:
    (batch,) = load_batches(Numbers(), [[0]], list, workers=1)
    assert batch[0][1] != os.getpid()
    assert batch[0][2] == [True, True]
    (batch,) = load_batches(Numbers(), [[0]], list)
    assert batch[0][1:3] == (os.getpid(), [False, False])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_raised_after_the_batches_before_it(workers: int) -> None:
    error = RunError("study s1: image 1 is broken", hint="look at it")
    seen = []
    with pytest.raises(RunError) as caught:  # noqa: PT012
        for batch in load_batches(Numbers(2, error), [[0, 1], [2, 3], [4]], list, workers=workers):
            seen.append(len(batch))
    assert seen == [2]
    assert (caught.value.message, caught.value.hint) == ("study s1: image 1 is broken", "look at it")
    assert caught.value.exit_code == 1


def test_an_error_with_several_arguments_is_passed_on() -> None:
    with pytest.raises(ImageError) as caught:
        list(load_batches(Numbers(0, ImageError("a.png", "broken image", "cut")), [[0]], list, workers=1))
    assert (caught.value.where, caught.value.reason, caught.value.detail) == ("a.png", "broken image", "cut")


def test_processes_end_when_the_reader_stops_or_is_interrupted() -> None:
    batches = load_batches(Numbers(), [[number] for number in range(50)], list, workers=2)
    next(batches)
    assert reading_processes()
    batches.close()  # type: ignore[attr-defined]
    assert have_ended()

    class Interrupts(Numbers):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                os.kill(os.getppid(), signal.SIGINT)
                time.sleep(0.2)
            return index

    kept = []
    try:
        for _ in load_batches(Interrupts(), [[number] for number in range(50)], list, workers=1):
            pass
    except KeyboardInterrupt as error:
        kept.append(error)  # as the program keeps it until its end, with its traceback and all that it refers to
    assert kept
    assert have_ended()


def test_the_random_state_of_this_process_is_unchanged() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(load_batches(Numbers(), [[0], [1]], list, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start processes anew")
def test_processes_are_forks_whatever_the_default() -> None:
    class Unpicklable(Numbers):
        def __reduce__(self) -> str:
            raise TypeError("pickled")

    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        batches = load_batches(Unpicklable(), [[0], [1]], list, workers=1)
        assert [example[0] for batch in batches for example in batch] == [0, 1]
    finally:
        multiprocessing.set_start_method(before, force=True)
