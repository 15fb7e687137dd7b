"""Offline rule-based labels of radiology reports for CheXpert's 14 observations; see `policy` for what they mean."""

from __future__ import annotations

from emrrg_cli.labeling.further import FURTHER_FINDINGS, further_findings
from emrrg_cli.labeling.labeler import contradicted_labels, label_report, label_reports, positive_labels
from emrrg_cli.labeling.policy import ABNORMAL, FIVE, OBSERVATIONS, Label

__all__ = [
    "ABNORMAL",
    "FIVE",
    "FURTHER_FINDINGS",
    "OBSERVATIONS",
    "Label",
    "contradicted_labels",
    "further_findings",
    "label_report",
    "label_reports",
    "positive_labels",
]
