"""Processes of their own that start fast: forks of a process that has imported torch and the package."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Server = subprocess.Popen[str]
_EMRRG = "import sys\nfrom emrrg_cli.app import main\nsys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Server]:
    """A process that has imported torch and the package, and runs code in forks of itself."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.communicate()


@pytest.fixture
def forked(fork_server: Server, tmp_path: Path) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """`forked(*arguments, processes=1, code=...)`: runs `emrrg <arguments>`, or `code`, in processes of their own.

    Two or more are a group, as torchrun starts it.
    """

    def run(*arguments: str, processes: int = 1, code: str = _EMRRG) -> list[subprocess.CompletedProcess[str]]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        rows = []
        for rank in range(processes):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            variables = {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
            environment = {**os.environ, **(variables if processes > 1 else {})}
            row = {"code": code, "arguments": arguments, "environment": environment}
            rows.append(row | {name: str(tmp_path / f"{name}{rank}.txt") for name in ("stdout", "stderr")})
        assert fork_server.stdin is not None
        assert fork_server.stdout is not None
        fork_server.stdin.write(json.dumps(rows) + "\n")
        fork_server.stdin.flush()
        codes = json.loads(fork_server.stdout.readline())
        texts = [[Path(str(row[name])).read_text() for name in ("stdout", "stderr")] for row in rows]
        return [
            subprocess.CompletedProcess([*arguments], code, out, err)
            for code, (out, err) in zip(codes, texts, strict=True)
        ]

    return run
