"""Trains the small model of the package: films, three stages, scores, export.

    python tests/benchmarks/box.py WORK [--count 40000] [--seed 0] [--until finetune] [--export DIR] [--toy]

WORK has all files. Finished steps are not repeated: after a stop, or with `--until` in several calls, the same command
continues, and training resumes from its last epoch. A GPU is used if there is one; no network is used. `--toy` tries
the script with small films and a small model in minutes on a CPU.

Prints results on the test films, which no stage has seen: F1 of the findings against the exact labels with two controls
that ignore the film, how often the side of a finding is right, BLEU-4 and CIDEr with those of a second report that the
grammar writes for the same truth, size, and seconds per report on two CPU threads. `--export` writes the run in fp16
with a model card.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from emrrg_cli import load_generator, score
from emrrg_cli.checksums import write_checksums
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.default_model import LIMITS, SYNTHETIC_ONLY
from emrrg_cli.demo import DemoResult, read_result
from emrrg_cli.files.records import read_jsonl
from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.models.film_distance import FILM_DISTANCE
from emrrg_cli.phantom.grid import generator
from emrrg_cli.phantom.reader import read_labels
from emrrg_cli.phantom.report import write_report
from emrrg_cli.recipe.load import load_run_recipe
from emrrg_cli.training.measure_films import measure_film_distance

STAGES = ("draw", "pretrain", "align", "finetune", "evaluate")
ENCODER = "model.encoder={size: null, d_model: 32, depth: 2, d_state: 4, image_size: 128}"
LLM = "model.llm.scratch={hidden_size: 64, layers: 2, heads: 4, kv_heads: 2, vocab_size: 600}"
SMALL = ("train.epochs=1", "train.batch_size=32", "data.workers=0", "train.validate_every_epochs=1")
TOY = {
    "pretrain": (ENCODER, "model.decoder_width=32", "model.decoder_depth=2", *SMALL),
    "align": (ENCODER, "model.text.scratch.layers=1", "model.dim=64", *SMALL),
    "finetune": (ENCODER, LLM, *SMALL),
    "evaluate": ("generation.max_new_tokens=60",),
}
# Files of a run that reports need. The film distance is measured again.
KEPT = ("recipe.yaml", "llm.json", "tokenizer", "model")
SENTENCE = re.compile(r"\s\.\s?|[.;]\s+")


@dataclass
class Work:
    """The folder of a model and the settings of its training."""

    root: Path
    count: int
    seed: int
    toy: bool

    def path(self, name: str) -> Path:
        """Returns the output folder of a stage."""
        return self.root / name

    def command(self, stage: str) -> list[str]:
        """Returns the arguments of `emrrg` for a stage."""
        data, toy = str(self.path("draw")), TOY.get(stage, ()) if self.toy else ()
        if stage == "draw":
            size, cores = "128" if self.toy else "192", str(os.cpu_count())
            numbers = ("--count", str(self.count), "--seed", str(self.seed), "--split", self.split)
            return ["preprocess", "phantom", data, *numbers, "--size", size, "--workers", cores]
        if stage == "evaluate":
            where = ("--model", str(self.path("finetune")), "--data", data, "--output", str(self.path("evaluate")))
            return ["evaluate", *where, "--no-meteor", *toy]
        before = STAGES[STAGES.index(stage) - 1]
        weights = [] if before == "draw" else [f"model.encoder.weights={self.path(before)}"]
        seed = f"train.seed={self.seed}"
        return [stage, f"box/{stage}", f"data.root={data}", *weights, seed, *toy, "--output", str(self.path(stage))]

    @property
    def split(self) -> str:
        """Returns the fractions of train, validation and test: 1,000 test films, or a tenth if there are few."""
        part = 0.1 if self.count < 10_000 else round(1000 / self.count, 3)
        return f"{1 - 2 * part:.3f},{part},{part}"

    def run(self, stage: str) -> None:
        """Runs a stage that is not finished, and records its seconds.

        Raises:
            SystemExit: The stage failed; its own message is printed above.
        """
        done = self.root / f"{stage}.seconds"
        if done.exists():
            return
        command = self.command(stage)
        if stage in STAGES[1:4] and (self.path(stage) / "recipe.yaml").exists():
            command.append("--resume")
        if stage == "evaluate" and self.path(stage).exists():
            command.append("--overwrite")
        print("$ emrrg", *command, flush=True)
        began = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "emrrg_cli", *command]).returncode
        if code:
            raise SystemExit(code)
        done.write_text(f"{time.perf_counter() - began:.0f}\n")


def sides(case: Any) -> dict[str, set[str]]:
    """Returns the sides of each finding that has one."""
    found = case.findings
    things = {
        "atelectasis": found.atelectases,
        "consolidation": found.consolidations,
        "nodule": [found.nodule] if found.nodule else [],
        "pleural_effusion": found.effusions,
        "pneumothorax": [found.pneumothorax] if found.pneumothorax else [],
    }
    return {name: {thing.side for thing in present} for name, present in things.items() if present}


def read_sides(text: str) -> dict[str, set[str]]:
    """Returns the sides of each finding that a report of the phantom grammar states."""
    found: dict[str, set[str]] = {}
    for sentence in SENTENCE.split(text.lower()):
        said = {side for side in ("right", "left") if re.search(rf"\b{side}\b", sentence)}
        if re.search(r"\b(?:bilateral|both|bibasilar)\b", sentence):
            said = {"right", "left"}
        if "lingula" in sentence:
            said.add("left")
        for name in read_labels(sentence):
            found.setdefault(name, set()).update(said)
    return found


def side_accuracy(cases: Sequence[Any], reports: Sequence[str]) -> float:
    """Returns how many correctly stated findings with a side have the right side or sides."""
    right = stated = 0
    for case, report in zip(cases, reports, strict=True):
        said = read_sides(report)
        for name, truth in sides(case).items():
            if name in said:
                stated += 1
                right += said[name] == truth
    return right / max(1, stated)


def seconds_a_report(run: Path, films: Path, count: int = 12) -> float:
    """Measures the mean seconds of a report for one film on two CPU threads, after a warm-up report."""
    torch.set_num_threads(2)
    model = load_generator(run, device="cpu")
    paths = sorted(films.glob("*.png"))[: count + 1]
    model.generate([paths[0]])
    began = time.perf_counter()
    for path in paths[1:]:
        model.generate([path])
    return (time.perf_counter() - began) / (len(paths) - 1)


def measure(work: Work) -> dict[str, Any]:
    """Computes all results for the output and the card."""
    predictions = read_jsonl(work.path("evaluate") / "predictions.jsonl")
    reports = {row["study_id"]: row["hypothesis"] for row in predictions}
    result: DemoResult = read_result(work.path("draw"), reports)
    cases = [synthetic_study(work.seed, int(study.rsplit("-", 1)[1]))[0] for study in result.study_ids]
    again = [
        clean_report(write_report(case, generator(work.seed, 2**31 + number)).findings, "r2gen-iu")
        for number, case in enumerate(cases)
    ]
    language = json.loads((work.path("evaluate") / "scores.json").read_text())["scores"]
    ceiling = score(result.references, again, meteor=False)
    films = work.root / "films"
    write_films(open_dataset(work.path("draw"))["test"], films, 13)
    weights = sorted((work.path("finetune") / "model").glob("**/*.safetensors"))
    parameters = sum(tensor.numel() for file in weights for tensor in load_file(file).values())
    return {
        "films": len(cases),
        "f1": result.f1,
        "sides": side_accuracy(cases, result.hypotheses),
        "sides of the references": side_accuracy(cases, result.references),
        "language": {name: (language[name], ceiling[name]) for name in ("BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr")},
        "parameters": parameters,
        "seconds a report, two CPU threads": seconds_a_report(work.path("finetune"), films),
        "seconds of the stages": {stage: int((work.root / f"{stage}.seconds").read_text()) for stage in STAGES},
    }


def write_films(dataset: Any, folder: Path, count: int) -> None:
    """Writes the first films of a split as PNG files, named by their studies."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in dataset.select(range(min(count, len(dataset)))):
        Image.open(io.BytesIO(row["images"][0]["bytes"])).save(folder / f"{row['study_id']}.png")


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the results."""
    table = Table(title=f"F1 of findings, {found['films']:,} films that no stage has seen", title_justify="left")
    for name in ("finding", "model", "shuffled films", "usual report"):
        table.add_column(name, justify="left" if name == "finding" else "right")
    for name, row in found["f1"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)
    table = Table(title="language", title_justify="left")
    for name in ("score", "model", "a second report of the grammar"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, row in found["language"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)
    for name in ("sides", "sides of the references", "seconds a report, two CPU threads"):
        console.print(f"{name}: {found[name]:.3f}")
    console.print(f"{found['parameters']:,} parameters, {2 * found['parameters'] / 1e6:.1f} MB in fp16")
    console.print(f"seconds of the stages: {found['seconds of the stages']}")


def export(run: Path, target: Path, found: dict[str, Any], work: Work) -> None:
    """Writes the files of a run that reports need: weights in fp16, a card, and no paths of this machine."""
    target.mkdir(parents=True)
    for name in KEPT:
        source = run / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("checksums.json"))
        elif source.exists():
            shutil.copy(source, target / name)
    for file in target.glob("model/**/*.safetensors"):
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    recipe = yaml.safe_load((target / "recipe.yaml").read_text())
    recipe["data"]["root"] = recipe["model"]["encoder"]["weights"] = recipe["output"] = None
    (target / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (target / "README.md").write_text(card(found, work))
    (target / LIMITS).write_text(f"{SYNTHETIC_ONLY}\n")
    write_checksums(target / "model")
    measure_films(target, work.path("draw"))
    write_checksums(target, [name for name in (*KEPT, FILM_DISTANCE, LIMITS) if name != "model"])


def measure_films(run: Path, data: Path) -> None:
    """Measures and writes the film distance for the current weights of a run."""
    recipe = load_run_recipe(run, None, ["data.workers=0"], "generate")
    splits, size = open_dataset(data), recipe.model.encoder.image_size
    training, held_out = (ReportDataset(splits[name], recipe.data, size) for name in ("train", "validation"))
    measure_film_distance(recipe, run, training, held_out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def card(found: dict[str, Any], work: Work) -> str:
    """The model card."""
    rows = [f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |" for name, row in found["f1"].items()]
    language = [f"| {name} | {own:.3f} | {ceiling:.3f} |" for name, (own, ceiling) in found["language"].items()]
    return "\n".join(
        [
            "# A report model of synthetic chest films",
            "",
            "**It knows synthetic films only. It says nothing about real X-rays and is not for clinical use.**",
            "",
            f"Data: {work.count:,} studies of `emrrg preprocess phantom --seed {work.seed}`. A program draws every",
            "image, a grammar writes every report. No patient's image or text was used.",
            "",
            "Method: the three stages of emrrg (`box/pretrain`, `box/align`, `box/finetune`), from random weights.",
            f"{found['parameters']:,} parameters in fp16. `python tests/benchmarks/box.py` makes it again.",
            "",
            f"Scores on {found['films']:,} studies that no stage has seen. F1 of findings against the exact labels;",
            "the controls are the same reports shuffled between films, and the most frequent report:",
            "",
            "| finding | model | shuffled films | usual report |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Where a finding has a side and is found, the side is right in {found['sides']:.1%}.",
            "",
            "| score | model | a second report of the grammar for the same truth |",
            "|---|---|---|",
            *language,
            "",
            "Licence: Apache-2.0.",
            "",
        ]
    )


def main() -> None:
    """Runs unfinished stages, prints results, exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--export", type=Path, metavar="DIR")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    count = options.count or (200 if options.toy else 40_000)
    work = Work(options.work.resolve(), count, options.seed, options.toy)
    work.root.mkdir(parents=True, exist_ok=True)
    for stage in STAGES[: STAGES.index(options.until) + 1]:
        work.run(stage)
    if options.until != STAGES[-1]:
        return
    found = measure(work)
    show(found, Console())
    (work.root / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.export:
        export(work.path("finetune"), options.export, found, work)
        size = sum(file.stat().st_size for file in options.export.rglob("*") if file.is_file())
        print(f"{options.export}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
