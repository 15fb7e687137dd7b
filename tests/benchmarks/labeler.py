"""Compares the rule-based labeler with Open-i's manual MeSH annotation of IU X-Ray, and measures reports per second.

python tests/benchmarks/labeler.py IU_TEXT_DIR [--predictions FILE ...]

IU_TEXT_DIR has `openi_reports.csv` (uid, findings, impression, mesh_major) and R2Gen's `annotation.json`. Findings and
impression are labelled together, because the annotators read both. Uncertain counts as positive. The labeler was tuned
on "tuning" (R2Gen's training split and the studies outside its list); "held out" is R2Gen's validation and test splits
together. Studies without text and studies that were not indexed are skipped.

--predictions compares the labels of generated reports with the annotation instead. Each FILE is a predictions.jsonl of
`emrrg evaluate` on IU X-Ray, or one of its image controls beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import NamedTuple

from mesh import MESH_OBSERVATIONS, NOT_INDEXED, observations_from_mesh
from rich.console import Console
from rich.table import Table

from emrrg_cli.labeling import label_report, label_reports


class Study(NamedTuple):
    """A study of IU X-Ray: its report, and the observations that the annotators indexed."""

    uid: str
    text: str
    truth: frozenset[str]


class Agreement(NamedTuple):
    """Counts of one observation."""

    hits: int
    false: int
    missed: int

    @property
    def precision(self) -> float:
        return self.hits / max(1, self.hits + self.false)

    @property
    def recall(self) -> float:
        return self.hits / max(1, self.hits + self.missed)

    @property
    def f1(self) -> float:
        return 2 * self.hits / max(1, 2 * self.hits + self.false + self.missed)


def read_studies(folder: Path) -> dict[str, list[Study]]:
    """Returns the studies of the portions `tuning` and `held out`."""
    annotation = json.loads((folder / "annotation.json").read_text())
    held_out = {
        study["id"].split("_")[0].removeprefix("CXR") for split in ("val", "test") for study in annotation[split]
    }
    portions: dict[str, list[Study]] = {"tuning": [], "held out": []}
    with (folder / "openi_reports.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            text = f"{row['findings']}\n{row['impression']}".strip()
            if text and NOT_INDEXED not in row["mesh_major"]:
                study = Study(row["uid"], text, observations_from_mesh(row["mesh_major"]))
                portions["held out" if row["uid"] in held_out else "tuning"].append(study)
    return portions


def agreement(studies: list[Study], counted: tuple[str, ...] = ("positive", "uncertain")) -> dict[str, Agreement]:
    """Counts matches for each observation; labels in `counted` count as present."""
    labels = label_reports(study.text for study in studies)
    table = {}
    for name in MESH_OBSERVATIONS:
        pairs = [(name in study.truth, found[name] in counted) for study, found in zip(studies, labels, strict=True)]
        table[name] = Agreement(pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)))
    return table


def macro_f1(table: dict[str, Agreement]) -> float:
    """Computes the mean F1 of the observations."""
    return sum(row.f1 for row in table.values()) / len(table)


def show(title: str, found: dict[str, Agreement]) -> None:
    """Prints the table of one portion."""
    table = Table(title=title, title_justify="left")
    for column in ("observation", "precision", "recall", "F1", "studies", "false", "missed"):
        table.add_column(column, justify="left" if column == "observation" else "right")
    for name, row in found.items():
        scores = (f"{value:.3f}" for value in (row.precision, row.recall, row.f1))
        table.add_row(name, *scores, *map(str, (row.hits + row.missed, row.false, row.missed)))
    table.add_row("macro", "", "", f"{macro_f1(found):.3f}")
    Console().print(table)


def of_predictions(file: Path, portions: dict[str, list[Study]]) -> list[Study]:
    """Returns the indexed studies of a prediction file, with the generated reports as their texts."""
    known = {study.uid: study for studies in portions.values() for study in studies}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    reports = {row["study_id"].split("_")[0].removeprefix("CXR"): row["hypothesis"] for row in rows}
    return [known[uid]._replace(text=text) for uid, text in reports.items() if uid in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("tuning", "held out"), help="one portion instead of both")
    parser.add_argument("--predictions", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    portions = read_studies(options.folder)
    for file in options.predictions:
        studies = of_predictions(file, portions)
        show(f"{file}: {len(studies)} studies, uncertain counts as negative", agreement(studies, ("positive",)))
    if options.predictions:
        return
    texts = [study.text for study in portions["tuning"]]
    label_report("warm up")  # compiles the patterns
    for run in ("first pass", "sentences known"):
        start = time.process_time()
        label_reports(texts)
        print(f"{len(texts) / (time.process_time() - start):,.0f} reports a CPU second, {run}")
    for portion, studies in portions.items():
        if options.only in (None, portion):
            show(f"{portion}: {len(studies)} studies, uncertain counts as positive", agreement(studies))
            show(f"{portion}: uncertain counts as negative", agreement(studies, ("positive",)))


if __name__ == "__main__":
    main()
