"""Compares `emrrg generate` on one and on several GPUs of a machine.

    python tests/benchmarks/generate_gpus.py RUN INPUT [--split train] [--processes 1 2] [KEY=VALUE ...]

INPUT is a folder of studies or a dataset directory. Prints a table: seconds in all, seconds until the first report
(start of the processes, the model, the first CUDA graphs), and reports per second between the first and the last tenth
of the reports, which is the speed for a long list. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BEAMS = ("consensus=null", "do_sample=false", "temperature=1.0", "num_beams=3", "batch_size=64")
DECODING = tuple(f"generation.{setting}" for setting in BEAMS)


def timed_counts(command: Sequence[str], folder: Path) -> tuple[float, list[tuple[float, int]]]:
    """Runs a command; returns its seconds, and pairs of seconds and the number of reports in `folder` by then."""
    began, found = time.monotonic(), [(0.0, 0)]
    with (folder.parent / f"{folder.name}.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            files = [*folder.glob("reports*.jsonl.partial"), *folder.glob("reports*.jsonl")]
            count = max((file.read_bytes().count(b"\n") for file in files if file.exists()), default=0)
            if count > found[-1][1]:
                found.append((time.monotonic() - began, count))
            time.sleep(0.1)
    seconds = time.monotonic() - began
    if process.returncode:
        sys.exit((folder.parent / f"{folder.name}.txt").read_text()[-2000:])
    return seconds, found


def rate(found: Sequence[tuple[float, int]]) -> float:
    """Returns the reports per second between the first and the last tenth."""
    most = found[-1][1]
    first = next(pair for pair in found if pair[1] >= 0.1 * most)
    last = next(pair for pair in found if pair[1] >= 0.9 * most)
    return (last[1] - first[1]) / max(1e-9, last[0] - first[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("input")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--split")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print("| processes | reports | seconds | first report after, s | reports/s |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="emrrg-gpus-") as place:
        for processes in options.processes:
            folder = Path(place) / str(processes)
            command = [sys.executable, "-m", "emrrg_cli", "generate", options.input, "--model", str(options.run)]
            command += ["--output", str(folder), "--num-processes", str(processes), "--no-grounding"]
            command += [*(("--split", options.split) if options.split else ()), *DECODING, *options.settings]
            seconds, found = timed_counts(command, folder)
            first = found[min(1, len(found) - 1)][0]
            print(f"| {processes} | {found[-1][1]:,} | {seconds:.1f} | {first:.1f} | {rate(found):.1f} |", flush=True)


if __name__ == "__main__":
    main()
