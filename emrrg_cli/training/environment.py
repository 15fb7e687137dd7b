"""The machine a run happens on: precision, processes, and what is recorded about it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files import atomic_write_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("emrrg", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def choose_precision(requested: str, device_type: str | None = None) -> str:
    """`bf16`, `fp16` or `fp32`; `auto` is bf16 on a GPU that has it, else fp32.

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
    """The precision to write reports in: that of the training on a GPU, fp32 elsewhere, where half is slower."""
    return choose_precision(requested, device_type) if device_type == "cuda" else "fp32"


def llm_dtype(requested: str, precision: str) -> torch.dtype:
    """The dtype of a frozen LLM's weights: as requested, or that of the precision."""
    return DTYPES[precision if requested == "auto" else requested]


def make_accelerator(precision: str, expected_processes: int, run_dir: Path | None = None, trackers: Any = ()) -> Any:
    """`accelerate.Accelerator` for this process.

    Args:
        precision: `bf16`, `fp16` or `fp32`.
        expected_processes: the number asked for; 0 when nobody asked.

    Raises:
        UsageError: for a tracker that is not installed.
        RunError: when the number of processes is not the one asked for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    for tracker in trackers:
        package = {"tensorboard": "tensorboard", "wandb": "wandb"}[tracker]
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UsageError(
                f"train.trackers names {tracker}, which is not installed",
                hint=f"pip install {package}, or take it out of train.trackers.",
            ) from None
    wanted = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state.get("_mixed_precision", wanted) != wanted:
        AcceleratorState._reset_state()  # an earlier command of this process; Accelerate itself refuses to change
    accelerator = Accelerator(
        mixed_precision=wanted,
        cpu=not torch.cuda.is_available(),
        log_with=list(trackers) or None,
        project_dir=None if run_dir is None else str(run_dir),
        step_scheduler_with_optimizer=False,
    )
    if expected_processes and accelerator.num_processes != expected_processes:
        raise RunError(
            f"{expected_processes} processes were asked for, {accelerator.num_processes} are there",
            hint="On a CPU, `accelerate launch` may start one process only: use --num-processes or torchrun.",
        )
    return accelerator


def record_environment(run_dir: Path, accelerator: Any, precision: str, scan: str) -> None:
    """Writes `environment.json`: versions, git revision, device, processes, command."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    device = accelerator.device
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_revision": git_revision(Path(__file__).parent),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "processes": accelerator.num_processes,
        "precision": precision,
        "scan": scan,
    }
    atomic_write_text(run_dir / "environment.json", json.dumps(record, indent=2) + "\n")


def git_revision(directory: Path) -> str | None:
    """The commit that the program runs from, with `-dirty` where files differ from it; None outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
