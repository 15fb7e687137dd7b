"""IU X-Ray's whole chain and its ablation: pretrain, align, finetune and evaluate, several rows and seeds, one table.

    python tests/benchmarks/iu_xray.py DATA WORK [--films DIR ...] [--rows X,none,full] [--seeds 1,2,3] [--gpus 4]

DATA is a dataset directory of IU X-Ray with R2Gen's split (`emrrg preprocess r2gen`), --films are further images for
stage 1 (folders or dataset directories; none may be of its validation or test studies, which is checked). Scores are
those of the validation split; --split test is for settings that are settled. The seed covers stage 3, and all stages
in rows that name a stage. What is done already is not done again, so that a run that was stopped goes on.

WORK/table.md has the mean and the standard deviation over the seeds; each run's directory has the rest.
`--overrides` are given to every stage 3 run, `--tiny` makes every model a toy, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SCORES = ("BLEU_1", "BLEU_4", "ROUGE_L", "METEOR", "CIDEr")
LORA = ("X", "Z", "dt", "B", "C", "in_proj", "x_proj", "dt_proj", "out_proj", "patch_embed")
CHANGES = ("rotate", "shift", "scale", "brightness", "contrast")
TOY = (
    "model.encoder.size=null",
    "model.encoder.d_model=64",
    "model.encoder.depth=4",
    "model.encoder.image_size=128",
    "data.limit=16",
)
TOY_TRAIN = ("train.epochs=1", "train.batch_size=8", "train.trackers=[]")


@dataclass(frozen=True)
class Row:
    """One row of the table: what it changes, and whether a stage before is left out."""

    name: str
    changes: tuple[str, ...] = ()
    pretrain: bool = True
    align: bool = True

    @property
    def seeded_stages(self) -> bool:
        """Rows about stages 1 and 2 draw these anew for each seed."""
        return not (self.pretrain and self.align) or self.name == "whole chain"


# In order of worth: a session that ends early has the rows that matter.
ROWS = [
    Row("X"),
    Row("none", ("model.adapter.targets=none",)),
    Row("full", ("model.adapter.targets=full", "train.lr_scale.encoder=0.2")),
    Row("no stage 1", pretrain=False),
    Row("no stage 2", align=False),
    Row("no stage 1, no stage 2", pretrain=False, align=False),
    Row("whole chain"),
    Row("hybrid off", ("model.hybrid.every=null", "model.visual_prompt=full")),
    *(Row(name, (f"model.adapter.targets=[{name}]",)) for name in ("in_proj", "out_proj", *LORA[1:5], *LORA[6:8])),
    Row("patch_embed", ("model.adapter.targets=[patch_embed]",)),
    Row("prompt full", ("model.visual_prompt=full",)),
    Row("views concatenated", ("model.views=concat",)),
    Row("findings", ("model.findings=true",)),
    Row("findings, balance", ("model.findings=true", "data.balance=2")),
    Row("no augmentation", tuple(f"data.augment.{what}=0" for what in CHANGES)),
    Row("no dropout", ("model.llm.scratch.dropout=0",)),
    Row("no smoothing", ("train.label_smoothing=0",)),
    Row("no average", ("train.ema=null",)),
]


@dataclass
class Chain:
    """Runs commands of emrrg, each on one GPU at a time, and remembers what they left."""

    work: Path
    gpus: int
    tiny: bool
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: dict[str, threading.Event] = field(default_factory=dict)

    def run(self, gpu: int, output: Path, *arguments: str) -> Path:
        """A training run in `output`, continued where it was stopped; other threads that want it wait for it."""
        with self.lock:
            first = str(output) not in self.made
            event = self.made.setdefault(str(output), threading.Event())
        if not first:
            event.wait()
            return output
        try:
            if not (output / "done").exists():
                resume = ["--resume"] if (output / "recipe.yaml").exists() else []
                began = time.perf_counter()
                self.emrrg(gpu, [*arguments, "--output", str(output), "--num-processes", "1", *resume], output.name)
                (output / "done").write_text(f"{time.perf_counter() - began:.1f}\n")
        finally:
            event.set()
        return output

    def emrrg(self, gpu: int, arguments: Sequence[str], name: str) -> None:
        """One command; its output goes to WORK/logs.

        Raises:
            RuntimeError: it failed; names the log.
        """
        log = self.work / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with log.open("a") as stream:
            done = subprocess.run(
                [sys.executable, "-m", "emrrg_cli", *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        if done.returncode:
            raise RuntimeError(f"emrrg {arguments[0]} failed with {done.returncode}; see {log}")


def train(chain: Chain, gpu: int, row: Row, seed: int, options: argparse.Namespace) -> Path:
    """Stages 1 to 3 of a row and its evaluation; returns the run directory of stage 3."""
    data = Path(options.data).resolve()
    early = f"-{seed}" if row.seeded_stages else ""
    seeds = (f"train.seed={seed}",) if row.seeded_stages else ()
    toy = (*TOY, *TOY_TRAIN) if chain.tiny else ()
    weights: tuple[str, ...] = ()
    if row.pretrain:
        sets = ", ".join(f"{{root: {Path(root).resolve()}}}" for root in (data, *options.films))
        toy_decoder = ("model.decoder_width=64", "train.max_steps=2") if chain.tiny else ()
        recipe = ("pretrain", "iu_xray/pretrain", f"data.sets=[{sets}]", f"data.held_out=[{data}]")
        run = chain.run(gpu, chain.work / f"pretrain{early}", *recipe, *seeds, *toy, *toy_decoder)
        weights = (f"model.encoder.weights={run}",)
    if row.align:
        name = f"align{'' if row.pretrain else '-alone'}{early}"
        toy_text = ("train.warmup_epochs=0", "model.dim=32") if chain.tiny else ()
        recipe = ("align", "iu_xray/align", f"data.root={data}", *weights)
        run = chain.run(gpu, chain.work / name, *recipe, *seeds, *toy, *toy_text)
        weights = (f"model.encoder.weights={run}",)
    name = f"{row.name.replace(', ', '-').replace(' ', '-')}-{seed}"
    small = ("model.llm.scratch.hidden_size=64",) if chain.tiny else ()
    recipe = ("finetune", "iu_xray/finetune-small", f"data.root={data}", *weights, f"train.seed={seed}")
    run = chain.run(gpu, chain.work / name, *recipe, *toy, *small, *row.changes, *options.overrides)
    if not (run / "evaluation" / options.split / "scores.json").exists():
        chain.emrrg(gpu, ["evaluate", "--model", str(run), "--split", options.split], f"{name}-evaluate")
    return run


def figures(run: Path, split: str) -> dict[str, float]:
    """What a run came to: scores, trained parameters, seconds of stage 3."""
    from safetensors import safe_open

    scores = json.loads((run / "evaluation" / split / "scores.json").read_text())["scores"]
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "last").read_text().strip()
    with safe_open(checkpoint / "trainable.safetensors", "pt") as tensors:
        parameters = sum(_numel(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    found = {name: float(scores[name]) for name in SCORES if scores.get(name) is not None}
    return found | {"parameters": parameters / 1e6, "seconds": float((run / "done").read_text())}


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row for each row of the ablation, mean and standard deviation over its seeds."""
    columns = (*SCORES, "parameters", "seconds")
    lines = [
        f"| row | seeds | {' | '.join(columns[:-2])} | trained, millions | seconds |",
        "|" + "---|" * (2 + len(columns)),
    ]
    for name, runs in found.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            if not values:
                cells.append("-")
            elif column in SCORES:
                deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{deviation}")
            else:
                cells.append(f"{statistics.mean(values):.1f}")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run_all(jobs: Sequence[Callable[[int], None]], gpus: int, each: int) -> None:
    """Runs jobs in order, `each` at a time on every GPU, which a job is told; after a failure the rest goes on."""
    waiting: queue.SimpleQueue[Callable[[int], None]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work(gpu: int) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                job(gpu)
            except (RuntimeError, OSError) as error:
                print(error, file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(slot % gpus,)) for slot in range(gpus * each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("work", type=Path)
    parser.add_argument("--films", nargs="*", default=[])
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS if "," not in row.name))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--each", type=int, default=2, help="runs on one GPU at a time")
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    chain = Chain(options.work.resolve(), options.gpus, options.tiny)
    wanted = options.rows.split(",")
    rows = [row for row in ROWS if row.name in wanted]
    if unknown := set(wanted) - {row.name for row in rows}:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; known: {', '.join(row.name for row in ROWS)}")
    found: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}

    def job(row: Row, seed: int) -> Callable[[int], None]:
        def do(gpu: int) -> None:
            found[row.name].append(figures(train(chain, gpu, row, seed, options), options.split))
            (chain.work / "table.md").write_text(table(found))

        return do

    # Seed by seed: one seed of every row is worth more than three of the first.
    run_all([job(row, int(seed)) for seed in options.seeds.split(",") for row in rows], options.gpus, options.each)
    print(table(found))


if __name__ == "__main__":
    main()
