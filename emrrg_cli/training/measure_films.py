"""Measures how the encoder sees the training films, so that `generate` can report films that differ from them."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from emrrg_cli.checksums import write_checksums
from emrrg_cli.console import progress_bar
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.datasets.report_dataset import ReportDataset, collate
from emrrg_cli.models.build import load_run_encoder
from emrrg_cli.models.film_distance import FILM_DISTANCE, LEAST, FilmDistance, Films, describe
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.training.run_setup import STATIC
from emrrg_cli.vocabulary import IMAGENET_MEAN, IMAGENET_STD

_TRAINING, _HELD_OUT = 1000, 500  # largest numbers of studies that are measured
_BATCH = 32


def measure_film_distance(
    recipe: FinetuneRecipe,
    run_dir: Path,
    training: ReportDataset,
    validation: ReportDataset | None,
    device: torch.device,
) -> None:
    """Writes `film_distance.safetensors` for the weights that a run has exported.

    The threshold comes from the validation split, or from a tenth of the training studies if there is no validation
    split. If these are fewer than ten studies, nothing is written.

    Raises:
        RunError: The file cannot be written.
    """
    chosen = _drawn(len(training), _TRAINING)
    if validation is None:
        others, rest = chosen[: len(chosen) // 10], chosen[len(chosen) // 10 :]
    else:
        others, rest = _drawn(len(validation), _HELD_OUT), chosen
    if len(others) < LEAST:
        return
    encoder = load_run_encoder(run_dir, recipe.model).to(device)  # as exported, not as it is at the last step
    center, spread = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with progress_bar("comparing films", len(rest) + len(others)) as advance:

        def films(dataset: ReportDataset, indices: list[int]) -> Films:
            batches = [indices[start : start + _BATCH] for start in range(0, len(indices), _BATCH)]
            found = []
            for batch in load_batches(dataset, batches, collate, workers=recipe.data.workers):
                with torch.no_grad():
                    pixels = batch.pixels.to(device)
                    images = pixels.float()[:, None] / 255
                    found.append(describe(encoder((images - center) / spread), pixels))
                advance(len(batch.views))
            tokens, looks = zip(*found, strict=True)
            return torch.cat(tokens), torch.cat(looks)

        fitted, tested = films(training, rest), films(validation or training, others)
    FilmDistance.fit(fitted, tested).save(run_dir)
    write_checksums(run_dir, (*STATIC, FILM_DISTANCE))


def _drawn(length: int, count: int) -> list[int]:
    return random.Random(0).sample(range(length), min(length, count))
