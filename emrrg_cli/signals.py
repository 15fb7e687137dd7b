"""Ctrl-C and a scheduler's stop (SIGTERM) as exceptions that say what has become of the work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from emrrg_cli.errors import Interrupted


@contextmanager
def interrupted_by(*signals: signal.Signals, message: Callable[[], str]) -> Iterator[None]:
    """In the block, each of the signals raises `Interrupted` with what `message` returns at that moment.

    Raises:
        Interrupted: with exit code 128 + the signal's number.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(message(), exit_code=128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
