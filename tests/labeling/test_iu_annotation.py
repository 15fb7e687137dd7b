"""The labeler against the manual annotation of IU X-Ray, where it is at hand.

The labeler is tuned on the portion `tuning` only (R2Gen's training split and studies outside its list); `held out` is
R2Gen's validation and test splits together. Text: findings and impression. Uncertain counts as positive. Measured once
tuning was over: macro F1 .921 on both; most false labels are hedges ("may represent atelectasis") without a term.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from emrrg_cli import clean_report
from emrrg_cli.labeling import label_reports


@pytest.mark.slow
@pytest.mark.parametrize("portion", ["tuning", "held out"])
def test_agrees_with_the_annotators(shared_data: Path, benchmark: ModuleType, portion: str) -> None:
    table = benchmark.agreement(benchmark.read_studies(shared_data / "iu_text")[portion])
    scores = {name: round(row.f1, 3) for name, row in table.items()}
    assert benchmark.macro_f1(table) >= 0.88, scores
    assert min(scores.values()) >= 0.75, scores


def test_cleaned_reports_read_the_same(shared_data: Path, benchmark: ModuleType) -> None:
    """R2Gen's cleaning removes commas and slashes, so a few labels change; at most 2 % of the reports have one."""
    texts = [study.text for study in benchmark.read_studies(shared_data / "iu_text")["tuning"]]
    cleaned = [clean_report(text.replace("\n", ". "), "r2gen-iu") for text in texts]
    pairs = zip(label_reports(texts), label_reports(cleaned), strict=True)
    assert sum(raw != clean for raw, clean in pairs) <= 0.02 * len(texts)
