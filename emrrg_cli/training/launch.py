"""Starts one process a GPU, or lets a launcher that is already there have its way."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from emrrg_cli.errors import EmrrgError, Interrupted, RunError, UsageError
from emrrg_cli.signals import stop_signals

_EXPECTED = "EMRRG_NUM_PROCESSES"
_ERRORS = "EMRRG_ERRORS"  # folder that the processes leave their errors in


def inside_launcher() -> bool:
    """Whether torchrun, `accelerate launch` or this module started the process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Whether this is the only process, or the one of rank 0."""
    return not inside_launcher() or os.environ["RANK"] == "0"


def processes_wanted(requested: int | None) -> int:
    """The number of processes to start: as asked for, or every GPU, or one on a CPU and under `accelerate launch`.

    Raises:
        UsageError: for more processes than GPUs.
        RunError: when `accelerate launch` was asked for several processes and started one, as it does on a CPU.
    """
    import torch

    gpus = torch.cuda.device_count()
    if requested is None:
        if "ACCELERATE_MIXED_PRECISION" not in os.environ:
            return max(1, gpus)
        if "MASTER_ADDR" in os.environ:
            raise RunError(
                "`accelerate launch` was asked for several processes and has started only this one",
                hint="Use emrrg's own --num-processes, or torchrun.",
            )
        return 1
    if requested < 1:
        raise UsageError(f"--num-processes must be 1 or more, got {requested}")
    if gpus and requested > gpus:
        raise UsageError(f"--num-processes {requested}: there are {gpus} GPUs here")
    return requested


def processes_expected(requested: int | None) -> int:
    """What the world size is checked against: `--num-processes`, or what the launching process asked for, or 0."""
    return requested or int(os.environ.get(_EXPECTED, "0"))


def launch(arguments: Sequence[str], processes: int) -> None:
    """Runs `emrrg <arguments>` in `processes` processes of this machine and waits for them.

    Raises:
        EmrrgError: when one fails: its own message and exit code.
        Interrupted: when a signal ended them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its warnings and tracebacks speak of the launcher.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"emrrg-{os.getpid()}",
        max_restarts=0,
    )
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    with tempfile.TemporaryDirectory(prefix="emrrg-") as errors:
        try:
            passed_on = ",".join(number.name for number in stop_signals())
            variables = {_EXPECTED: str(processes), _ERRORS: errors, "OMP_NUM_THREADS": threads}
            with _environment(variables | {"TORCHELASTIC_SIGNALS_TO_HANDLE": passed_on}):
                elastic_launch(config, sys.executable)("-m", "emrrg_cli", *arguments)
        except SignalException as error:
            raise Interrupted("all processes have ended", exit_code=128 + error.sigval) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            ended = f"failed with exit code {code}" if failure.exitcode > 0 else f"was ended by signal {code - 128}"
            failed = _first_error(Path(errors)) or EmrrgError(f"process {rank} of {processes} {ended}")
            failed.exit_code = code
            raise failed from None


def tell_launcher(error: EmrrgError | Interrupted, *, expected: bool = True) -> bool:
    """Hands the error to `launch` in the parent process, which shows one for all processes.

    Args:
        expected: False for what may only follow from the error of another process, such as a lost connection.

    Returns:
        Whether there is nothing left to show here.
    """
    if not inside_launcher():
        return False
    if isinstance(error, Interrupted):  # all of them are, by the same signal
        return not is_first_process()
    if _ERRORS not in os.environ:
        return False
    row = {"expected": expected, "time": time.time(), "message": error.message, "hint": error.hint}
    try:
        (Path(os.environ[_ERRORS]) / f"{os.environ['RANK']}.json").write_text(json.dumps(row))
    except OSError:  # the disk is full, perhaps the very error
        return False
    return True


def leave_processes() -> None:
    """Ends what connects this process with the others, if anything does: its threads would not outlive the program."""
    distributed = sys.modules.get("torch.distributed")  # not imported: not used
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
