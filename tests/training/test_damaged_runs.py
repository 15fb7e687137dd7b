"""Runs with a file removed, cut, overwritten or replaced: each loads, or is refused with one message.

EMRRG_DAMAGED_RUNS=200 tries so many instead of 60.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest

from emrrg_cli.app import main

_WAYS = ("remove", "cut", "flip", "empty", "random", "zeros", "json", "link to a device", "pipe", "directory", "deep")


def _damage(draw: random.Random, run: Path) -> str:
    files = sorted(file for file in run.rglob("*") if file.is_file() and file.name != "curve.png")
    file, way = draw.choice(files), draw.choice(_WAYS)
    data = bytearray(file.read_bytes())
    if way in ("remove", "link to a device", "pipe", "directory"):
        file.unlink()
    match way:
        case "cut":
            file.write_bytes(data[: draw.randrange(len(data) + 1)])
        case "flip" if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
        case "empty":
            file.write_bytes(b"")
        case "random":
            file.write_bytes(draw.randbytes(len(data)))
        case "zeros":
            file.write_bytes(bytes(len(data)))
        case "json":
            file.write_text(draw.choice(["[]", "{}", "null", "1e999", '{"a": NaN}', '"text"', '{"stage": "align"}']))
        case "link to a device":
            file.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "deep":
            file.write_text("[" * 200_000)
    return f"{file.relative_to(run)}: {way}"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="special files")
@pytest.mark.parametrize("seed", range(int(os.environ.get("EMRRG_DAMAGED_RUNS", "60")) // 12))
def test_a_damaged_run_is_used_or_refused(
    tiny_run: Path, tiny_r2gen: Path, tiny_overrides: tuple[str, ...], tmp_path: Path, seed: int, capfd: object
) -> None:
    draw = random.Random(seed)
    image = next((tiny_r2gen / "images").rglob("*.png"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # earlier tests of this process may have used much
    for number in range(12):
        run = tmp_path / f"run{number}"
        shutil.copytree(tiny_run, run)
        if draw.random() < 0.5:  # as an earlier version wrote it
            for file in run.rglob("checksums.json"):
                file.unlink()
        what = _damage(draw, run)
        commands = {
            "generate": ["generate", str(image), "--model", str(run), "-o", str(tmp_path / f"out{number}")],
            "resume": ["finetune", "tiny/finetune", *tiny_overrides, "--output", str(run), "--resume"],
        }
        command = draw.choice([*commands])
        began = time.process_time()
        code = main(commands[command])
        printed = capfd.readouterr().err  # type: ignore[attr-defined]
        assert code in (0, 1, 2), (what, command, printed)
        assert "unexpected error" not in printed, (what, command, printed[-500:])
        assert time.process_time() - began < 10, (what, command)
        shutil.rmtree(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 1.5 * 2**20, "KiB"
