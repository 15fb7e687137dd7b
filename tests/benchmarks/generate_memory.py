"""Measures the peak memory of `emrrg generate` for few and many files: it must not grow with their number.

    python tests/benchmarks/generate_memory.py --files 300 3000 30000        # a quarter of an hour on two idle cores

The files are hard links to one small film, and the model is the smallest one, so that the memory for the files is
visible beside that of the model. Prints a table: files, peak memory (MiB), CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from generate_kill import DECODING, phantoms, start, tiny_run


def measure(arguments: list[str]) -> tuple[float, float]:
    """Runs `emrrg` and returns peak memory in MiB and CPU seconds."""
    process = start(arguments)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, output[-2000:]
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[300, 30000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="emrrg-memory-") as folder:
        root = Path(folder)
        data, run = tiny_run(root)
        film = root / "film.png"
        phantoms(data)[0].resize((32, 32)).save(film)
        print("| files | peak memory, MiB | processor, s |\n|---|---|---|", flush=True)
        for count in options.files:
            films = root / f"films-{count}"
            films.mkdir()
            for number in range(count):
                os.link(film, films / f"{number:06}.png")
            short = ["generation.max_new_tokens=3", "generation.batch_size=32"]
            command = ["generate", str(films), "--model", str(run), *DECODING, *short]
            peak, seconds = measure([*command, "--output", str(root / f"reports-{count}")])
            print(f"| {count:,} | {peak:.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
