"""Epochs that show studies with a finding more often than normal ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.datasets.finding_targets import finding_targets
from emrrg_cli.datasets.report_dataset import Example, ReportDataset
from emrrg_cli.labeling import OBSERVATIONS


class BalancedStudies(Dataset[Example]):
    """The studies of a data set; an epoch contains studies with a finding `factor` times.

    A study has a finding if the rules labeler reads any observation except No Finding and Support Devices as positive.
    Each such study is taken `floor(factor)` times, and a random part of them, drawn anew for each epoch, once more. The
    draw depends only on the seed and the epoch.

    Args:
        dataset: the training studies.
        factor: 1 or more.
    """

    def __init__(self, dataset: ReportDataset, factor: float) -> None:
        self.dataset = dataset
        counted = [k for k, name in enumerate(OBSERVATIONS) if name not in ("No Finding", "Support Devices")]
        abnormal = (finding_targets(dataset.reports)[:, counted] == 1).any(dim=1)
        self.abnormal, self.normal = abnormal.nonzero().flatten(), (~abnormal).nonzero().flatten()
        self._taken = round(factor * len(self.abnormal))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[index]

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; training calls it before each study."""
        self.dataset.set_epoch(epoch)

    @property
    def epoch_length(self) -> int:
        """Number of studies in an epoch, including repeated ones."""
        return len(self.normal) + self._taken

    def draw_epoch(self, generator: torch.Generator) -> Tensor:
        """Draws the studies of an epoch in order: int64 `[epoch_length]`."""
        whole, rest = divmod(self._taken, max(1, len(self.abnormal)))
        again = self.abnormal[torch.randperm(len(self.abnormal), generator=generator)[:rest]]
        chosen = torch.cat([self.normal, self.abnormal.repeat(whole), again])
        return chosen[torch.randperm(len(chosen), generator=generator)]
