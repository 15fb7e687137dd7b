"""The trackers of a run, and its record of versions, device, processes and data (`environment.json`)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.records import read_record
from emrrg_cli.versions import installed_versions

ENVIRONMENT = "environment.json"
PACKAGES = ("emrrg", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def make_trackers(names: Sequence[str], run_dir: Path, recipe: Mapping[str, Any]) -> list[Any]:
    """Returns the trackers of a run: TensorBoard writes to `run_dir/tracking`, W&B to a run of its project `emrrg`.

    Args:
        names: `tensorboard`, `wandb`.
        run_dir: Its last part is the name of the run in W&B.
        recipe: The configuration that W&B shows.
    """
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    made = []
    for name in names:
        if name == "tensorboard":
            made.append(TensorBoardTracker("tracking", str(run_dir)))
        else:
            made.append(WandBTracker("emrrg", name=run_dir.resolve().name, dir=str(run_dir), config=dict(recipe)))
    return made


def start_trackers(accelerator: Any) -> None:
    """Starts the trackers of an accelerator.

    Raises:
        RunError: A tracker does not start, most often W&B without a login or a network.
    """
    try:
        accelerator.init_trackers("emrrg")
    except Exception as error:  # each tracker raises its own errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"train.trackers: a tracker does not start: {reason}",
            hint="For W&B, run `wandb login` or set WANDB_MODE=offline. Or remove the tracker from train.trackers.",
        ) from error


def record_environment(
    run_dir: Path, accelerator: Any, precision: str, scan: str, data: Mapping[str, str] | None = None
) -> None:
    """Writes `environment.json`: versions, git revision, device, processes, command, data.

    The record of the first start is kept. Each resume adds its own record to the list `resumed`.

    Args:
        data: The fingerprint of each dataset directory.

    Raises:
        RunError: An existing record cannot be read.
    """
    device = accelerator.device
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": installed_versions(PACKAGES),
        "git_revision": git_revision(Path(__file__).parent) or "none: an installed release",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "processes": accelerator.num_processes,
        "precision": precision,
        "scan": scan,
        "data": dict(data or {}),
    }
    if (first := first_environment(run_dir)) is not None:
        record = first | {"resumed": [*first.get("resumed", []), record]}
    atomic_write_text(run_dir / ENVIRONMENT, json.dumps(record, indent=2) + "\n")


def first_environment(run_dir: Path) -> dict[str, Any] | None:
    """Returns the record that `record_environment` wrote when the run was started; None if there is none.

    Raises:
        RunError: It cannot be read.
    """
    hint = "Put it back from a copy of the run, or delete it."
    return read_record(run_dir / ENVIRONMENT, "the record of this run's environment", hint)


def git_revision(directory: Path) -> str | None:
    """Returns the git commit of the program, with `-dirty` if files differ from it; None outside a checkout."""
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
