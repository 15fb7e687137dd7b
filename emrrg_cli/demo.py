"""Scores the reports of `emrrg demo` against the known findings, and writes its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_text import clean_report, sentence_spans
from emrrg_cli.decoding.cards import CardFile
from emrrg_cli.decoding.outputs import Row
from emrrg_cli.default_model import read_limits
from emrrg_cli.evaluation.findings import finding_scores
from emrrg_cli.phantom.reader import read_labels
from emrrg_cli.reporting.gallery import About, write_gallery

MAP_NOTE = "The map is the model's attention to the film, averaged over the words of the sentence."
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


def read_result(data: Path, reports: Mapping[str, str]) -> DemoResult:
    """Compares the findings in reports for a test split of synthetic films with the known ones.

    Two controls ignore the image: the model's own reports shuffled between films, and the most frequent report of
    the training split (or, without one, of the test split) for every film.

    Args:
        reports: Report of each study.
    """
    splits = open_dataset(data)
    rows = [
        row for row in splits["test"].select_columns(["study_id", "labels", "findings"]) if row["study_id"] in reports
    ]
    ids, truth = [row["study_id"] for row in rows], [set(row["labels"]) for row in rows]
    references = [clean_report(row["findings"], "r2gen-iu") for row in rows]
    hypotheses = [reports[study] for study in ids]
    found = [read_labels(text) for text in hypotheses]
    shuffled = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    labels = [frozenset(row) for row in splits["train" if "train" in splits else "test"]["labels"]]
    usual = [set(Counter(labels).most_common(1)[0][0])] * len(truth)
    answers = [finding_scores(truth, answer) for answer in (found, shuffled, usual)]
    names = ["micro", "macro", *sorted(set().union(*truth))]
    f1 = {name: [scores.get(name, {"f1": 0.0})["f1"] for scores in answers] for name in names}
    return DemoResult(ids, truth, references, hypotheses, f1)


def write_demo_page(
    folder: Path,
    reports: Sequence[Row],
    result: DemoResult,
    scores: Mapping[str, float | None],
    intro: str,
    commands: Sequence[str],
    run_dir: Path,
) -> Path:
    """Writes `page.html`: scores, and films with reference, report and findings, compared sentence by sentence.

    Args:
        folder: Folder of the demo; the films and maps in its `reports` are shown.
        reports: Records of `emrrg generate`.
        scores: Language scores.
        intro: Introduction of the page.
        commands: Commands that made the reports.
        run_dir: Run of the model.

    Returns:
        The page.
    """
    known = {
        study: (truth, text)
        for study, truth, text in zip(result.study_ids, result.truth, result.references, strict=True)
    }
    rows = [compared(row, *known[row["study"]]) for row in reports if row["study"] in known]
    language = {name: [f"{value:.3f}"] for name, value in scores.items() if value is not None}
    findings = {"": ["model", "shuffled films", "usual report"]}
    findings |= {name: [f"{value:.2f}" for value in row] for name, row in result.f1.items()}
    count, different = len(rows), len(set(result.hypotheses))
    about = About(
        facts=[("Command", command) for command in commands],
        reports=count,
        map_note=MAP_NOTE,
        limits=read_limits(run_dir),
        title="emrrg demo: synthetic chest films",
        intro=f"{intro} The model wrote {different} different reports for {count} films.",
        tables=[(f"F1 of findings, {count} films", findings), (f"Language, {count} films", language)],
        legend=LEGEND,
    )
    return write_gallery(folder, about, CardFile(folder / "reports", "").join(rows), count)[0]


def compared(row: Row, truth: set[str], reference: str) -> Row:
    """Returns a record of `generate` with the fields that compare it with the truth; see `write_gallery`."""
    report, found = row["report"], read_labels(row["report"])
    tags = [(name, "good" if name in truth else "bad") for name in sorted(found)]
    tags += [(name, "missed") for name in sorted(truth - found)]
    spans = [(one["start"], one["end"]) for one in row["sentences"]]
    sentences = [reference[start:end] for start, end in sentence_spans(reference)]
    return row | {
        "tags": tags,
        "sentence_tags": [_tag(report[start:end], truth, "bad") for start, end in spans],
        "reference": [(sentence, _tag(sentence, found, "missed")) for sentence in sentences],
    }


def _tag(sentence: str, others: set[str], alone: str) -> str:
    """Returns `alone` if a sentence states a finding that the others lack, `good` if it states one that they have."""
    stated = read_labels(sentence)
    return alone if stated - others else "good" if stated else ""
