"""Throughput and memory of `emrrg preprocess`: python tests/benchmarks/preprocess.py

Originals are made first: crops of drawn films with detector noise, PNG at 2,000 pixels and grey JPEG of quality 95 at
1,000. They are preprocessed by one process per core, and compared with Pillow, which only decodes the same files in as
many processes: the limit for every program that reads whole files. Then tables of 2,000 and 100,000 rows, whose memory
must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
from PIL import Image

from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.phantom.render import render

ROWS = (2_000, 100_000)
# Not `getrusage`: its value includes the memory of the parent process.
MEMORY = """
import json, re, sys
from pathlib import Path
from emrrg_cli.app import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps([code, int(peak) // 1024]), file=sys.stderr)
"""


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def make_originals(root: Path, count: int, side: int, ending: str) -> None:
    """Makes an annotation in R2Gen's layout with `count` films of `side` pixels."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    films = [Image.fromarray(render(synthetic_study(0, index)[0], 512)) for index in range(4)]
    rows = []
    for number in range(count):
        part = int(rng.integers(440, 512))
        left, top = (int(value) for value in rng.integers(0, 512 - part + 1, 2))
        film = (
            films[number % 4].crop((left, top, left + part, top + part)).resize((side, side), Image.Resampling.BICUBIC)
        )
        noisy = np.asarray(film, np.float32) + rng.normal(0, 2, (side, side)).astype(np.float32)
        image = Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8))
        options = {"quality": 95} if ending == "jpg" else {"compress_level": 6}
        image.save(root / "images" / f"{number:05d}.{ending}", **options)
        rows.append({"id": f"{number:05d}", "report": f"Film {number}.", "image_path": [f"{number:05d}.{ending}"]})
    (root / "annotation.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))


def throughput(root: Path, out: Path, workers: int, extra: list[str]) -> tuple[float, float]:
    """Measures images per second: only Pillow's decoding, and the whole command without its imports."""
    files = sorted((root / "images").iterdir())
    parallel = joblib.Parallel(n_jobs=workers, batch_size=4, pre_dispatch="all")
    parallel(joblib.delayed(decode)(file) for file in files[: 8 * workers])  # starts the processes
    started = time.perf_counter()
    parallel(joblib.delayed(decode)(file) for file in files)
    limit = len(files) / (time.perf_counter() - started)

    from emrrg_cli.ingest.preprocess import preprocess
    from emrrg_cli.ingest.sources.r2gen import R2GenSource
    from emrrg_cli.recipe.load import load_recipe

    recipe = load_recipe("default/preprocess", [f"workers={workers}", *extra], stage="preprocess")
    started = time.perf_counter()
    manifest = preprocess(R2GenSource(root), out, recipe, backend="loky")
    return limit, manifest["images"] / (time.perf_counter() - started)


def memory(root: Path, rows: int, workers: int, layout: str) -> int:
    """Measures the peak resident memory, MiB, of the command (without workers), for a table of so many rows."""
    films = root / "films"
    if not films.exists():
        films.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(ROWS[0]):
            Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(films / f"{number}.jpg")
    text = "The heart is of normal size. " * 20
    if layout == "folder":
        with (root / "table.csv").open("w") as table:
            table.write("study,image,patient,text\n")
            for number in range(rows):
                table.write(f"s{number},{number % ROWS[0]}.jpg,p{number // 2},{text}{number}\n")
        columns = ["--study-column", "study", "--patient-column", "patient", "--report-column", "text"]
        arguments = ["folder", str(films), str(root / f"out{rows}"), "--table", str(root / "table.csv"), *columns]
    else:
        entries = [
            {"id": f"s{n}", "report": f"{text}{n}", "image_path": [f"{n % ROWS[0]}.jpg"], "subject_id": f"p{n // 2}"}
            for n in range(rows)
        ]
        (films / "annotation.json").write_text(json.dumps({"train": entries, "val": [], "test": []}))
        arguments = ["r2gen", str(films), str(root / f"r2gen{rows}")]
    command = [sys.executable, "-c", MEMORY, "preprocess", *arguments, "--workers", str(workers)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    code, peak = json.loads(done.stderr.strip().splitlines()[-1])
    assert code == 0, done.stderr
    return int(peak)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--originals", type=Path, help="folder with png/ and jpg/ in R2Gen's layout; made if left out")
    parser.add_argument("--workers", type=int, default=joblib.cpu_count())
    parser.add_argument("--only", choices=("throughput", "memory"))
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if given.only != "memory":
            print(f"{given.workers} processes, images a second")
            print(f"{'':34}{'Pillow decodes':>16}{'preprocess':>12}{'ratio':>8}")
            for kind, count, side in (("png", 300, 2000), ("jpg", 1000, 1000)):
                root = (given.originals or work) / kind
                if given.originals is None:
                    make_originals(root, count, side, kind)
                for name, extra in (("512 px", []), ("original size", ["size=original"])):
                    out = work / f"{kind} {name}"
                    limit, ours = throughput(root, out, given.workers, extra)
                    what = f"{count:,} {kind}, {side:,} px, to {name}"
                    print(f"{what:34}{limit:16.1f}{ours:12.1f}{ours / limit:8.2f}", flush=True)
        if given.only != "throughput":
            print(f"\n{'peak memory of the command':34}{'MiB':>16}")
            for layout in ("folder", "r2gen"):
                for rows in ROWS:
                    peak = memory(work / layout, rows, given.workers, layout)
                    print(f"{f'{layout}, {rows:,} rows':34}{peak:16,}", flush=True)


if __name__ == "__main__":
    main()
