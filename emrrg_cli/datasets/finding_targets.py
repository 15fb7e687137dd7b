"""Targets of the findings head: the labels of the rules labeler as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from emrrg_cli.labeling import OBSERVATIONS, label_report

FINDINGS = tuple(OBSERVATIONS)

# An observation that a report does not mention counts as negative, because reports name what is present.
_NUMBERS = {"positive": 1.0, "negative": 0.0, None: 0.0, "uncertain": math.nan}


def finding_targets(reports: Sequence[str]) -> Tensor:
    """Returns targets `[reports, 14]`, fp32: 1 positive, 0 negative or not mentioned, NaN uncertain."""
    rows = [[_NUMBERS[label] for label in label_report(report).values()] for report in reports]
    return torch.tensor(rows, dtype=torch.float32).view(len(reports), len(FINDINGS))
