"""Kills training runs at random moments, resumes them, and compares every bit with an undisturbed run.

    python tests/benchmarks/kill.py --kills 20            # every stage, about a quarter of an hour on two cores
    python tests/benchmarks/kill.py --kills 3 --stage finetune

Each run is killed once or twice (SIGKILL, or SIGTERM every third time) at a random moment between its first file and
the end of an undisturbed run, and then resumed to its end. Prints one line per kill; exit code 1 if a run cannot be
resumed or differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ENCODER = "model.encoder={size: null, d_model: 16, depth: 2, image_size: %d, d_state: 4}"
LLM = "model.llm.scratch={hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, vocab_size: 320}"
TEXT = "model.text.scratch={hidden_size: 16, layers: 1, heads: 2, vocab_size: 320}"
COMMON = ["train.trackers=[]", "data.workers=0", "train.log_every=1", "train.checkpoint_every_steps=2"]
STAGES = {
    "pretrain": ["phantom/pretrain", ENCODER % 128, "model.decoder_width=16", "model.decoder_depth=1",
                 "train.batch_size=10", "train.epochs=3"],
    "align": ["phantom/align", ENCODER % 32, TEXT, "model.dim=16", "train.batch_size=10", "train.epochs=3"],
    "finetune": ["phantom/finetune", ENCODER % 32, LLM, "train.batch_size=10", "train.epochs=3",
                 "train.select=loss", "train.validate_every_epochs=1"],
}  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "emrrg_cli", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_begin(process: subprocess.Popen[str], run: Path, since: float) -> None:
    """Waits until a run has written something after `since` (seconds of the epoch): its recipe or its environment."""
    while process.poll() is None and not any(
        file.is_file() and file.stat().st_mtime > since for file in (run / "recipe.yaml", run / "environment.json")
    ):
        time.sleep(0.02)


def finish(arguments: list[str]) -> tuple[int, str]:
    process = start(arguments)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def content(run: Path) -> dict[str, object]:
    """Returns all results of a run: weights, the state of the last checkpoint, the history."""
    found: dict[str, object] = {}
    for file in sorted([*(run / "model").rglob("*.safetensors"), *(run / "checkpoints").rglob("*.safetensors")]):
        found |= {f"{file.relative_to(run)}:{name}": tensor for name, tensor in load_file(file).items()}
    for file in (run / "checkpoints").rglob("state.pt"):
        state = torch.load(file, weights_only=True)["optimizer"]["state"]
        found |= {f"optimizer:{key}:{name}": value for key, values in state.items() for name, value in values.items()}
    found["history"] = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    names = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        if not same:
            names.append(name)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--stage", choices=[*STAGES], action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, failures = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="emrrg-kill-") as folder:
        root = Path(folder)
        data = ["preprocess", "phantom", str(root / "data"), "--count", "100", "--size", "128"]
        code, output = finish(data)
        assert code == 0, output
        for stage in options.stage or STAGES:
            recipe, *changes = STAGES[stage]
            base = [stage, recipe, f"data.root={root / 'data'}", *changes, *COMMON]
            process = start([*base, "--output", str(root / f"{stage}-whole")])
            wait_for_begin(process, root / f"{stage}-whole", 0.0)
            began = time.monotonic()
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
            whole, seconds = content(root / f"{stage}-whole"), time.monotonic() - began
            print(f"{stage}: {seconds:.1f} s from recipe to end, {len(whole)} tensors and records", flush=True)
            for number in range(options.kills):
                run = root / f"{stage}-{number}"
                command, moments = [*base, "--output", str(run)], []
                for _ in range(draw.choice((1, 1, 2))):
                    moments.append(draw.uniform(0.0, seconds))
                    resumed = [*command, "--resume"] if (run / "recipe.yaml").is_file() else command
                    now = time.time()
                    process = start(resumed)
                    wait_for_begin(process, run, now)
                    try:
                        process.communicate(timeout=moments[-1])
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGTERM if number % 3 == 2 else signal.SIGKILL)
                        process.communicate()
                code, output = finish([*command, "--resume"] if (run / "recipe.yaml").is_file() else command)
                found = differences(whole, content(run)) if code == 0 else [output.strip().splitlines()[-1]]
                failures += bool(found)
                outcome = "the same bits" if not found else f"DIFFERENT: {', '.join(found[:3])}"
                print(
                    f"  {number + 1:2} killed {', '.join(f'{m:.2f} s' for m in moments)} after it began: {outcome}",
                    flush=True,
                )
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
