"""Chooses device and precision, and makes the `accelerate.Accelerator`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import psutil
import torch

from emrrg_cli.errors import RunError, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(requested: str, device_type: str | None = None) -> str:
    """Returns `bf16`, `fp16` or `fp32`; `auto` is bf16 on a GPU that supports it, else fp32.

    Raises:
        UsageError: for fp16 without a GPU.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "auto":
        return "bf16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if requested == "fp16" and device_type == "cpu":
        raise UsageError("train.precision=fp16 needs a GPU", hint="Use auto, bf16 or fp32 on a CPU.")
    return requested


def inference_precision(requested: str, device_type: str) -> str:
    """Returns the precision for writing reports: as in training on a GPU, else fp32, since 16 bits are slower there."""
    return choose_precision(requested, device_type) if device_type == "cuda" else "fp32"


def llm_dtype(requested: str, precision: str) -> torch.dtype:
    """Returns the dtype of a frozen LLM's weights: the requested one; for `auto` that of the precision."""
    return DTYPES[precision if requested == "auto" else requested]


def make_accelerator(precision: str, expected_processes: int, trackers: Sequence[Any] = ()) -> Any:
    """Returns the `accelerate.Accelerator` of this process.

    Args:
        precision: `bf16`, `fp16` or `fp32`.
        expected_processes: the requested number; 0: none was requested.
        trackers: from `make_trackers`; `start_trackers` starts them.

    Raises:
        RunError: if the number of processes is not the requested one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Default arguments of this module store the process group that exists at its import. If transformers imported it
    # later, they would keep the group and its threads alive until the interpreter ends.
    if torch.distributed.is_available():
        import_module("torch.distributed.nn")

    wanted = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state.get("_mixed_precision", wanted) != wanted:
        AcceleratorState._reset_state()  # an earlier command of this process; Accelerate itself refuses to change
    accelerator = Accelerator(
        mixed_precision=wanted,
        cpu=not torch.cuda.is_available(),
        log_with=list(trackers) or None,
        step_scheduler_with_optimizer=False,
    )
    if expected_processes and accelerator.num_processes != expected_processes:
        raise RunError(
            f"{expected_processes} processes were requested, but {accelerator.num_processes} started",
            hint="On a CPU, `accelerate launch` may start one process only: use --num-processes or torchrun.",
        )
    return accelerator


def fit_threads(model: torch.nn.Module, *, writing: bool = False) -> int:
    """Sets torch to as many threads as the model can use and other programs leave free; returns their number.

    A number set by the user (`OMP_NUM_THREADS`) is kept. On a GPU nothing changes.

    Args:
        model: With fewer than five million parameters, it gets at most four threads, because more wait for each other.
        writing: Whether reports are written, without training. A model below ten million parameters then gets one
            thread: steps are so short that threads mostly wait for each other, above all beside another busy program.
    """
    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return torch.get_num_threads()
    from joblib import cpu_count  # also knows the limits of a container

    parameters = sum(parameter.numel() for parameter in model.parameters())
    cores = cpu_count()
    free = cores - round(psutil.getloadavg()[0])
    useful = min(cores, 4) if parameters < 5_000_000 else cores
    if writing and parameters < 10_000_000:
        useful = 1
    # At least a quarter of the cores on a busy machine: other programs may end soon.
    torch.set_num_threads(max(1, min(useful, max(free, cores // 4))))
    return torch.get_num_threads()


def slowdown_advice(seconds_per_step: float, busy: float) -> str | None:
    """Returns advice if other programs slow down the steps; None if they do not.

    Args:
        seconds_per_step: Mean over recent steps.
        busy: CPU seconds that this process used per second, over all threads.
    """
    load, cores = psutil.getloadavg()[0], os.cpu_count() or 1
    if torch.cuda.is_available() or seconds_per_step < 2 or busy > 0.7 or load < 1.5 * cores:
        return None
    return (
        f"Steps are slow ({seconds_per_step:.1f} s) because other programs use the processor (load {load:.0f} on "
        f"{cores} cores). Wait for them, or continue later with --resume."
    )


def choose_device(name: str) -> torch.device:
    """Returns the device of a name; `auto` is a GPU if there is one.

    Raises:
        UsageError: for a device that is unknown or does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UsageError(f"unknown device {name!r}", hint="Use auto, cpu, cuda, cuda:1 or mps.") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        raise UsageError(f"there is no device {name!r} here")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"there is no device {name!r} here: {torch.cuda.device_count()} GPUs")
    return device
