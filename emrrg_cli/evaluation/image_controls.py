"""Controls that look at films: the model on blank films and on those of others, and the nearest training study."""

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
from emrrg_cli.evaluation.split_reports import OtherFilms, kept_predictions, write_predictions
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.models.views import average_views
from emrrg_cli.recipe.finetuning import FinetuneRecipe

BLANK, OTHERS, NEAREST = "blank_films", "other_films", "nearest_training_study"


@dataclass(frozen=True)
class FilmControls:
    """A model, the studies it is assessed on, and how it writes."""

    model: ReportGenerator
    dataset: ReportDataset
    references: Sequence[str]
    recipe: FinetuneRecipe
    accelerator: Any

    def reports(self, folder: Path, record: dict[str, Any], train: ReportDataset | None) -> dict[str, list[str]]:
        """Reports by name of control, one a study; those of an earlier evaluation are used again.

        Args:
            folder: keeps them.
            record: as `made_with` gives it; reports that were made with another are written anew.
            train: the training split, for the nearest study; None: not known.
        """
        orders: dict[str, Sequence[int] | None] = {BLANK: None}
        if len(self.dataset) > 1:
            orders[OTHERS] = other_patients(self.dataset)
        found = {}
        for name, order in orders.items():
            file = f"predictions_{name}.jsonl"
            written = kept_predictions(folder, record, file) or write_predictions(
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
        return found


def other_patients(dataset: ReportDataset) -> list[int]:
    """Whose films each study is shown: a seeded order in which, where it can be, nobody sees their own patient's."""
    column = list(dataset.split["patient_id"])
    patients = [column[row] for row in dataset.rows]

    def own(order: Sequence[int]) -> int:
        return sum(patients[i] is not None and patients[i] == patients[other] for i, other in enumerate(order))

    orders = [order.tolist() for order in derangements(len(dataset), deals=50)]
    return min(orders, key=own)


def nearest(
    model: ReportGenerator, dataset: ReportDataset, train: ReportDataset, recipe: FinetuneRecipe, device: torch.device
) -> list[int]:
    """The training study whose image embedding is most similar to that of each study, by cosine."""
    known = _embeddings(model, train, recipe, device, "embedding training films")
    asked = _embeddings(model, dataset, recipe, device, "embedding films")
    return [int(i) for chunk in torch.split(asked, 1024) for i in (chunk @ known.T).argmax(dim=1)]


@torch.no_grad()
def _embeddings(
    model: ReportGenerator, dataset: ReportDataset, recipe: FinetuneRecipe, device: torch.device, what: str
) -> Tensor:
    """Mean visual token of each study, of length 1, `[n, d]` on the CPU."""
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
