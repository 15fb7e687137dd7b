"""Offline rule-based labels of radiology reports for CheXpert's 14 observations; see `policy` for what they mean."""

from __future__ import annotations

from emrrg_cli.labeling.labeler import label_report, label_reports, positive_labels
from emrrg_cli.labeling.policy import FIVE, OBSERVATIONS, Label

__all__ = ["FIVE", "OBSERVATIONS", "Label", "label_report", "label_reports", "positive_labels"]
