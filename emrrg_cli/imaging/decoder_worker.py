"""The process that `decoder_process` starts: reads requests from stdin until it ends, writes arrays to stdout.

A request is a line of JSON (`codec`, `size`, `max_pixels`, `seconds`, `memory`) and `size` bytes. An answer is a line
of JSON and the bytes of an array: `dtype` and `shape`, or `reason` and `detail` and no bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.codecs import decode


def main() -> None:
    """Answers requests until there are no more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the output of C libraries must not mix with the answers
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["size"])
        if len(data) < request["size"]:
            return
        _limit(request["seconds"], request["memory"])
        content: Any = b""
        try:
            values = decode(request["codec"], data, request["max_pixels"])
            content = values.reshape(-1).data if values.flags.c_contiguous else values.tobytes()
            answer = {"dtype": values.dtype.str, "shape": values.shape}
        except ImageError as error:
            answer = {"reason": error.reason, "detail": error.detail}
        del data
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.write(content)
        answers.flush()


def _limit(seconds: int, memory: int) -> None:
    """Ends this process if one image needs too much time or memory; not on Windows."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, hard))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
