"""Starts one process a GPU, or lets a launcher that is already there have its way."""

from __future__ import annotations

import logging
import os
import sys

from emrrg_cli.errors import EmrrgError, Interrupted, UsageError

_EXPECTED = "EMRRG_NUM_PROCESSES"


def inside_launcher() -> bool:
    """Whether torchrun, `accelerate launch` or this module started the process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def processes_wanted(requested: int | None) -> int:
    """The number of processes to start: as asked for, or every GPU, or one on a CPU.

    Raises:
        UsageError: for more processes than GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    if requested is None:
        return max(1, gpus)
    if requested < 1:
        raise UsageError(f"--num-processes must be 1 or more, got {requested}")
    if gpus and requested > gpus:
        raise UsageError(f"--num-processes {requested}: there are {gpus} GPUs here")
    return requested


def processes_expected(requested: int | None) -> int:
    """What the world size is checked against: `--num-processes`, or what the launching process asked for, or 0."""
    return requested or int(os.environ.get(_EXPECTED, "0"))


def launch(arguments: list[str], processes: int) -> None:
    """Runs `emrrg <arguments>` in `processes` processes of this machine and waits for them.

    Raises:
        EmrrgError: when one fails, with its exit code; it has printed its own message.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its warnings and tracebacks speak of the launcher; the failing process prints what went wrong itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[_EXPECTED] = str(processes)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"emrrg-{os.getpid()}",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "emrrg_cli", *arguments)
    except SignalException as error:
        raise Interrupted("stopped; each process has put its work in safety", exit_code=128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        failed = EmrrgError(f"process {rank} of {processes} failed with exit code {code}; its message is above")
        failed.exit_code = code
        raise failed from None
