"""Kills `emrrg generate` at random moments, runs the same command again, and compares with an undisturbed run.

    python -m tests.benchmarks.generate_kill --files 2000 --kills 5            # a few minutes on two idle cores
    python -m tests.benchmarks.generate_kill --files 60 --kills 2 --processes 2

The folder has synthetic films as PNG and as DICOM, real X-rays of `--real FOLDER`, and 5 percent of files that are not
images or are cut short. Each run is killed (SIGKILL, with all its processes) after a random number of records. No study
may have two records, none may be missing, and all texts must equal those of the undisturbed run, also with four merged
shards. Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.varied import vary

ENCODER = "model.encoder={size: null, d_model: 16, depth: 2, image_size: 32, d_state: 4}"
LLM = "model.llm.scratch={hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, vocab_size: 320}"
TRAINING = [ENCODER, LLM, "train.trackers=[]", "data.workers=0", "train.batch_size=20", "train.select=loss"]
DECODING = ["generation.num_beams=1", "generation.max_new_tokens=12", "--device", "cpu", "--study-by", "file"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Starts `emrrg` in its own process group, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "emrrg_cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(arguments: list[str]) -> float:
    """Runs `emrrg` to its end and returns the seconds."""
    began = time.monotonic()
    process = start(arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return time.monotonic() - began


def tiny_run(root: Path, count: int = 200) -> tuple[Path, Path]:
    """Makes a dataset directory of synthetic films, and a run trained on it for a few steps."""
    data, run = root / "data", root / "run"
    finish(["preprocess", "phantom", str(data), "--count", str(count), "--size", "128"])
    finish(
        ["finetune", "phantom/finetune", f"data.root={data}", *TRAINING, "train.epochs=2", "train.lr=3e-3",
         "--output", str(run)]
    )  # fmt: skip
    vary(run)
    return data, run


def phantoms(data: Path) -> list[Image.Image]:
    """The films of a dataset directory."""
    import pyarrow.parquet as pq

    images = [row for file in sorted(data.glob("data/*.parquet")) for row in pq.read_table(file)["images"].to_pylist()]
    return [Image.open(io.BytesIO(views[0]["bytes"])).convert("L") for views in images]


def write_films(folder: Path, count: int, films: list[Image.Image], real: Path | None, draw: random.Random) -> int:
    """Fills a folder with `count` files, 5 percent of them invalid; returns how many should get a report."""
    folder.mkdir()
    usable = 0
    found = [] if real is None else sorted(f for f in real.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    rng = np.random.default_rng(0)
    for number in range(count):
        name = folder / f"{number:06}"
        kind = number % 20
        if kind == 19:
            name.with_suffix(".png").write_bytes(draw.choice((b"", b"no image", bytes(5000), b"\x89PNG\r\n\x1a\n cut")))
            continue
        usable += 1
        if kind >= 15 and found:
            source = draw.choice(found)
            name.with_suffix(source.suffix).write_bytes(source.read_bytes())
        elif kind >= 12:
            write_dicom(name.with_suffix(".dcm"), np.asarray(films[number % len(films)].resize((96, 96))))
        else:
            grey = np.asarray(films[number % len(films)].resize((96, 96)), dtype=np.int16)
            noisy = (grey + rng.integers(-8, 9, grey.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(name.with_suffix(".png"))
    return usable


def write_dicom(file: Path, pixels: np.ndarray[Any, Any]) -> None:
    """An uncompressed DICOM film."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PhotometricInterpretation = "DX", "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 1, 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    data.save_as(file, enforce_file_format=True)


def records(folder: Path) -> dict[str, str]:
    """Returns the texts by study.

    Raises:
        AssertionError: A study has two records.
    """
    rows = [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]
    texts = {row["study"]: row["report"] for row in rows}
    assert len(texts) == len(rows), f"{len(rows) - len(texts)} studies have two records"
    return texts


def kill_once(command: list[str], output: Path, after: int) -> int:
    """Kills a run after it has saved `after` records; returns the number of saved records."""
    process, partial = start(command), output / "reports.jsonl.partial"
    while process.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") >= after):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return partial.read_bytes().count(b"\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--real", type=Path, help="folder with real X-rays")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, failures = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="emrrg-kill-") as folder:
        root = Path(folder)
        data, run = tiny_run(root)
        usable = write_films(root / "films", options.files, phantoms(data), options.real, draw)
        base = ["generate", str(root / "films"), "--model", str(run), *DECODING]
        seconds = finish([*base, "--output", str(root / "whole")])
        whole = records(root / "whole")
        assert len(whole) == usable, (len(whole), usable)
        print(f"{options.files} files, {usable} reports, {len(set(whole.values()))} texts, {seconds:.0f} s", flush=True)
        several = ["--num-processes", str(options.processes)]
        for number in range(options.kills):
            output = root / f"killed-{number}"
            command = [*base, *several, "--output", str(output)]
            left = kill_once(command, output, draw.randint(1, int(0.9 * usable)))
            finish(command)
            failures += not show(f"killed with {left} records", records(output), whole)
        for index in range(4):
            finish([*base, "--shard", f"{index}/4", "--output", str(root / "shards")])
        finish(["generate", "--merge", str(root / "shards")])
        failures += not show("four shards, merged", records(root / "shards"), whole)
    print(f"{failures} failures")
    return int(failures > 0)


def show(what: str, found: dict[str, str], whole: dict[str, str]) -> bool:
    """Prints how records differ from those of the undisturbed run; returns True if they are equal."""
    missing, more = len(whole.keys() - found.keys()), len(found.keys() - whole.keys())
    other = sum(found[study] != whole[study] for study in found.keys() & whole.keys())
    print(f"| {what} | {len(found)} reports | {missing} missing | {more} too many | {other} other texts |", flush=True)
    return not (missing or more or other)


if __name__ == "__main__":
    sys.exit(main())
