"""Runs all stages on IU X-Ray and the ablation: pretrain, align, finetune and evaluate, for rows and seeds of a table.

    python tests/benchmarks/iu_xray.py DATA WORK [--films DIR ...] [--more DIR ...] [--rows recipe,X,none]
        [--seeds 1,2,3] [--gpus 4] [--each 3] [--mps] [--minutes 9]
        [--add 'NAME = KEY=VALUE ...'] [--add 'NAME of ROW = KEY=VALUE ...']

DATA is IU X-Ray in R2Gen's layout (`annotation.json` and `images/`) or a dataset directory of it; --reports names the
folder with NLMCXR_reports.tgz, for context and views. --films are further images for stage 1 (folders or dataset
directories; films of IU's validation or test studies are refused), --more further reports with images for stages 1
and 2.

"recipe" is the whole method. The other rows are trained by cross-entropy alone, which takes half of the time; "X" is
their base. Rows are in order of importance, each with all seeds before the next one. The seed applies to all
stages; rows with the same stages 1 and 2 share them. `--add` adds a row: its changes apply to stage 3, or with
`pretrain.` or `align.` before the key to that stage; `of ROW` decodes the finished runs of that row with other settings
and trains nothing. `--list` shows the rows.

With several runs on a GPU, give --mps, which starts NVIDIA MPS: four runs of stage 3 then train on 600 studies/s
together, one alone on 250.

`--minutes 9` limits the length of a call: training is stopped, and the next call with the same arguments resumes it.
Finished jobs are not repeated. WORK/records.json lists them: with only this file in WORK, finished rows are not run
again. Scores are of the validation split. `--test --frozen COMMIT` shows those of the test split, and only if COMMIT is
checked out; `--predict-test ROWS` already writes the test reports of these rows, so that the choice between them can be
made later on validation. WORK/table.md has mean and standard deviation over the seeds that have finished. `--tiny`
makes every model small, to try the script on a CPU (`--gpus 0`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from job_queue import Job, Queue, Records, peak_memory

F1 = ("F1 of 14", "F1 of 13")  # with and without "No Finding"
SCORES = ("BLEU_1", "BLEU_4", "ROUGE_L", "METEOR", "CIDEr", "shuffled CIDEr")
SCORES += (*F1, *(f"shuffled {name}" for name in F1), "distinct", "contradictory", "F1 without them", "typical CIDEr")
COSTS = ("trained, millions", "minutes", "peak MiB")
LORA = ("X", "Z", "dt", "B", "C", "in_proj", "x_proj", "dt_proj", "out_proj", "patch_embed")
AUGMENT = ("rotate", "shift", "scale", "brightness", "contrast")
ONCE = "train.validate_every_epochs=1000"  # the last epoch is always validated, and kept
EARLIER_AGREEMENT = "generation.consensus_scores={BLEU_1: 1, ROUGE_1: 1.5, findings: 0.8}"
CROSS_ENTROPY = ("train.self_critical=null", "train.epochs=15", EARLIER_AGREEMENT)  # as in the ablation so far
NO_FINDINGS_PROMPT = (
    *("model.findings=false", "model.findings_prompt=false", "model.findings_prompt_labels=false"),
    "model.findings_threshold=null",
)
REWARDS = "train.self_critical.rewards={{BLEU_1: 0.5, BLEU_4: 1, ROUGE_L: 1, {}, CIDEr: {}, {}}}".format
WORD_RECALL_3 = (REWARDS("word_recall: 3", 8, "findings: 0.75"),)
FULL = ("model.adapter.targets=full", "train.lr_scale.encoder=0.2")
BEAMS = (
    "generation.consensus=null",
    "generation.do_sample=false",
    "generation.temperature=1.0",
    "generation.num_beams=3",
    "generation.min_new_tokens=30",
    "generation.length_penalty=2.0",
)
ENCODER = "model.encoder.{}=".format
TOY = (
    *(ENCODER(key) + value for key, value in (("size", "null"), ("d_model", "64"), ("depth", "4"))),
    *(ENCODER("image_size") + "128", "data.limit=16", "train.epochs=2", "train.batch_size=8", "train.trackers=[]"),
)
TOYS = {
    "pretrain": (*TOY, "model.decoder_width=64", "train.max_steps=2"),
    "align": (*TOY, "train.warmup_epochs=0", "model.dim=32"),
    "finetune": (*TOY, "model.llm.scratch.hidden_size=64", "train.validation_limit=4"),
}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        changes: `key=value` of stage 3, or with `pretrain.` or `align.` before the key, of that stage.
        without: stages that are skipped.
        of: the row whose runs are decoded with other settings; None: the row has its own runs.
    """

    name: str
    changes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    of: str | None = None

    def of_stage(self, stage: str) -> tuple[str, ...]:
        """Returns the changes of one stage."""
        others = ("pretrain.", "align.")
        if stage != "finetune":
            return tuple(change.removeprefix(f"{stage}.") for change in self.changes if change.startswith(f"{stage}."))
        return tuple(change for change in self.changes if not change.startswith(others))


