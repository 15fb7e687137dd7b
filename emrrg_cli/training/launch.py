"""Starts one process per GPU, unless another launcher, such as torchrun, has started this process."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from emrrg_cli.console import counted
from emrrg_cli.errors import EmrrgError, Interrupted, RunError, UsageError
from emrrg_cli.signals import stop_signals

_EXPECTED = "EMRRG_NUM_PROCESSES"
_ERRORS = "EMRRG_ERRORS"  # folder where the processes write their errors
# After a stop signal, processes that have not ended in this time are killed. torch's own limit, 30 s, is less than some
# models need to finish a step and save a checkpoint.
_SECONDS_TO_SAVE = 600


def inside_launcher() -> bool:
    """Whether torchrun, `accelerate launch` or this module started the process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Whether this is the only process, or the process of rank 0."""
    return not inside_launcher() or os.environ["RANK"] == "0"


def processes_wanted(requested: int | None) -> int:
    """Returns the number of processes to start.

    This is `requested`, else one per GPU, else (on a CPU or under `accelerate launch`) 1.

    Raises:
        UsageError: `requested` is larger than the number of GPUs.
        RunError: `accelerate launch` should start several processes but started one, as it does on a CPU.
    """
    if requested is not None and requested < 1:  # before torch is imported
        raise UsageError(f"--num-processes must be 1 or more, got {requested}")
    import torch

    gpus = torch.cuda.device_count()
    if requested is None:
        if "ACCELERATE_MIXED_PRECISION" not in os.environ:
            return max(1, gpus)
        if "MASTER_ADDR" in os.environ:
            raise RunError(
                "`accelerate launch` should start several processes, but it started only this one",
                hint="Use emrrg's own --num-processes, or torchrun.",
            )
        return 1
    if gpus and requested > gpus:
        raise UsageError(f"--num-processes {requested}: this computer has {counted(gpus, 'GPU')}")
    return requested


def processes_expected(requested: int | None) -> int:
    """Returns the expected world size: `--num-processes`, else the number that the parent process set, else 0."""
    return requested or int(os.environ.get(_EXPECTED, "0"))


def launch(arguments: Sequence[str], processes: int) -> None:
    """Runs `emrrg <arguments>` in several processes on this computer and waits for them.

    Raises:
        EmrrgError: A process failed. The error has the message and exit code of that process.
        Interrupted: A stop signal arrived. The processes get the same signal and time to save a checkpoint.
    """
    from joblib import cpu_count
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # The warnings and tracebacks of torch's launcher do not help the user.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // processes)))
    with tempfile.TemporaryDirectory(prefix="emrrg-") as errors:
        variables = {_EXPECTED: str(processes), _ERRORS: errors, "OMP_NUM_THREADS": threads}
        try:
            # torch sets the last variable and does not restore it.
            with _environment(variables | {"TORCHELASTIC_SIGNALS_TO_HANDLE": ""}), _signals_raise(SignalException):
                elastic_launch(_launch_config(processes), sys.executable)("-m", "emrrg_cli", *arguments)
        except SignalException as error:
            raise Interrupted("all processes have ended", exit_code=128 + error.sigval) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            if code - 128 in stop_signals():  # the signal was sent to the processes, not to this one
                raise Interrupted("all processes have ended", exit_code=code) from None
            ended = f"failed with exit code {code}" if failure.exitcode > 0 else f"was ended by signal {code - 128}"
            failed = _first_error(Path(errors)) or EmrrgError(f"process {rank} of {processes} {ended}")
            failed.exit_code = code
            raise failed from None


def _launch_config(processes: int) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    newer: dict[str, Any] = {
        "signals_to_handle": ",".join(number.name for number in stop_signals()),
        "shutdown_timeout": _SECONDS_TO_SAVE,
    }
    known = {field.name for field in fields(LaunchConfig)}  # torch 2.6 has neither
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"emrrg-{os.getpid()}",
        max_restarts=0,
        **{name: value for name, value in newer.items() if name in known},
    )


@contextmanager
def _signals_raise(exception: Any) -> Iterator[None]:
    """Makes each stop signal in the block raise torch's `SignalException`, even before torch starts the processes."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise exception(f"received signal {number}", signal.Signals(number))

    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell_launcher(error: EmrrgError | Interrupted, *, expected: bool = True) -> bool:
    """Passes the error to `launch` in the parent process, which prints one message for all processes.

    Args:
        expected: False if the error of another process may have caused this one, such as a lost connection.

    Returns:
        True if this process does not print the error itself.
    """
    if not inside_launcher():
        return False
    if isinstance(error, Interrupted):  # the same signal stops all processes
        return not is_first_process()
    if _ERRORS not in os.environ:
        return False
    row = {"expected": expected, "time": time.time(), "message": error.message, "hint": error.hint}
    try:
        (Path(os.environ[_ERRORS]) / f"{os.environ['RANK']}.json").write_text(json.dumps(row))
    except OSError:  # for example, the disk is full
        return False
    return True


def leave_processes() -> None:
    """Closes the process group, if there is one: its threads must end before the program ends."""
    distributed = sys.modules.get("torch.distributed")  # None if nothing has imported it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _first_error(folder: Path) -> EmrrgError | None:
    rows = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    if not rows:
        return None
    first = min(rows, key=lambda row: (not row["expected"], row["time"]))
    return EmrrgError(first["message"], hint=first["hint"])


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
