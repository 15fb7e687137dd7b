"""The signals that ask the program to stop, as exceptions that say where the finished work is.

SIGINT (Ctrl-C, exit code 130), SIGTERM (143), and where the system has them SIGHUP (a lost terminal, 129) and SIGUSR1
(Slurm's warning before the time is up, 138).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from emrrg_cli.errors import Interrupted


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask the program to stop, without those that it was started to ignore, as `nohup` does."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    found = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return tuple(number for number in found if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def interrupted_by(*signals: signal.Signals, message: Callable[[], str]) -> Iterator[None]:
    """In the block, each signal of `stop_signals` raises `Interrupted` with what `message` returns at that moment.

    Args:
        signals: Others that do so too; for callers from before `stop_signals`.

    Raises:
        Interrupted: with exit code 128 + the signal's number.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(message(), exit_code=128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in {*stop_signals(), *signals}}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