def changed(name: str, *changes: str) -> Row:
    """Makes a row that is trained by cross-entropy alone, with changes."""
    return Row(name, (*CROSS_ENTROPY, *changes))


def decoded(name: str, of: str, *changes: str) -> Row:
    """Makes a row that decodes the runs of another one with changes."""
    return Row(name, changes, of=of)


# In order of importance, so that a call that ends early has the important rows.
ROWS = [
    Row("recipe"),
    changed("X"),
    changed("none", "model.adapter.targets=none"),
    changed("full", *FULL),
    Row("no stage 1", CROSS_ENTROPY, without=("pretrain",)),
    Row("no stage 2", CROSS_ENTROPY, without=("align",)),
    changed("hybrid off", "model.hybrid.every=null", "model.visual_prompt=full"),
    changed("LLM", "model.adapter.targets=[llm]"),  # of a frozen LLM
    changed("indication", "data.context=[indication]"),
    changed("no findings in the prompt", *NO_FINDINGS_PROMPT),
    changed("14 findings", "align.model.findings_set=chexpert", "model.findings_set=chexpert"),
    *(changed(name, f"model.adapter.targets=[{name}]") for name in ("in_proj", "out_proj")),
    Row("no stage 1 or 2", CROSS_ENTROPY, without=("pretrain", "align")),
    Row("random encoder", (*CROSS_ENTROPY, "model.adapter.targets=none"), without=("pretrain", "align")),
    *(changed(name, f"model.adapter.targets=[{name}]") for name in (*LORA[1:5], *LORA[6:8], "patch_embed")),
    changed("prompt full", "model.visual_prompt=full"),
    changed("views concatenated", "model.views=concat"),
    changed("gate from attention", "model.hybrid.gate=attention"),
    changed("views told", "model.view_tokens=true"),
    changed("views told, concatenated", "model.view_tokens=true", "model.views=concat"),
    changed("balance", "data.balance=2"),
    Row("recipe with indication", ("data.context=[indication]",)),
    *(
        Row(f"recall {recall}", (REWARDS(f"ROUGE_1: {recall}", cider, f"findings: {findings}"),))
        for recall, cider, findings in ((1, 4, 0.5), (2, 6, 0.5), (3, 8, 0.5), (4, 10, 0.75))
    ),
    Row("recall 3 with indication", (REWARDS("ROUGE_1: 3", 8, "findings: 0.5"), "data.context=[indication]")),
    Row("word recall 3", WORD_RECALL_3),
    Row("word recall 3, cross-entropy", (*WORD_RECALL_3, "train.self_critical.cross_entropy=0.43")),
    Row("shorter", ("train.epochs=16",)),
    Row("findings by pairs", (REWARDS("ROUGE_1: 4", 10, "F1_rules: 0.75"),)),
    Row("more for findings", (REWARDS("ROUGE_1: 4", 10, "findings: 1.5"),)),
    *(Row(f"contrast {value}", (f"train.self_critical.contrast={value}",)) for value in (0, 0.25, 1)),
    changed("no augmentation", *(f"data.augment.{what}=0" for what in AUGMENT)),
    changed("no dropout", "model.llm.scratch.dropout=0"),
    changed("no smoothing", "train.label_smoothing=0"),
    changed("no average", "train.ema=null"),
    *(decoded(f"{row}, beams", row, *BEAMS) for row in ("recipe", "X")),
    *(decoded(f"threshold {value}", "recipe", f"model.findings_threshold={value}") for value in (0.1, 0.2, 0.25)),
    *(decoded(f"consensus of {samples}", "recipe", f"generation.consensus={samples}") for samples in (24, 48, 192)),
    *(decoded(f"temperature {value}", "recipe", f"generation.temperature={value}") for value in (0.5, 0.85, 1.0)),
    *(
        decoded(f"words recalled {value}", "recipe",
                f"generation.consensus_scores={{BLEU_1: 1, ROUGE_1: {value}, findings: 0.8}}")
        for value in (0.5, 1.0)
    ),
]  # fmt: skip


