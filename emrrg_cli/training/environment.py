"""The machine a run happens on: precision, processes, and what is recorded about it."""

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
    """The trackers of a run: TensorBoard writes to `run_dir/tracking`, W&B to a run of its project `emrrg`.

    Args:
        names: `tensorboard`, `wandb`.
        run_dir: W&B calls the run by its last name.
        recipe: the configuration that W&B shows.
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
    """Starts the trackers that an accelerator was made with.

    Raises:
        RunError: when one does not start, most often W&B without a login or a network.
    """
    try:
        accelerator.init_trackers("emrrg")
    except Exception as error:  # each has its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"train.trackers: a tracker does not start: {reason}",
            hint="For W&B: `wandb login`, or WANDB_MODE=offline. Or take it out of train.trackers.",
        ) from error


def record_environment(
    run_dir: Path, accelerator: Any, precision: str, scan: str, data: Mapping[str, str] | None = None
) -> None:
    """Writes `environment.json`: versions, git revision, device, processes, command, data.

    What a run began with stays; where it is resumed, the record of that is added to the list `resumed`.

    Args:
        data: the fingerprint of each dataset directory.

    Raises:
        RunError: when there is a record that cannot be read.
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
    """What `record_environment` wrote when the run began; None where it has not.

    Raises:
        RunError: when it cannot be read.
    """
    hint = "Put it back from a copy of the run, or delete it."
    return read_record(run_dir / ENVIRONMENT, "the record of what this run began with", hint)


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
