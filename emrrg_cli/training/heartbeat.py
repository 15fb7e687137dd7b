"""One process writes a file while the others wait for it, and a heartbeat shows that it is still running."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from emrrg_cli.errors import RunError


@contextlib.contextmanager
def beating(file: Path, every_s: float = 2.0) -> Iterator[None]:
    """Touches a file repeatedly while the block runs, then removes it."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                file.touch()
            ended.wait(every_s)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        file.unlink(missing_ok=True)


def wait_for(file: Path, heartbeat: Path, patience_s: float = 60.0) -> None:
    """Waits until a file exists.

    Args:
        heartbeat: File that the writing process touches with `beating`.
        patience_s: Longest time without a touch, in seconds. It is measured on this computer, because the clock of a
            network share may differ.

    Raises:
        RunError: The writing process no longer touches `heartbeat`.
    """
    last, since = -1, time.monotonic()
    while not file.is_file():
        try:
            beat = heartbeat.stat().st_mtime_ns
        except OSError:
            beat = 0
        if beat != last:
            last, since = beat, time.monotonic()
        elif time.monotonic() - since > patience_s:
            raise RunError(
                f"{file}: the first process of this run did not write this file and no longer responds",
                hint="Read the message of that process, then start the run again.",
            )
        time.sleep(0.2)
