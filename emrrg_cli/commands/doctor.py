"""`emrrg doctor`: shows what is installed on this machine and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer

from emrrg_cli.commands.options import Json

_OPTIONAL = {
    "numba": "optional, in the extra `fast`",
    "triton": "comes with PyTorch for CUDA",
    "mamba-ssm": "optional",
    "causal-conv1d": "optional",
}


def doctor(as_json: Json = False) -> None:
    """Show versions, GPUs, scan engines, Java and free disk space.

    Example: emrrg doctor --json
    """
    from emrrg_cli.diagnosis import diagnose

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for topic, entry in found.items():
        lines = [f"cannot be checked: {entry['problem']}"] if set(entry) == {"problem"} else list(_LINES[topic](entry))
        for index, line in enumerate(lines):
            typer.echo(f"{topic if index == 0 else '':<10}{line}")


def _versions(entry: dict[str, Any]) -> Iterator[str]:
    for package, version in entry.items():
        reason = _OPTIONAL.get(package)
        yield f"{package:<15} {version or 'not installed' + (f' ({reason})' if reason else '')}"


def _devices(entry: dict[str, Any]) -> Iterator[str]:
    for index, gpu in enumerate(entry["gpus"]):
        yield f"GPU {index}: {gpu['name']}, {gpu['memory_gib']} GiB, bf16 {'yes' if gpu['bf16'] else 'no'}"
    if not entry["gpus"]:
        yield f"no GPU (PyTorch is built for {entry['torch_build']}); training runs in fp32"
    ram = "" if entry["ram_gib"] is None else f", {entry['ram_gib']} GiB RAM"
    yield f"{entry['cpu_cores']} CPU cores{ram}"


def _scan(entry: dict[str, Any]) -> Iterator[str]:
    for engine, state in entry["engines"].items():
        yield f"{engine:<15} {state}{' (selected)' if engine == entry['chosen'] else ''}"


def _java(entry: dict[str, Any]) -> Iterator[str]:
    if entry["path"] is None:
        yield "not found: METEOR is skipped"
    elif entry["version"] is None:
        yield f"{entry['path']} does not run, METEOR is skipped: {entry['problem']}"
    else:
        yield f"{entry['path']} ({entry['version']})"


def _disk(entry: dict[str, Any]) -> Iterator[str]:
    for name, place in entry.items():
        yield f"{place['free_gib']} GiB free at {place['path']} ({name.replace('_', ' ')})"


def _hub(entry: dict[str, Any]) -> Iterator[str]:
    yield "offline: models and data are read only from the cache" if entry["offline"] else "online"


_LINES = {"versions": _versions, "devices": _devices, "scan": _scan, "java": _java, "disk": _disk, "hub": _hub}
