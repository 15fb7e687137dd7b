"""Films with labels but without reports, which train only the findings head of stage 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.datasets.finding_targets import FINDINGS
from emrrg_cli.datasets.report_dataset import Example, projections_of, read_views
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import DataSettings

NO_REPORT = "."  # placeholder, because the text tower needs a text

_NO_FINDING = "No Finding"
# Names of ChestX-ray14 (Wang et al., CVPR 2017) for the observations of CheXpert. Emphysema, fibrosis and hernia have
# no counterpart in CheXpert; they only mean that there is a finding.
_OTHER_NAMES = {
    "Effusion": "Pleural Effusion",
    "Emphysema": "Hyperinflation",
    "Hernia": "Hiatal Hernia",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural Thickening": "Pleural Other",
}


class LabelledFilms(Dataset[Example]):
    """Studies of one split with the labels of its column `labels`; studies without labels are skipped.

    Args:
        split: a `datasets.Dataset` with the columns of a dataset directory, images not decoded.
        settings: number of views, limit.
        image_size: side in pixels that images are resized to.

    Attributes:
        reports: `NO_REPORT` for each study.
        targets: `[studies, 23]` from `label_targets`.

    Raises:
        UsageError: the split has no column `labels`, or none of its labels is known.
    """

    def __init__(self, split: Any, settings: DataSettings, image_size: int) -> None:
        self.split, self.settings, self.image_size = split, settings, image_size
        if "labels" not in split.column_names:
            raise UsageError(
                f"{settings.root or 'the data set'} has no column labels, which labels_only needs",
                hint="`emrrg preprocess folder --table FILE --labels-column NAME` writes it.",
            )
        columns = [name for name in ("labels", "labels_uncertain", "labels_absent") if name in split.column_names]
        rows = [{name: row[name] or [] for name in columns} for row in split.select_columns(columns)]
        self.rows = [index for index, row in enumerate(rows) if any(row.values())][: settings.limit]
        self.targets = label_targets([rows[index] for index in self.rows])
        if not self.targets.isfinite().any():
            raise UsageError(
                f"{settings.root or 'the data set'}: none of its labels is known",
                hint=f"Known: {', '.join((*FINDINGS, *_OTHER_NAMES))}.",
            )
        self.reports = [NO_REPORT] * len(self.rows)
        self.without_text = len(split) - len(self.rows) if settings.limit is None else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        record = self.split[self.rows[index]]
        pixels = read_views(record, self.split, self.settings.max_views, self.image_size)
        projections = projections_of(record["views"], len(pixels))
        return Example(index, record["study_id"], pixels, NO_REPORT, {}, projections, self.targets[index])


def label_targets(rows: Sequence[dict[str, list[str]]]) -> Tensor:
    """Returns targets `[studies, 23]`, fp32: 1 for a present finding, 0 for an absent one, NaN if unknown.

    A finding that no study has as a label was not annotated: it is unknown for all studies. Uncertain findings are
    unknown. No Finding is unknown if the data set has no label for it.

    Args:
        rows: names in `labels` of each study, and in `labels_uncertain` and `labels_absent` if the data set has them.
    """
    named = [{column: {_observation(name) for name in names} for column, names in row.items()} for row in rows]
    looked_for = {name for row in named for names in row.values() for name in names}
    targets = torch.full((len(rows), len(FINDINGS)), math.nan)
    for row, study in enumerate(named):
        for column, finding in enumerate(FINDINGS):
            if finding in looked_for and finding not in study.get("labels_uncertain", ()):
                targets[row, column] = float(finding in study["labels"])
    return targets


def _observation(name: str) -> str:
    plain = " ".join(name.replace("_", " ").split())
    known = {finding.lower(): finding for finding in FINDINGS} | {old.lower(): new for old, new in _OTHER_NAMES.items()}
    return known.get(plain.lower(), plain)
