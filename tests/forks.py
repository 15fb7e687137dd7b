"""Processes of their own that start fast: forks of a process that has imported torch and the package."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

Server = subprocess.Popen[str]
Forked = Callable[..., list[subprocess.CompletedProcess[str]]]
_EMRRG = "import sys\nfrom emrrg_cli.app import main\nsys.exit(main(sys.argv[1:]))"
# What `forked` takes as `code`, with an end that calls `main`: the launcher of `emrrg` forks its processes, too.
LAUNCHER = """
import sys
from dataclasses import replace

from torch.distributed.launcher import api

from emrrg_cli.app import main
from emrrg_cli.training import launch

config, elastic = launch._launch_config, api.elastic_launch

def run(module, package, *arguments):
    sys.exit(main(arguments))

launch._launch_config = lambda processes: replace(config(processes), start_method="fork")
api.elastic_launch = lambda config, python: elastic(config, run)
"""


@contextmanager
def _server(*modules: str) -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), *modules]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.communicate()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Server]:
    """A process that has imported torch and the package, and runs code in forks of itself."""
    with _server() as server:
        yield server


@pytest.fixture(scope="session")
def light_fork_server() -> Iterator[Server]:
    """The same with the command line alone, which imports nothing heavy."""
    with _server("emrrg_cli.app") as server:
        yield server


@pytest.fixture
def forked(fork_server: Server, tmp_path: Path) -> Forked:
    """`forked(*arguments, processes=1, code=...)`: runs `emrrg <arguments>`, or `code`, in processes of their own.

    Two or more are a group, as torchrun starts it.
    """
    return partial(run_forked, fork_server, tmp_path)


@pytest.fixture
def light_forked(light_fork_server: Server, tmp_path: Path) -> Forked:
    """`forked` where torch is not imported yet."""
    return partial(run_forked, light_fork_server, tmp_path)


def run_forked(
    server: Server, folder: Path, *arguments: str, processes: int = 1, code: str = _EMRRG
) -> list[subprocess.CompletedProcess[str]]:
    with _reserved_port() as port:
        return _run_forked(server, folder, arguments, processes, code, port)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that nobody else gets meanwhile: it is bound, but not listened to, which the process of rank 0 may do."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _run_forked(
    server: Server, folder: Path, arguments: tuple[str, ...], processes: int, code: str, port: int
) -> list[subprocess.CompletedProcess[str]]:
    rows = []
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **(variables if processes > 1 else {})}
        row = {"code": code, "arguments": arguments, "environment": environment}
        rows.append(row | {name: str(folder / f"{name}{rank}.txt") for name in ("stdout", "stderr")})
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(rows) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    texts = [[Path(str(row[name])).read_text() for name in ("stdout", "stderr")] for row in rows]
    return [
        subprocess.CompletedProcess([*arguments], code, out, err) for code, (out, err) in zip(codes, texts, strict=True)
    ]
