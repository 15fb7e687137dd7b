"""A stop signal to a training in two processes: a checkpoint, the exit code, and an exact continuation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from emrrg_cli.errors import Interrupted
from emrrg_cli.training import launch
from emrrg_cli.training.stop_request import SharedStop
from tests.forks import LAUNCHER

# 20 steps, with noise. No validation and no checkpoint before the end.
OPTIONS = ("model.encoder.depth=3", "model.encoder.drop_path=0.9", "train.trackers=[]", "train.select=loss",
           "train.epochs=10", "train.validate_every_epochs=10", "train.checkpoint_every_steps=20")  # fmt: skip


# After some steps, the first process sends the launcher a signal, and each waits until the launcher has passed it on:
# however slow they are, they get it in this step.
SIGNALLED = """
import os
import signal
import time

from emrrg_cli.training import loop

step = loop._Loop._optimizer_step

def signalled(self, *arguments):
    if self.progress.step == {after}:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.{name})
        end = time.monotonic() + 200
        while not self.stop.number and time.monotonic() < end:
            time.sleep(0.01)
    return step(self, *arguments)

loop._Loop._optimizer_step = signalled
"""


def _signalled(*arguments: str, folder: Path, after: int, name: str) -> subprocess.CompletedProcess[str]:
    """Starts two processes from the command line, which Python itself prepares for the signal as they start."""
    folder.mkdir()
    code = SIGNALLED.format(after=after, name=name).replace("\n", "\n    ")
    (folder / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n    {code}")
    paths = [str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "emrrg_cli", *arguments, "--num-processes", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_signals_stop_two_processes_and_nothing_is_lost(
    tiny_overrides: tuple[str, ...], tmp_path: Path, run_of: Any, forked: Any
) -> None:
    run = tmp_path / "run"
    whole, stopped = run_of(tmp_path / "whole"), run_of(run)
    command = ("finetune", "tiny/finetune", *tiny_overrides, *OPTIONS, "--output")
    undisturbed = forked(*command, str(whole.directory), processes=2)
    assert [process.returncode for process in undisturbed] == [0, 0], undisturbed
    for name, after in (("SIGUSR1", 2), ("SIGHUP", 9)):
        if name == "SIGUSR1":  # torch by itself would not pass it on
            process = _signalled(*command, str(run), folder=tmp_path / "site", after=after, name=name)
            assert process.stdout == ""
            assert "Warning" not in process.stderr
        else:
            code = LAUNCHER + SIGNALLED.format(after=after, name=name) + "sys.exit(main(sys.argv[1:]))"
            (process,) = forked(*command, str(run), "--resume", "--num-processes", "2", code=code)
        assert process.returncode == 128 + signal.Signals[name], process.stderr
        # One step tells it to the other process, the next one reads it. The second process may get it a step earlier,
        # when the first one is already there.
        reached = stopped.last_step()
        assert reached in (after + 2, after + 3), process.stderr
        assert f"stopped at step {reached} of 20" in process.stderr
    rest = forked(*command, str(run), "--resume", processes=2)
    assert [process.returncode for process in rest] == [0, 0], rest
    for key in ("train/loss", "validation/loss"):
        assert stopped.series(key) == whole.series(key)
    for name, tensor in whole.weights.items():
        assert torch.equal(stopped.weights[name], tensor), name
    for name, tensor in whole.exported.items():
        assert torch.equal(stopped.exported[name], tensor), name


def test_torch_gets_our_signals_and_time_to_save() -> None:
    from torch.distributed.launcher.api import LaunchConfig

    config = launch._launch_config(2)
    if hasattr(config, "signals_to_handle"):  # newer versions of torch
        assert config.signals_to_handle == "SIGINT,SIGTERM,SIGHUP,SIGUSR1"
    if hasattr(config, "shutdown_timeout"):
        assert config.shutdown_timeout == 600
    assert isinstance(config, LaunchConfig)


@pytest.mark.parametrize(("exit_code", "expected"), [(-15, 143), (138, 138)])
def test_processes_stopped_from_outside_are_not_an_error(
    monkeypatch: pytest.MonkeyPatch, exit_code: int, expected: int
) -> None:
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ChildFailedError("emrrg", {1: failure})

    monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", fail)
    with pytest.raises(Interrupted, match="all processes have ended") as caught:
        launch.launch(["finetune"], 2)
    assert caught.value.exit_code == expected


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_before_the_processes_start_ends_the_launch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", lambda *a, **k: os.kill(os.getpid(), number))
    number = signal.Signals[name]
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        launch.launch(["finetune"], 2)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    assert os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE") is None


def test_a_shared_signal_is_read_one_step_later() -> None:
    shared = SharedStop()
    signals = [0.0, 15.0, 15.0, 0.0]
    assert [shared.exchange(torch.tensor(number)) for number in signals] == [0, 0, 15, 15]
