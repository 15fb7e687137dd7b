"""The whole toolkit in one command, on synthetic films: draw, train, evaluate, generate, and write a page."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.evaluation.findings import finding_scores
from emrrg_cli.files.records import read_jsonl
from emrrg_cli.phantom.reader import read_labels
from emrrg_cli.reporting.page import Card, Page, write_page

INTRO = (
    "Synthetic films, drawn by emrrg with known findings, and reports by a tiny model that was trained on other "
    "synthetic films for a few minutes. The page shows that all parts work together. It says nothing about real "
    "radiographs."
)
LEGEND = (
    ("found: in the film and in the report", "good"),
    ("invented: in the report, not in the film", "bad"),
    ("missed: in the film, not in the report", "missed"),
)


@dataclass(frozen=True)
class DemoResult:
    """Results of a demo: one entry per film of the test split, and by finding the F1 of three kinds of reports."""

    study_ids: list[str]
    truth: list[set[str]]
    references: list[str]
    hypotheses: list[str]
    f1: dict[str, list[float]]


def write_films(dataset: Any, folder: Path, count: int) -> None:
    """Writes the first films of a split as PNG files, named by their studies."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in dataset.select(range(min(count, len(dataset)))):
        Image.open(io.BytesIO(row["images"][0]["bytes"])).save(folder / f"{row['study_id']}.png")


def read_result(data: Path, scores: Path) -> DemoResult:
    """Compares the findings in the predictions of `emrrg evaluate` with the known ones.

    Two controls do not look at the image: the model's own reports dealt to other films, and the most frequent report of
    the training split for every film.
    """
    splits = open_dataset(data)
    predictions = {row["study_id"]: row for row in read_jsonl(scores / "predictions.jsonl")}
    test = splits["test"].select_columns(["study_id", "labels"])
    rows = [(row["study_id"], set(row["labels"])) for row in test if row["study_id"] in predictions]
    ids, truth = [row[0] for row in rows], [row[1] for row in rows]
    hypotheses = [predictions[i]["hypothesis"] for i in ids]
    found = [read_labels(text) for text in hypotheses]
    shuffled = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    labels = [frozenset(row) for row in splits["train"]["labels"]]
    usual = [set(Counter(labels).most_common(1)[0][0])] * len(truth)
    answers = [finding_scores(truth, answer) for answer in (found, shuffled, usual)]
    names = ["micro", "macro", *sorted(set().union(*truth))]
    f1 = {name: [scores.get(name, {"f1": 0.0})["f1"] for scores in answers] for name in names}
    return DemoResult(ids, truth, [predictions[i]["reference"] for i in ids], hypotheses, f1)


def write_demo_page(path: Path, data: Path, result: DemoResult, scores: dict[str, Any], commands: list[str]) -> None:
    """Writes the page: scores, commands, and films with reference, generated report and findings."""
    different = len(set(result.hypotheses))
    test = open_dataset(data)["test"]
    rows = {study: row for row, study in enumerate(test["study_id"])}
    cards = []
    for study, truth, reference, report in list(zip(*_columns(result), strict=True))[:24]:
        found = read_labels(report)
        tags = [(name, "good" if name in truth else "bad") for name in sorted(found)]
        tags += [(name, "missed") for name in sorted(truth - found)]
        picture = Image.open(io.BytesIO(test[rows[study]]["images"][0]["bytes"]))
        cards.append(Card(f"{study} (synthetic)", [picture], report, reference, tags))
    language = {name: ["needs Java" if value is None else f"{value:.3f}"] for name, value in scores.items()}
    findings = {"": ["model", "shuffled images", "usual report"]}
    findings |= {name: [f"{value:.2f}" for value in row] for name, row in result.f1.items()}
    count = len(result.study_ids)
    tables = [(f"Language, {count} films", language), (f"F1 of findings, {count} films", findings)]
    intro = f"{INTRO} The model wrote {different} different reports for {count} films."
    write_page(path, Page("emrrg demo: synthetic chest films", intro, cards, tables, commands, LEGEND))


def _columns(result: DemoResult) -> tuple[list[str], list[set[str]], list[str], list[str]]:
    return result.study_ids, result.truth, result.references, result.hypotheses
