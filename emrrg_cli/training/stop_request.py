"""Ctrl-C and other stop signals during a training: the first one asks the loop to save a checkpoint and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.console import err
from emrrg_cli.signals import stop_signals
from emrrg_cli.training.launch import inside_launcher


@dataclass
class StopRequest:
    """The number of the first stop signal that arrived; 0 if none has."""

    number: int = 0


class SharedStop:
    """The stop signal that any of several processes received, read one step late.

    Reading the value of the current step would wait for the GPU in every step; the value of the previous step is
    already available. All processes read the same value at the same step, so they stop together.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._copied: Any = None

    def exchange(self, number: Tensor) -> int:
        """Stores the signal of this step and returns the signal of the previous step.

        Args:
            number: Scalar on the device, equal in all processes; 0 if there was no signal.
        """
        if self._copied is not None:
            self._copied.synchronize()
        last = 0 if self._last is None else int(self._last)
        self._last = number.to("cpu", non_blocking=True)
        if number.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return last


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Records the first stop signal, so that the loop can check for it between steps. The second ends the program.

    Under a launcher, the second signal does nothing: the same Ctrl-C arrives from the terminal and from the launcher,
    and the launcher ends processes that take too long.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def record(number: int, frame: Any) -> None:
        if not inside_launcher():
            for watched_number, handler in before.items():
                signal.signal(watched_number, handler)
            err.print("Finishing this step and saving a checkpoint. Press Ctrl-C again to quit now.")
        stop.number = stop.number or number

    for number in before:
        signal.signal(number, record)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
