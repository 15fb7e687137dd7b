"""Assesses a set of reports: scores, intervals, controls, clinical agreement, and figures on typical errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from emrrg_cli.console import err
from emrrg_cli.evaluation import bootstrap, clinical, controls
from emrrg_cli.evaluation.error_figures import error_figures
from emrrg_cli.evaluation.language import tokenized
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.evaluation.score_inputs import paired_texts
from emrrg_cli.labeling import label_reports
from emrrg_cli.scoring.comparison import Corpus, Floats, Pairs
from emrrg_cli.scoring.scores import SCORES, BertScore, Score, Unavailable
from emrrg_cli.vocabulary import CIDER, METEOR, Tokenizer

Labels = Sequence[clinical.Labels]
Present = Mapping[str, NDArray[np.bool_]]  # policy -> which labels each report has, [n, labels]
Counted = Mapping[str, Floats]  # policy -> `clinical.label_statistics` of each study, [n, 51]
Labeler = Callable[[Sequence[str]], Labels]


@dataclass(frozen=True)
class Options:
    """Options of `assess`.

    Attributes:
        train_reports: Training reports, used to find the most frequent one; None if they are not known.
        others: Reports of further controls by name, one per study, such as those written for blank films.
        labelers: Further labelers by name, in addition to `rules`.
        reference_labels: Labels of the references from the data set, used instead of those that a labeler extracts.
        merged: Scores of other tools by name, shown next to ours.
        meteor: Compute METEOR, which needs Java.
        tokenizer: The same as the argument of `score`.
        resamples: Number of bootstrap resamples for the intervals.
        bertscore: Name of the model for BERTScore; None skips the score.
    """

    train_reports: Sequence[str] | None = None
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labelers: Mapping[str, Labeler] = field(default_factory=dict)
    reference_labels: Labels | None = None
    merged: Mapping[str, float] = field(default_factory=dict)
    meteor: bool = True
    tokenizer: Tokenizer = "whitespace"
    resamples: int = bootstrap.RESAMPLES
    bertscore: str | None = None


@dataclass
class Assessment:
    """The result of `assess`: `record` is written as JSON; tables, tests and the page use the other fields."""

    record: dict[str, Any]
    statistics: dict[str, Floats]  # [n, k] for each score; the key is the score's first name
    labels: dict[str, tuple[Labels, Labels]]  # labels of references and hypotheses for each labeler
    dealt_cider: Floats  # [n], CIDEr of the shuffled reports, mean over the shuffles
    train_reports: Sequence[str] | None = None


def assess(predictions: Predictions, options: Options | None = None) -> Assessment:
    """Scores reports and their controls.

    Raises:
        UsageError: There is nothing to score, or all references are empty.
        RunError: The tokenizer needs Java, and Java is not installed.
    """
    options = options or Options()
    truth, written = paired_texts(predictions.references, predictions.hypotheses)
    references, hypotheses = tokenized([text for (text,) in truth], written, options.tokenizer)
    judge = _Judge(references, options)
    own = judge.pairs(hypotheses)
    statistics = judge.statistics(own)
    patients = bootstrap.numbered(predictions.patients, len(references))
    labels = _read_labels(predictions, options)
    record: dict[str, Any] = {"scores": judge.scores(statistics)}  # equal to those of `score` to 1e-9
    record["intervals"] = judge.intervals(statistics, options.resamples, patients)
    present = {name: (_present(ours), _present(theirs)) for name, (ours, theirs) in labels.items()}
    counted = {name: _count(*pair) for name, pair in present.items()}
    record["controls"], dealt_cider, dealt_counted = _controls(judge, hypotheses, present, options)
    record["clinical"] = {name: _clinical(counts) for name, counts in counted.items()}
    for name, grid in record["clinical"].items():
        _add_intervals(grid, counted[name], dealt_counted.get(name, {}), options.resamples, patients)
    record["patients"] = None if patients is None else bootstrap.independent(len(references), patients)
    few = bootstrap.few_studies(len(references), patients)
    record["left_out"] = judge.left_out | ({} if few is None else {"intervals": few})
    if options.merged:
        record["merged"] = dict(options.merged)
    cider = statistics[CIDER][:, 0]
    p = bootstrap.p_greater(cider - dealt_cider, patients=patients) if len(dealt_cider) else 1.0
    record["image_matters"], record["image_p"] = bool(p < controls.ALPHA), p
    dealt = float(dealt_cider.mean()) if len(dealt_cider) else math.nan
    record["image"] = controls.image_sentence(record["image_matters"], p, float(cider.mean()), dealt, len(cider))
    main = labels["chexbert" if "chexbert" in labels else "rules"]
    record["glance"] = error_figures(predictions, *main, options.train_reports)
    return Assessment(record, statistics, labels, dealt_cider, options.train_reports)


class _Judge:
    """Scores sets of reports against the same references; a score that cannot be computed is skipped from then on."""

    def __init__(self, references: Sequence[str], options: Options) -> None:
        self.references = references
        self.corpus = Corpus(references)
        self.scored: list[Score] = [*SCORES, *([] if options.bertscore is None else [BertScore(options.bertscore)])]
        self.left_out: dict[str, str] = {} if options.meteor else {METEOR: "not requested"}

    def pairs(self, hypotheses: Sequence[str]) -> Pairs:
        return self.corpus.compare(self.references, hypotheses)

    def statistics(self, pairs: Pairs, *, slow: bool = True) -> dict[str, Floats]:
        """Returns the statistics `[n, k]` of each score; `slow=False` skips the slow scores."""
        found = {}
        for one in self.scored:
            if (one.slow and not slow) or one.names[0] in self.left_out:
                continue
            try:
                found[one.names[0]] = one.statistics(pairs)
            except Unavailable as reason:
                self.left_out[one.names[0]] = str(reason)
                err.print(f"[yellow]{one.names[0]} is skipped:[/] {escape(str(reason))}", soft_wrap=True)
        return found

    def scores(self, statistics: Mapping[str, Floats]) -> dict[str, float | None]:
        """Returns all scores in the registry's order; a score that was not computed is None."""
        values: dict[str, float | None] = {}
        for one in self.scored:
            counted = statistics.get(one.names[0])
            row = None if counted is None else one.combine(counted.sum(axis=0), len(counted)).tolist()
            values.update(zip(one.names, row or [None] * len(one.names), strict=True))
        return values

    def intervals(
        self, statistics: Mapping[str, Floats], resamples: int, patients: bootstrap.Patients | None
    ) -> dict[str, list[float]]:
        ends: dict[str, list[float]] = {}
        for one in self.scored:
            counted = statistics.get(one.names[0])
            if counted is not None and not bootstrap.few_studies(len(counted), patients):
                rows = bootstrap.intervals(counted, one.combine, resamples, patients=patients)
                ends.update(zip(one.names, rows.tolist(), strict=True))
        return ends


