"""Targets of the findings head: the findings that reports name, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from emrrg_cli.labeling import FURTHER_FINDINGS, OBSERVATIONS, further_findings, label_report

# Targets have all; a head learns the first ones, as many as it has outputs.
FINDINGS = (*OBSERVATIONS, *FURTHER_FINDINGS)
FINDING_SETS = {"chexpert": OBSERVATIONS, "extended": FINDINGS}

# An observation that a report does not mention counts as negative, because reports name what is present.
_NUMBERS = {"positive": 1.0, "negative": 0.0, None: 0.0, "uncertain": math.nan}


def finding_targets(reports: Sequence[str]) -> Tensor:
    """Returns targets `[reports, 23]`, fp32: 1 positive, 0 negative or not mentioned, NaN uncertain."""
    return torch.tensor([_row(report) for report in reports], dtype=torch.float32).view(len(reports), len(FINDINGS))


def _row(report: str) -> list[float]:
    further = further_findings(report)
    row = [_NUMBERS[label] for label in label_report(report).values()]
    return [*row, *(float(name in further) for name in FURTHER_FINDINGS)]
