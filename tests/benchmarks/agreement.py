"""Compares scores by which consensus decoding chooses among its samples, without sampling again.

    emrrg evaluate --model RUN --data DIR --split validation evaluation.samples=true
    python tests/benchmarks/agreement.py RUN/evaluation/validation [...] --scores '{BLEU_1: 1, findings: 0.8}' ...

Each --scores is a value of `generation.consensus_scores`; "own" stands for the reports that the evaluation has. Several
evaluations are the seeds of one method: the table has their mean and standard deviation. Choose on validation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from emrrg_cli.evaluation import clinical
from emrrg_cli.evaluation.language import score
from emrrg_cli.labeling import label_reports
from emrrg_cli.scoring.agreement import most_agreed
from emrrg_cli.scoring.meteor import java_path
from emrrg_cli.vocabulary import AGREEMENTS

SCORES = ("BLEU_1", "BLEU_4", "ROUGE_L", "METEOR", "CIDEr")
NAMES = (*SCORES, "F1 of 13", "words", "different")


def chosen(samples: Mapping[str, int], scores: Mapping[str, float]) -> str:
    """Returns the sample that agrees best with all samples of a study."""
    texts = [text for text, times in samples.items() for _ in range(times)]
    return texts[most_agreed(texts, scores)]


def together(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the studies with the samples of all runs."""
    pooled: dict[str, dict[str, Any]] = {}
    for row in chain.from_iterable(runs):
        study = pooled.setdefault(row["study_id"], {"reference": row["reference"], "samples": Counter()})
        study["samples"].update(row["samples"])
    return list(pooled.values())


def measured(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Returns the figures of one line of the table."""
    found = score(references, hypotheses, meteor=java_path() is not None)
    figures = {name: value for name in SCORES if (value := found[name]) is not None}
    truth, named = (clinical.present(label_reports(side), "uncertain_negative") for side in (references, hypotheses))
    f1 = clinical.headline(clinical.label_statistics(truth, named).sum(axis=0), len(references))
    figures["F1 of 13"] = float(f1[clinical.HEADLINE.index("F1_micro_13")])
    figures["words"] = statistics.mean(len(text.split()) for text in hypotheses)
    return figures | {"different": float(len(set(hypotheses)))}


def line(name: str, runs: Sequence[Mapping[str, float]]) -> str:
    cells = []
    for figure in NAMES:
        values = [run[figure] for run in runs if figure in run]
        digits = 3 if figure not in ("words", "different") else 1
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "-")
    return f"| {name} | {' | '.join(cells)} |"


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (folder / name).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Prints a line for each agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", type=Path, help="evaluation directories with samples.jsonl")
    parser.add_argument("--scores", nargs="+", default=[], metavar="{NAME: WEIGHT}")
    parser.add_argument(
        "--together", action="store_true", help="choose among the samples of all evaluations: an ensemble"
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    agreements = [yaml.safe_load(text) for text in options.scores]
    for scores in agreements:
        if not isinstance(scores, dict) or set(scores) - set(AGREEMENTS):
            parser.error(f"--scores {scores}: give {{NAME: WEIGHT}} with names of {', '.join(AGREEMENTS)}")
    print(f"| agreement | {' | '.join(NAMES)} |\n|{'---|' * (1 + len(NAMES))}")
    own = [read(folder, "predictions.jsonl") for folder in options.evaluations]
    runs = [measured([row["reference"] for row in rows], [row["hypothesis"] for row in rows]) for rows in own]
    print(line("own", runs), flush=True)
    sampled = [read(folder, "samples.jsonl") for folder in options.evaluations]
    if options.together:
        sampled = [together(sampled)]
    with ProcessPoolExecutor(options.processes) as pool:
        for scores in agreements:
            runs = []
            for rows in sampled:
                best = pool.map(partial(chosen, scores=scores), [row["samples"] for row in rows], chunksize=16)
                runs.append(measured([row["reference"] for row in rows], list(best)))
            print(line(", ".join(f"{name} {weight:g}" for name, weight in scores.items()), runs), flush=True)


if __name__ == "__main__":
    main()