def _read_labels(predictions: Predictions, options: Options) -> dict[str, tuple[Labels, Labels]]:
    labelers: dict[str, Labeler] = {"rules": label_reports, **options.labelers}
    found = {}
    for name, read in labelers.items():
        truth = options.reference_labels if options.reference_labels is not None else read(predictions.references)
        found[name] = (truth, read(predictions.hypotheses))
    return found


def _present(labels: Labels) -> Present:
    return {policy: clinical.present(labels, policy) for policy in clinical.POLICIES}


def _count(truth: Present, found: Present) -> Counted:
    return {policy: clinical.label_statistics(truth[policy], found[policy]) for policy in clinical.POLICIES}


def _clinical(counted: Counted) -> dict[str, Any]:
    """Returns all clinical figures of one labeler."""
    return {policy: clinical.clinical_figures(rows.sum(axis=0), len(rows)) for policy, rows in counted.items()}


def _add_intervals(
    grid: dict[str, Any], counted: Counted, dealt: Counted, resamples: int, patients: bootstrap.Patients | None
) -> None:
    """Adds the intervals of micro and macro F1, and the p values that they are above those of the shuffled reports."""
    for policy, rows in counted.items():
        if not bootstrap.few_studies(len(rows), patients):
            ends = bootstrap.intervals(rows, clinical.headline, resamples, patients=patients)
            grid[policy]["intervals"] = dict(zip(clinical.HEADLINE, ends.tolist(), strict=True))
        if policy in dealt:
            p = bootstrap.p_scores_greater(rows, dealt[policy], clinical.headline, patients=patients)
            grid[policy]["p_above_dealt"] = dict(zip(clinical.HEADLINE, p.tolist(), strict=True))


