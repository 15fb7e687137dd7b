"""Controls with other images: reports for blank films, for films of other studies, and of the nearest training study.

A film is an X-ray image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.console import progress_bar
from emrrg_cli.datasets.epochs import evaluation_batches
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.datasets.report_dataset import ReportDataset, collate
from emrrg_cli.evaluation.controls import derangements
from emrrg_cli.evaluation.predictions import Predictions, save_predictions
from emrrg_cli.evaluation.split_reports import OtherFilms, kept_predictions, write_predictions
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.models.views import average_views
from emrrg_cli.recipe.finetuning import FinetuneRecipe

BLANK, OTHERS, NEAREST = "blank_films", "other_films", "nearest_training_study"


@dataclass(frozen=True)
class FilmControls:
    """A model, the studies that it is evaluated on, and the recipe with its generation settings."""

    model: ReportGenerator
    dataset: ReportDataset
    references: Sequence[str]
    recipe: FinetuneRecipe
    accelerator: Any

    def reports(self, folder: Path, record: dict[str, Any], train: ReportDataset | None) -> dict[str, list[str]]:
        """Returns the reports of each control by name, one per study; matching reports of an earlier run are reused.

        Args:
            folder: Directory in which the reports are saved.
            record: Result of `made_with`; saved reports with a different record are written again.
            train: Training split in which to find the nearest study; None if it is not known.
        """
        orders: dict[str, Sequence[int] | None] = {BLANK: None}
        if len(self.dataset) > 1:
            orders[OTHERS] = other_patients(self.dataset)
        found = {}
        for name, order in orders.items():
            file = f"predictions_{name}.jsonl"
            written = kept_predictions(folder, record, self.dataset.study_ids, file)
            if written is None:
                written, _ = write_predictions(
                    self.model,
                    self.dataset,
                    self.references,
                    self.recipe,
                    self.accelerator,
                    folder=folder,
                    name=file,
                    films=OtherFilms(self.dataset, order),
                )
            found[name] = list(written.hypotheses)
        if train is not None and self.accelerator.is_main_process:
            closest = nearest(self.model, self.dataset, train, self.recipe, self.accelerator.device)
            found[NEAREST] = [train.reports[i] for i in closest]
            made = Predictions(self.dataset.study_ids, self.references, found[NEAREST])
            save_predictions(folder / f"predictions_{NEAREST}.jsonl", made)
        return found


def other_patients(dataset: ReportDataset) -> list[int]:
    """Returns for each study the index of the study whose films replace its own.

    The order is seeded; as few studies as possible get films of their own patient.
    """
    column = list(dataset.split["patient_id"])
    patients = [column[row] for row in dataset.rows]

    def own(order: Sequence[int]) -> int:
        return sum(patients[i] is not None and patients[i] == patients[other] for i, other in enumerate(order))

    orders = [order.tolist() for order in derangements(len(dataset), deals=50)]
    return min(orders, key=own)


def nearest(
    model: ReportGenerator, dataset: ReportDataset, train: ReportDataset, recipe: FinetuneRecipe, device: torch.device
) -> list[int]:
    """Returns for each study the index of the training study with the most similar image embedding (cosine)."""
    known = _embeddings(model, train, recipe, device, "embedding training films")
    asked = _embeddings(model, dataset, recipe, device, "embedding films")
    return [int(i) for chunk in torch.split(asked, 1024) for i in (chunk @ known.T).argmax(dim=1)]


@torch.no_grad()
def _embeddings(
    model: ReportGenerator, dataset: ReportDataset, recipe: FinetuneRecipe, device: torch.device, what: str
) -> Tensor:
    """Returns the mean visual token of each study, L2-normalised, `[n, d]` on the CPU."""
    batches = evaluation_batches(len(dataset), max(8, recipe.generation.batch_size), 0, 1)
    found = []
    was_training = model.training
    model.eval()
    with progress_bar(what, len(dataset)) as advance:
        for batch in load_batches(dataset, batches, collate, workers=recipe.data.workers):
            moved = batch.to(device)
            images = (moved.pixels[:, None].float() / 255 - model.mean) / model.std
            tokens = average_views(model.encoder(images), moved.views).float().mean(dim=1)
            found.append(torch.nn.functional.normalize(tokens, dim=1).cpu())
            advance(len(batch.indices))
    model.train(was_training)
    return torch.cat(found)