def parse_row(text: str) -> Row:
    """Parses `NAME = CHANGES` or `NAME of ROW = CHANGES`."""
    head, sign, changes = text.partition(" = ")
    name, _, of = head.partition(" of ")
    if not sign or not name.strip() or not changes.strip():
        sys.exit(f"--add {text!r} is not 'NAME = KEY=VALUE ...' or 'NAME of ROW = KEY=VALUE ...'")
    return Row(name.strip(), tuple(shlex.split(changes)), of=of.strip() or None)


class Chain:
    """The jobs of rows and seeds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work.resolve()
        self.jobs: dict[str, Job] = {}
        data = Path(options.data).resolve()
        self.data, self.before = data, ()
        if (data / "annotation.json").is_file():
            self.data = self.work / "data"
            reports = ("--reports", str(Path(options.reports).resolve())) if options.reports else ()
            arguments = ("preprocess", "iu_xray", str(data), str(self.data), "--size", "original", *reports)
            limit = ("--limit", "16") if options.tiny else ()
            self.before = (self._add(Job("data", (*arguments, *limit), self.data, weight=1.0)),)

    def _add(self, job: Job) -> str:
        self.jobs.setdefault(job.name, job)
        return job.name

    def _training(self, stage: str, name: str, changes: Sequence[str], needs: Sequence[str], weight: float) -> str:
        toys = TOYS[stage] if self.options.tiny else ()
        recipe = self.options.recipe if stage == "finetune" else f"iu_xray/{stage}"
        arguments = (stage, recipe, ONCE, *changes[:1], *toys, *changes[1:])
        return self._add(Job(name, arguments, self.work / name, (*self.before, *needs), weight))

    def goal(self, row: Row, seed: int, rows: dict[str, Row], split: str) -> str:
        """Adds all jobs of a row and a seed; returns the name of its evaluation."""
        decoding: tuple[str, ...] = ()
        run = self._run(row if row.of is None else rows[row.of], seed)
        if row.of is not None:
            decoding = row.of_stage("finetune")
        place = self.work / run / "evaluation" / f"{split}{_digest(decoding)}"
        if self.options.samples and BEAMS[0] not in decoding:
            decoding = (*decoding, "evaluation.samples=true")
        arguments = ("evaluate", *decoding, "--model", str(self.work / run), "--split", split)
        controlled = split == "test" and seed in self.options.image_controls
        arguments += ("--output", str(place), "--overwrite", *(("--image-controls",) if controlled else ()))
        return self._add(Job(f"{_file(row.name)}-{seed}-{split}", arguments, place, (run,), self._share))

    @property
    def _share(self) -> float:
        return 1 / self.options.each

    def _run(self, row: Row, seed: int) -> str:
        row = replace(row, changes=(*row.changes, *self.options.overrides))
        seeds = f"train.seed={seed}"
        weights: tuple[str, ...] = ()
        needs: tuple[str, ...] = ()
        if "pretrain" not in row.without:
            sets = _sets(self.data, *self.options.more, *self.options.films)
            changes = row.of_stage("pretrain")
            name = f"pretrain{_digest(changes)}-{seed}"
            given: tuple[str, ...] = (f"data.sets={sets}", f"data.held_out=[{self.data}]")
            if not self.options.films:
                given += ("train.epochs=60",)  # nearly as many steps as with other films
            needs = (self._training("pretrain", name, (*given, *changes, seeds), (), min(1.0, 2 * self._share)),)
            weights = (f"model.encoder.weights={self.work / name}",)
        root = f"data.root={self.data}"
        if "align" not in row.without:
            changes = (*weights, *row.of_stage("align"))
            alone = "" if weights else "-alone"
            name = f"align{_digest((*row.of_stage('pretrain'), *row.of_stage('align')))}{alone}-{seed}"
            own = any(change.startswith("data.sets=") for change in changes)
            several = f"data.sets={_sets(self.data, *self.options.more)}" if self.options.more else root
            data = () if own else (several,)
            needs = (self._training("align", name, (*data, *changes, seeds), needs, min(1.0, 2 * self._share)),)
            weights = (f"model.encoder.weights={self.work / name}",)
        changes = (root, *weights, seeds, *row.of_stage("finetune"))
        return self._training("finetune", f"{_file(row.name)}-{seed}", changes, needs, self._share)

    def when_done(self, job: Job) -> dict[str, Any]:
        """Returns the values of a run or an evaluation for the table."""
        if job.arguments[0] == "evaluate":
            return {"scores": read_scores(job.output / "scores.json")}
        if job.arguments[0] != "finetune":
            return {}
        checkpoints = job.output / "checkpoints"
        costs = {"trained": trained_parameters(checkpoints) / 1e6}
        shutil.rmtree(checkpoints)  # they are large; the model is kept
        return {"costs": costs | {"memory": peak_memory(self.work / "logs" / f"{job.name}.txt")}}


def _sets(*roots: str | Path) -> str:
    return f"[{', '.join(f'{{root: {Path(root).resolve()}}}' for root in roots)}]"


def _file(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _digest(changes: Sequence[str]) -> str:
    return f"-{zlib.crc32(' '.join(changes).encode()):08x}" if changes else ""


def read_scores(file: Path) -> dict[str, float]:
    """Returns the scores for the table from an evaluation."""
    result = json.loads(file.read_text())
    own, dealt = result["scores"], result["controls"].get("dealt", {})
    found = {name: own.get(name) for name in SCORES[:5]}
    found |= _f1("", result)
    if dealt:
        found["shuffled CIDEr"] = dealt["scores"]["CIDEr"]
        found |= _f1("shuffled ", dealt)
    if typical := result["controls"].get("most_typical"):
        found["typical CIDEr"] = typical["scores"]["CIDEr"]
    found["distinct"] = result["glance"]["distinct_reports"]["number"]
    contradictory = result["glance"]["contradictory_reports"]
    found |= {"contradictory": contradictory["hypotheses"], "F1 without them": contradictory["micro_f1_without"]}
    return {name: float(value) for name, value in found.items() if value is not None}


def _f1(prefix: str, result: dict[str, Any]) -> dict[str, float]:
    grid = result["clinical"]["rules"]["uncertain_negative"]
    return {f"{prefix}{name}": grid[name[-2:]]["micro"]["f1"] for name in F1}


def trained_parameters(checkpoints: Path) -> int:
    """Counts the trained parameters of a run in its last checkpoint."""
    from safetensors import safe_open

    last = checkpoints / (checkpoints / "last").read_text().strip() / "trainable.safetensors"
    with safe_open(last, "pt") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def table(rows: Sequence[Row], seeds: Sequence[int], split: str, records: dict[str, dict[str, Any]]) -> str:
    """Makes a Markdown table: a line per row, mean and standard deviation over finished seeds."""
    lines = [f"| {split} | seeds | {' | '.join((*SCORES, *COSTS))} |", "|" + "---|" * (2 + len(SCORES) + len(COSTS))]
    for row in rows:
        names = [f"{_file(row.name)}-{seed}" for seed in seeds]
        found = [
            records[f"{name}-{split}"]["scores"] for name in names if "scores" in records.get(f"{name}-{split}", {})
        ]
        cells = [_cell([scores[name] for scores in found if name in scores], name) for name in SCORES]
        runs = [records[name] for name in names if "costs" in records.get(name, {})]
        cells.append(_cell([run["costs"]["trained"] for run in runs], "cost"))
        cells.append(_cell([run["seconds"] / 60 for run in runs], "cost"))
        cells.append(_cell([run["costs"]["memory"] for run in runs if run["costs"]["memory"]], "count"))
        lines.append(f"| {row.name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], kind: str) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    if kind in ("distinct", "count"):
        return f"{mean:,.0f}"
    if kind == "cost":
        return f"{mean:.1f}"
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def check_frozen(work: Path, commit: str | None) -> None:
    """Checks that the test split is read only once, with settings that are frozen in a commit."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=here).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        if git("status", "--porcelain", "--untracked-files=no"):
            sys.exit("--test: there are changes that are not committed")
    except (OSError, subprocess.CalledProcessError):
        head = os.environ.get("EMRRG_COMMIT", "")  # a copy without its history
    if not commit or not head or head != commit:
        sys.exit(
            f"--test needs --frozen COMMIT with the commit that is checked out ({head or 'not known: EMRRG_COMMIT'})"
        )
    marker = work / "test-read.txt"
    if marker.exists() and marker.read_text().strip() != commit:
        sys.exit(f"{marker}: the test split was read with commit {marker.read_text().strip()}, and is read once")
    work.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{commit}\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("work", type=Path)
    parser.add_argument("--reports")
    parser.add_argument("--films", nargs="*", default=[])
    parser.add_argument(
        "--more", nargs="*", default=[], help="dataset directories of further reports for stages 1 and 2"
    )
    parser.add_argument("--rows", help="divided by semicolons or commas; default: all but decodings")
    parser.add_argument(
        "--add", action="append", default=[], help="a row of your own; after --rows, or where --rows names it"
    )
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--recipe", default="iu_xray/finetune-small", help="of stage 3")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--each", type=int, default=2, help="runs of stage 3 on one GPU at a time")
    parser.add_argument("--taken", type=float, nargs="*", default=[], help="share of each GPU that other programs use")
    parser.add_argument("--mps", action="store_true", help="start NVIDIA MPS on each GPU")
    parser.add_argument("--minutes", type=float, help="of this call; default: until all is done")
    parser.add_argument("--test", action="store_true", help="read the test split; needs --frozen")
    parser.add_argument("--frozen", metavar="COMMIT")
    parser.add_argument("--predict-test", metavar="ROWS", help="rows whose test reports are written, but not shown")
    parser.add_argument(
        "--image-controls",
        type=int,
        nargs="*",
        metavar="SEED",
        help="seeds whose test evaluation has image controls, which take three times as long; default: all",
    )
    parser.add_argument("--samples", action="store_true", help="evaluations keep their samples, for agreement.py")
    parser.add_argument("--overrides", nargs="*", default=[], help="changes of every row, as in --add")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true", help="show the rows and end")
    return parser.parse_args()