def _controls(
    judge: _Judge, hypotheses: Sequence[str], present: Mapping[str, tuple[Present, Present]], options: Options
) -> tuple[dict[str, Any], Floats, dict[str, Counted]]:
    """Scores the available controls.

    Also returns each study's mean over the shuffled reports: CIDEr `[n]`, and by labeler `clinical.label_statistics`.
    """
    made: dict[str, Any] = {}
    orders = controls.derangements(len(hypotheses))
    dealt_cider: Floats = np.zeros(0)
    dealt_counted: dict[str, Counted] = {}
    if orders:
        made["dealt"], dealt_cider, dealt_counted = _dealt(judge, hypotheses, present, orders)
    others = dict(options.others)
    known = options.train_reports or ()
    makers = {"most_frequent": controls.most_frequent, "most_typical": controls.most_typical}
    usual = {name: report for name, make in makers.items() if (report := make(known)) is not None}
    others = {name: [report] * len(hypotheses) for name, report in usual.items()} | others
    for name, reports in others.items():
        _, written = tokenized([], reports, options.tokenizer)
        statistics = judge.statistics(judge.pairs(written))
        made[name] = {"scores": judge.scores(statistics)}
        readers: dict[str, Labeler] = {"rules": label_reports, **options.labelers}
        made[name]["clinical"] = {
            labeler: _brief(_clinical(_count(truth, _present(readers[labeler](reports)))))
            for labeler, (truth, _) in present.items()
        }
    for name, report in usual.items():
        made[name]["report"] = report
    return made, dealt_cider, dealt_counted


def _dealt(
    judge: _Judge,
    hypotheses: Sequence[str],
    present: Mapping[str, tuple[Present, Present]],
    orders: Sequence[NDArray[np.int64]],
) -> tuple[dict[str, Any], Floats, dict[str, Counted]]:
    """Scores the reports in each shuffled order; returns the means, and those of each study as `_controls` does."""
    rows, cider, grids = [], [], []
    sums: dict[str, dict[str, Floats]] = {}  # of all orders; kept for each order, they would need gigabytes
    for number, order in enumerate(orders):
        pairs = judge.pairs([hypotheses[i] for i in order])
        statistics = judge.statistics(pairs, slow=number < controls.SLOW_DEALS)
        rows.append(judge.scores(statistics))
        cider.append(statistics[CIDER][:, 0])
        dealt = {name: {policy: own[order] for policy, own in found.items()} for name, (_, found) in present.items()}
        counted = {name: _count(truth, dealt[name]) for name, (truth, _) in present.items()}
        grids.append({name: _brief(_clinical(counts)) for name, counts in counted.items()})
        for name, counts in counted.items():
            totals = sums.setdefault(name, {})
            for policy, own in counts.items():
                totals[policy] = totals[policy] + own if policy in totals else own
    means: dict[str, float | None] = {}
    deviations: dict[str, float | None] = {}
    for name in rows[0]:
        known = [value for row in rows if (value := row[name]) is not None]
        means[name] = float(np.mean(known)) if known else None
        deviations[name] = float(np.std(known)) if known else None
    result = {
        "scores": means,
        "deviations": deviations,
        "deals": len(orders),
        "deals_of_slow_scores": min(len(orders), controls.SLOW_DEALS),  # METEOR and BERTScore
        "clinical": controls.mean_of(grids),
    }
    mean_counted: dict[str, Counted] = {
        name: {policy: total / len(orders) for policy, total in totals.items()} for name, totals in sums.items()
    }
    return result, np.mean(cider, axis=0), mean_counted


def _brief(grid: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a labeler's figures without those of single labels."""
    return {policy: {name: figures[name] for name in clinical.SETS} for policy, figures in grid.items()}
