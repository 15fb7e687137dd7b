"""What an evaluation leaves behind: `scores.json`, and files a study for people and programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.evaluation.assess import Assessment
from emrrg_cli.evaluation.predictions import Predictions
from emrrg_cli.files import atomic_write_text

DATA = "scores.json"


def write_assessment(
    folder: Path,
    result: dict[str, Any],
    predictions: Predictions,
    found: Assessment,
    films: ReportDataset | None = None,
) -> dict[str, Any]:
    """Writes the result to `folder` and returns it.

    Args:
        films: where the images of the studies are; None: not known.

    Raises:
        RunError: it cannot be written.
    """
    atomic_write_text(folder / DATA, json.dumps(result, indent=2) + "\n")
    return result
