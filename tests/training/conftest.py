"""Short real runs of `finetune`, what they leave behind, and processes that start fast."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Run:
    """A run directory, read as it is now; `summary` is None after a run in another process."""

    directory: Path
    summary: Any = None

    @property
    def history(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.directory / "history.jsonl").read_text().splitlines()]

    def series(self, key: str) -> list[float]:
        return [row[key] for row in self.history if key in row]

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoints" / (self.directory / "checkpoints" / "last").read_text().strip()

    @property
    def weights(self) -> dict[str, Any]:
        """Trained parameters at the last checkpoint."""
        from safetensors.torch import load_file

        return load_file(self.checkpoint / "trainable.safetensors")

    @property
    def exported(self) -> dict[str, Any]:
        """Every tensor under `model/`, by file and name."""
        from safetensors.torch import load_file

        files = sorted((self.directory / "model").rglob("*.safetensors"))
        return {f"{file.name}:{name}": t for file in files for name, t in load_file(file).items()}

    def last_step(self) -> int:
        return int(self.checkpoint.name.removeprefix("step-"))


@pytest.fixture(autouse=True)
def quick_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a few bytes as `curve.png`: drawing takes a third of a tiny run. `tiny_run` has a real one."""
    from emrrg_cli.files.atomic import atomic_write_bytes
    from emrrg_cli.training import run_setup

    monkeypatch.setattr(run_setup, "plot_curves", lambda history, path: atomic_write_bytes(path, b"a curve"))


@pytest.fixture
def finetune(tiny_overrides: tuple[str, ...], tmp_path: Path) -> Callable[..., Run]:
    """Runs `finetune` in this process; `train.select` is `loss` unless said otherwise, so that nothing is generated."""
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.training.finetune import run_finetune

    def run(name: str, *overrides: str, resume: bool = False) -> Run:
        changes = [*tiny_overrides, "train.trackers=[]", "train.select=loss", *overrides]
        recipe = load_recipe("tiny/finetune", changes, stage="finetune")
        summary = run_finetune(recipe, tmp_path / name, resume=resume, expected_processes=0)
        return Run(tmp_path / name, summary)

    return run


@pytest.fixture(scope="session")
def run_of() -> type[Run]:
    """`Run`, for directories that other processes made."""
    return Run


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Over all tensors of two models with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture
def difference() -> Callable[[dict[str, Any], dict[str, Any]], float]:
    return largest_difference


Server = subprocess.Popen[str]
_EMRRG = "import sys\nfrom emrrg_cli.app import main\nsys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Server]:
    """A process that has imported torch and the package, and runs code in forks of itself."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    command = [sys.executable, str(Path(__file__).parent / "fork_server.py")]
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
