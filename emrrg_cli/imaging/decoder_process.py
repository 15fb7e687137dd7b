"""Decodes in a separate process: if a decoder crashes, hangs or needs too much memory, only one file is lost.

The process starts with the first image that needs it (half a second at most), stays for the next ones, and ends with
this process. Threads that decode at the same time get one each. It is started as a plain program, not by
`multiprocessing`, so that it works inside the daemonic workers of joblib and torch, and in scripts without a
`__main__` guard on Windows and macOS.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.imaging.base import ImageError

# CPU time, so that a busy machine does not matter; the limit by the clock is ten times as long.
_SECONDS, _PIXELS_PER_SECOND = 10, 1_000_000
_BY_THE_CLOCK = 10
_MEMORY, _MEMORY_PER_PIXEL = 512 * 2**20, 64

_START = """
import sys, json
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from emrrg_cli.imaging.decoder_worker import main
main()
"""

_idle: list[_Decoder] = []


def decode_apart(codec: str, data: bytes, where: str, pixels: int, max_pixels: int) -> NDArray[Any]:
    """Runs `codecs.decode` in another process.

    Args:
        codec: One of `codecs.CODECS`.
        data: A file or a codestream.
        where: Name of the file for messages.
        pixels: Width times height according to the data; it limits time and memory.
        max_pixels: Largest width times height.

    Raises:
        ImageError: As `codecs.decode`; broken image if the decoder crashed or did not finish; cannot be opened if no
            process could be started.
    """
    seconds = _SECONDS + pixels // _PIXELS_PER_SECOND
    request = {
        "codec": codec,
        "size": len(data),
        "max_pixels": max_pixels,
        "seconds": seconds,
        "memory": _MEMORY + _MEMORY_PER_PIXEL * pixels + 2 * len(data),
    }
    for _ in range(2):
        with _decoder(where) as decoder:
            answer = decoder.ask(request, data, seconds * _BY_THE_CLOCK)
        if isinstance(answer, np.ndarray):
            return answer
        if isinstance(answer, dict):
            raise ImageError(where, answer["reason"], answer["detail"])
        detail = _ending(answer, decoder.timed_out, seconds)
        # Ended from outside, for example because memory ran out: the image may be fine.
        if answer not in _FROM_OUTSIDE or decoder.timed_out:
            break
    raise ImageError(where, "broken image", detail)


# On POSIX, an exit status below 0 is a signal; 1 is a Python error, such as too little memory for the data.
_FROM_OUTSIDE = (-9, -15)


def _ending(status: int, timed_out: bool, seconds: int) -> str:
    if timed_out or status == -getattr(signal, "SIGXCPU", 0):
        return f"the decoder did not finish within {seconds} seconds"
    try:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status:#x}"
    except ValueError:
        name = f"signal {-status}"
    return f"the decoder crashed: {name}"


class _Decoder:
    """One process, and the two pipes to it."""

    def __init__(self) -> None:
        # Without `site`, and without threads, which it does not need.
        environment = os.environ | dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            # Ctrl-C in a terminal goes to all processes of a session; this process ends with its parent.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self.timed_out = False
        self._send(json.dumps(sys.path).encode() + b"\n")

    def ask(self, request: dict[str, Any], data: bytes, seconds: float) -> NDArray[Any] | dict[str, Any] | int:
        """Returns an array, a refusal, or the exit status of the process if it has ended."""
        timer = threading.Timer(seconds, self._time_out)
        timer.daemon = True
        timer.start()
        try:
            answer = None
            if self._send(json.dumps(request).encode() + b"\n") and self._send(data):
                answer = self._receive()
            if answer is not None:
                return answer
        finally:
            timer.cancel()
        self.end(wait=True)
        return int(self._process.returncode)

    def _time_out(self) -> None:
        self.timed_out = True
        self._process.kill()

    def _send(self, data: bytes) -> bool:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:  # it has ended
            return False
        return True

    def _receive(self) -> NDArray[Any] | dict[str, Any] | None:
        stream = self._process.stdout
        assert stream is not None
        line = stream.readline()
        if not line.endswith(b"\n"):
            return None
        answer = json.loads(line)
        if "reason" in answer:
            return dict(answer)
        values = np.empty(answer["shape"], np.dtype(answer["dtype"]))
        view = memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        at = 0
        while at < len(view) and (count := stream.readinto(view[at:])):  # type: ignore[attr-defined]
            at += count
        return values if at == len(view) else None

    @property
    def running(self) -> bool:
        """Whether the process can take another request."""
        return self._process.poll() is None

    def end(self, *, wait: bool = False) -> None:
        """Ends the process; with `wait`, it first has a moment to end by itself, which keeps its own exit status."""
        if wait:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def _decoder(where: str) -> Iterator[_Decoder]:
    """Yields an idle or new decoder for one request; after an interruption, it is not used again."""
    while True:
        try:
            decoder = _idle.pop()
        except IndexError:
            try:
                decoder = _Decoder()
            except OSError as error:
                detail = f"the decoder process cannot be started: {error.strerror or error}"
                raise ImageError(where, "cannot be opened", detail) from None
        if decoder.running:
            break
        decoder.end()
    try:
        yield decoder
    except BaseException:
        decoder.end()
        raise
    if decoder.running:
        _idle.append(decoder)


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


if hasattr(os, "register_at_fork"):
    # Pipes cannot be shared: a forked process starts its own.
    os.register_at_fork(after_in_child=_idle.clear)
