"""What this machine has: versions, devices, scan engines, Java, disk. A failed check is reported as an entry."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emrrg_cli.versions import installed_versions

PACKAGES = (
    "emrrg",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "numba",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
)
_GIB = 2**30


def diagnose() -> dict[str, Any]:
    """Returns what `emrrg doctor` shows, by topic; a topic whose check fails has `{"problem": reason}`."""
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": versions,
        "devices": devices,
        "scan": scan,
        "java": java,
        "disk": disk,
        "hub": hub,
    }
    return {topic: _checked(check) for topic, check in checks.items()}


def versions() -> dict[str, Any]:
    """Returns the versions of Python and of each package; None if a package is not installed."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}


def devices() -> dict[str, Any]:
    """Returns GPUs (name, memory in GiB, whether bf16 is native), the build of torch, cores and RAM in GiB.

    `bf16` is True if every GPU supports it, which `train.precision: auto` requires; None without a GPU.
    """
    import torch
    from joblib import cpu_count

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpus.append({"name": properties.name, "memory_gib": round(properties.total_memory / _GIB, 1), "bf16": bf16})
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    return {
        "gpus": gpus,
        "bf16": all(gpu["bf16"] for gpu in gpus) if gpus else None,
        "torch_build": build,
        "cpu_cores": cpu_count(),
        "ram_gib": _ram_gib(),
    }


def scan() -> dict[str, Any]:
    """Returns each scan engine with `ok` or why it cannot run, and the one that `model.scan: auto` chooses."""
    import torch

    from emrrg_cli.models.scan import available_engines, choose_engine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"engines": available_engines(), "chosen": choose_engine("auto", device)}


def java() -> dict[str, Any]:
    """Returns path and version of Java, which METEOR and the PTB tokenizer need; None if there is none."""
    from emrrg_cli.scoring.meteor import java_path

    path = java_path()
    if path is None:
        return {"path": None, "version": None}
    # The launcher may exist without Java, as on a new macOS.
    done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20)
    lines = (done.stderr or done.stdout).strip().splitlines()
    if done.returncode != 0:
        return {"path": path, "version": None, "problem": lines[0] if lines else f"exit code {done.returncode}"}
    return {"path": path, "version": lines[0] if lines else "unknown"}


def disk() -> dict[str, Any]:
    """Returns the free space in GiB at the Hugging Face cache and in the working directory."""
    from huggingface_hub.constants import HF_HOME

    places = {"hf_cache": Path(HF_HOME), "working_directory": Path.cwd()}
    return {name: {"path": str(path), "free_gib": _free_gib(path)} for name, path in places.items()}


def hub() -> dict[str, Any]:
    """Whether the Hugging Face libraries may use the network."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return {"offline": bool(HF_HUB_OFFLINE)}


def _checked(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check()
    except Exception as error:  # people run this command to find what is broken
        return {"problem": f"{type(error).__name__}: {error}"}


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB, 1)
    except (AttributeError, ValueError, OSError):  # no such call on Windows
        return None


def _free_gib(path: Path) -> float:
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return round(shutil.disk_usage(existing).free / _GIB, 1)
