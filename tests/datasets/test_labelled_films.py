"""Films with labels and no reports: what the head on findings learns from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from emrrg_cli.datasets.align_dataset import PairDataset, collate_pairs
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.finding_targets import FINDINGS, finding_targets
from emrrg_cli.datasets.labelled_films import NO_REPORT, LabelledFilms, label_targets
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import DataSettings


def _known(row: torch.Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in zip(FINDINGS, row, strict=True) if not math.isnan(value)}


def test_names_of_chestxray14_and_findings_without_labels() -> None:
    rows = [["Effusion", "Infiltration"], ["No Finding"], ["Emphysema", "Pleural_Thickening"], ["mass"]]
    targets = [_known(row) for row in label_targets([{"labels": row} for row in rows])]
    names = ("No Finding", "Lung Lesion", "Lung Opacity", "Pleural Effusion", "Pleural Other", "Hyperinflation")
    assert all(set(row) == set(names) for row in targets)
    assert [{name for name, value in row.items() if value} for row in targets] == [
        {"Pleural Effusion", "Lung Opacity"}, {"No Finding"}, {"Pleural Other", "Hyperinflation"}, {"Lung Lesion"},
    ]  # fmt: skip


def test_uncertain_labels_are_not_known() -> None:
    rows = [
        {"labels": ["Edema"], "labels_uncertain": ["Pneumonia"], "labels_absent": ["Fracture"]},
        {"labels": ["Pneumonia"], "labels_uncertain": [], "labels_absent": []},
    ]
    first, second = (_known(row) for row in label_targets(rows))
    assert first == {"Edema": 1.0, "Fracture": 0.0}
    assert second == {"Edema": 0.0, "Pneumonia": 1.0, "Fracture": 0.0}


def test_films_without_labels_are_skipped(labelled_dataset: Path, tiny_dataset: Path) -> None:
    films = LabelledFilms(open_dataset(labelled_dataset)["train"], DataSettings(), 16)
    assert (len(films), films.without_text) == (12, 4)
    example = films[1]
    assert (example.report, example.pixels.shape) == (NO_REPORT, (1, 16, 16))
    assert example.findings is not None
    assert _known(example.findings) == _known(films.targets[1]) == {
        "No Finding": 0.0, "Cardiomegaly": 0.0, "Pleural Effusion": 1.0,
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"no column labels, which labels_only needs"):
        LabelledFilms(open_dataset(tiny_dataset)["train"], DataSettings(), 16)
    split = open_dataset(labelled_dataset)["train"].map(lambda row: {"labels": ["Fibrosis"]})
    with pytest.raises(UsageError, match="none of its labels is known"):
        LabelledFilms(split, DataSettings(), 16)


def test_a_batch_of_both_kinds(labelled_dataset: Path, tiny_dataset: Path, tokenizer: Any) -> None:
    reports = ReportDataset(open_dataset(tiny_dataset)["train"], DataSettings(), 16)
    films = LabelledFilms(open_dataset(labelled_dataset)["train"], DataSettings(), 16)
    both = PairDataset([reports, films], [1.0, 0.5])
    assert both.counts == [16, 6]
    expected = torch.cat([finding_targets(reports.reports), films.targets])
    torch.testing.assert_close(both.finding_targets(), expected, equal_nan=True)
    batch = collate_pairs([both[0], both[16], both[1]], tokenizer, 8, findings=True, labelled=True)
    assert batch.paired is not None
    assert batch.paired.tolist() == [True, False, True]
    assert batch.findings is not None
    torch.testing.assert_close(batch.findings, expected[[0, 16, 1]], equal_nan=True)
    assert batch.attention_mask.sum(dim=1).min() >= 1  # the text tower has something to read
    assert collate_pairs([both[0]], tokenizer, 8, findings=True).paired is None


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from emrrg_cli.models.text_encoder import train_text_tokenizer

    return train_text_tokenizer(["the heart is enlarged .", "no effusion ."], 300)
