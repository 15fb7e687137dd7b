"""Compares the predictions of `emrrg plan` with a real training run: time per step and peak memory.

    python tests/benchmarks/plan.py RECIPE [KEY=VALUE ...] [--steps 20] [--random-llm TOKENIZER] [--json FILE]

Runs in separate processes: the plan, then `emrrg finetune` with the same recipe for some steps without validation.
Steps are timed when the training loop reports them as finished; the first third is warm-up. The mean determines the
time of an epoch; the median is not affected by other programs. On CUDA, memory is the peak allocated by torch, to which
the plan adds the context; on a CPU, the peak resident memory of the process.

`--random-llm` uses an LLM of the recipe's configuration with random weights and the tokenizer of a directory, if the
LLM itself is not available: speed and memory are the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MEASURE = "--measure"  # this script calls itself with it for training


def measure(target: Path, arguments: list[str]) -> None:
    """Trains in this process and writes the finish time of each step, without pauses, and the peak memory."""
    from emrrg_cli.app import main as emrrg
    from emrrg_cli.training import loop
    from emrrg_cli.training.progress import TrainingDisplay

    done: list[float] = []

    class Display(TrainingDisplay):
        def update(self, **figures: Any) -> None:
            super().update(**figures)
            done.append(time.monotonic() - self._rate.paused_s)

    setattr(loop, "TrainingDisplay", Display)  # noqa: B010
    if code := emrrg(["finetune", *arguments]):
        sys.exit(code)
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    target.write_text(json.dumps({"done": done, "peak": peak}))


def random_llm(recipe: str, overrides: list[str], tokenizer: str, directory: Path) -> None:
    """Writes an LLM of the recipe's configuration with random weights, large enough for the tokenizer's vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emrrg_cli.planning.llms import llm_config
    from emrrg_cli.recipe.load import load_recipe

    words = AutoTokenizer.from_pretrained(tokenizer)
    config = llm_config(load_recipe(recipe, overrides, stage="finetune").model)
    config.vocab_size = max(config.vocab_size, len(words))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    llm.save_pretrained(directory)
    words.save_pretrained(directory)
    del llm
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # leave the GPU to the measured processes


def run(command: list[str]) -> tuple[str, float]:
    """Runs a command and returns its output and seconds; its messages go to the terminal."""
    began = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout, time.perf_counter() - began


def main() -> None:
    if sys.argv[1:2] == [MEASURE]:
        measure(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--random-llm", metavar="TOKENIZER", help="directory of a tokenizer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        scratch = Path(name)
        overrides = [*options.overrides, "train.trackers=[]"]
        if options.random_llm:
            random_llm(options.recipe, overrides, options.random_llm, scratch / "llm")
            overrides.append(f"model.llm.name={scratch / 'llm'}")
        answer, planning = run([sys.executable, "-m", "emrrg_cli", "plan", options.recipe, *overrides, "--json"])
        plan = json.loads(answer)
        times = scratch / "times.json"
        # The schedule is unchanged; the run is stopped before its end.
        steps = [f"train.stop_after_steps={options.steps}", f"train.validate_every_epochs={plan['epochs'] + 1}"]
        command = [sys.executable, __file__, MEASURE, str(times), options.recipe, *overrides, *steps]
        run([*command, "--output", str(scratch / "run"), "--num-processes", "1"])
        measured = json.loads(times.read_text())
    done = measured["done"][max(1, options.steps // 3) - 1 :]
    each = [after - before for before, after in itertools.pairwise(done)]
    cuda = not plan["device"].startswith("CPU")
    peak = plan["peak"] - plan["memory"]["reports in validation"] - cuda * plan["memory"]["program"]
    rows = {
        "s a step, mean": (plan["seconds_per_step"], statistics.mean(each)),
        "s a step, median": (plan["seconds_per_step"], statistics.median(each)),
        "peak memory, GiB": (peak / 2**30, measured["peak"] / 2**30),
    }
    what = " ".join([options.recipe, *options.overrides])
    title = f"{what}: {plan['device']}, {plan['precision']}, {len(each)} steps; the plan took {planning:.0f} s"
    table = Table("", "predicted", "measured", "difference")
    for row, (predicted, found) in rows.items():
        table.add_row(row, f"{predicted:.3g}", f"{found:.3g}", f"{100 * (predicted / found - 1):+.1f} %")
    console = Console()
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    if options.json:
        figures = {row: {"predicted": a, "measured": b} for row, (a, b) in rows.items()}
        record = {"recipe": what, "planning_s": planning, "figures": figures, "steps": each, "plan": plan}
        options.json.write_text(json.dumps(record | {"cores": os.cpu_count()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
