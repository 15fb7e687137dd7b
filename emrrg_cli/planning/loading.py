"""Counts the training studies of a recipe's data set, and measures how fast this machine reads their images."""

from __future__ import annotations

import time
from functools import partial
from itertools import chain, count, islice
from typing import Any

import pyarrow.compute as pc
import torch

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.epochs import EpochOrder
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.datasets.report_dataset import ReportDataset, collate
from emrrg_cli.errors import RunError
from emrrg_cli.models.report_generator import encode_report
from emrrg_cli.planning.llms import PlanTokenizer
from emrrg_cli.recipe.finetuning import FinetuneRecipe

# Number of different studies that a trial reads (repeatedly if it needs more), and its time limit in seconds.
_STUDIES, _BUDGET_S = 512, 10.0


def count_studies(recipe: FinetuneRecipe) -> tuple[int, float]:
    """Returns the number of studies per epoch, and the mean number of images used per study.

    Reads neither images nor the manifest.

    Args:
        recipe: A recipe with `data.root`.

    Raises:
        RunError: The data set has no split named train, or no training study has text.
    """
    dataset = ReportDataset(_training_split(recipe), recipe.data, recipe.model.encoder.image_size)
    images = pc.list_value_length(dataset.split.data.column("images")).fill_null(0).to_pylist()
    most = recipe.data.max_views or max(images)
    return len(dataset), sum(min(images[row], most) for row in dataset.rows) / len(dataset)


def validates(recipe: FinetuneRecipe) -> bool:
    """Whether there is validation. A data set that is not known counts as one with a validation split."""
    return recipe.data.root is None or "validation" in open_dataset(recipe.data.root)


def writes_reports(recipe: FinetuneRecipe) -> bool:
    """Whether validation writes reports."""
    return recipe.train.select == "score" and validates(recipe)


def seconds_per_study(recipe: FinetuneRecipe, micro: int) -> float:
    """Measures the seconds per study that the training data loader needs with the recipe's number of workers.

    Args:
        recipe: A recipe with `data.root`.
        micro: Number of studies per micro-batch.

    Raises:
        RunError: The data set has no split named train, or a study cannot be read.
    """
    limit = min(_STUDIES, recipe.data.limit or _STUDIES)
    settings = recipe.data.model_copy(update={"limit": limit})
    dataset = ReportDataset(_training_split(recipe), settings, recipe.model.encoder.image_size)
    order = EpochOrder(len(dataset), min(micro, len(dataset)), seed=recipe.train.seed)
    # The first two rounds are not timed: they include the start of the workers and batches that were prefetched.
    a_round = max(1, settings.workers)
    batches = chain.from_iterable(order.epoch(epoch) for epoch in count())
    encode = partial(encode_report, PlanTokenizer(), max_tokens=settings.max_report_tokens)
    loader = load_batches(
        dataset,
        list(islice(batches, 8 * a_round)),
        partial(collate, encode=encode),
        workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
    )
    began = time.perf_counter()
    studies = 0
    for number, batch in enumerate(loader, start=1):
        if number > 2 * a_round:
            studies += len(batch.indices)
        elif number == 2 * a_round:
            began = time.perf_counter()
        if number % a_round == 0 and studies and time.perf_counter() - began > _BUDGET_S:
            break
    return (time.perf_counter() - began) / studies


def _training_split(recipe: FinetuneRecipe) -> Any:
    assert recipe.data.root is not None
    splits = open_dataset(recipe.data.root)
    if "train" not in splits:
        raise RunError(f"{recipe.data.root}: this dataset directory has no split named train")
    return splits["train"]
