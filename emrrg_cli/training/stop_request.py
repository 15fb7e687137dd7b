"""Ctrl-C and other stop signals during a training: the first one asks the loop to save a checkpoint and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from emrrg_cli.console import err
from emrrg_cli.signals import stop_signals
from emrrg_cli.training.launch import inside_launcher


@dataclass
class StopRequest:
    """The number of the first stop signal that arrived; 0 if none has."""

    number: int = 0


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Record the first stop signal, so that the loop can check for it between steps. The second ends the program.

    Under a launcher the second does nothing: the same Ctrl-C arrives from the terminal and from the launcher, and the
    launcher ends processes that take too long.
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
