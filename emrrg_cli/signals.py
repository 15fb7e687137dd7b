"""Turns the signals that ask the program to stop into exceptions that name the place of the finished work.

SIGINT (Ctrl-C, exit code 130), SIGTERM (143), and where the system has them SIGHUP (a lost terminal, 129) and SIGUSR1
(Slurm's warning before the time is up, 138).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from emrrg_cli.errors import Interrupted


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask the program to stop, except those that it ignores from its start (`nohup`)."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    found = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return tuple(number for number in found if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def interrupted_by(*signals: signal.Signals, message: Callable[[], str]) -> Iterator[None]:
    """In the block, each signal of `stop_signals` raises `Interrupted` with what `message` returns at that moment.

    Args:
        signals: Further signals that do so.

    Raises:
        Interrupted: with exit code 128 + the signal's number.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(message(), exit_code=128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python receives signals only in the main thread
        yield
        return
    before = {number: signal.signal(number, stop) for number in {*stop_signals(), *signals}}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def interrupted_in_imports() -> Iterator[None]:
    """In the block, Ctrl-C while a module is imported ends the process at once, with exit code 130.

    Elsewhere it raises `KeyboardInterrupt`, as always. C extensions that import Python modules turn that exception into
    others, which have nothing to do with it, or abort. Commands that have work to save replace this handler.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_globals.get("__name__") == "importlib._bootstrap":
                with suppress(OSError):  # a closed stderr
                    os.write(2, b"interrupted\n")
                os._exit(128 + number)
            frame = frame.f_back
        raise KeyboardInterrupt

    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # keep the handler of a caller
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