def chosen_rows(options: argparse.Namespace) -> tuple[list[Row], dict[str, Row]]:
    """Returns the requested rows, and all rows by name."""
    added = [parse_row(text) for text in options.add]
    known = {row.name: row for row in (*ROWS, *added)}
    if options.rows is None:
        frozen = "small" not in options.recipe
        return [row for row in ROWS if row.of is None and (frozen or row.name != "LLM")] + added, known
    names = divided(options.rows)
    wanted = [*names, *divided(options.predict_test or ""), *(row.of for row in added if row.of is not None)]
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"unknown rows: {', '.join(unknown)}; --list shows them")
    return [known[name] for name in names] + [row for row in added if row.name not in names], known


def divided(names: str) -> list[str]:
    """Divides names of rows at semicolons, or at commas if there is no semicolon."""
    return [name.strip() for name in names.split(";" if ";" in names else ",") if name.strip()]


def main() -> None:
    """Runs the rows and prints the table at the end."""
    options = parse_arguments()
    rows, known = chosen_rows(options)
    if options.list:
        for row in rows if options.rows else known.values():
            print(f"{row.name}{f' (runs of {row.of})' if row.of else ''}: {' '.join((*row.without, *row.changes))}")
        return
    if options.test:
        check_frozen(options.work, options.frozen)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.image_controls is None:
        options.image_controls = seeds
    chain = Chain(options)
    shown, hidden, goals = "test" if options.test else "validation", divided(options.predict_test or ""), []
    for row in rows:
        splits = [shown, "test"] if row.name in hidden and not options.test else [shown]
        goals += [chain.goal(row, seed, known, split) for split in splits for seed in seeds]

    def write_table(records: Records) -> None:
        (chain.work / "table.md").write_text(table(rows, seeds, shown, records.entries))

    queue = Queue(
        chain.jobs.values(),
        chain.work,
        options.gpus,
        chain.when_done,
        on_change=write_table,
        mps=options.mps,
        taken=options.taken,
    )
    done = queue.run(goals, options.minutes)
    write_table(queue.records)
    print(f"\n{'all done' if done else 'not all is done: run the same command again'}\n")
    print((chain.work / "table.md").read_text())
    sys.exit(0 if done or not queue.failed else 1)


if __name__ == "__main__":
    main()
