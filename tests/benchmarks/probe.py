"""What an encoder has learned: a linear probe of its frozen features on the labels of a dataset directory.

    python tests/benchmarks/probe.py DATASET_DIR --encoder RUN [RUN ...] [--seeds 3]

A study's features are the mean over its views and over the encoder's tokens, standardised. One logistic regression a
label is fitted on the training split, with the weight decay (one for all labels) that is best on validation, and scored
on the test split. The same is done with the same encoder at random weights, several times. DATASET_DIR needs a column
`labels`: `emrrg preprocess phantom` writes one, `emrrg preprocess folder --labels-column NAME` takes one from a table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from emrrg_cli.data.dataset_dir import open_dataset
from emrrg_cli.data.image_dataset import ImageDataset, SplitImages, collate_images
from emrrg_cli.data.loading import load_batches
from emrrg_cli.errors import UsageError
from emrrg_cli.models.arm.pretrainer import ArmPretrainer, find_pretrainer, load_pretrainer
from emrrg_cli.models.report_generator import IMAGENET_MEAN, IMAGENET_STD

SPLITS = ("train", "validation", "test")
DECAYS = [10.0**k for k in range(-5, 2)]  # of half the squared weights, beside the mean loss of an example


def encoders(path: str) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """The encoder at a path, `[b, 3, h, w] -> [b, tokens, d]`, and a function that makes one like it at random."""
    try:
        find_pretrainer(Path(path))
    except UsageError:
        from emrrg_cli.models.arm.encoder import ArmEncoder
        from emrrg_cli.models.transfer import load_encoder

        trained = load_encoder(path)
        d_state = trained.layers[0].mixer.A_log.shape[-1]
        sizes = (trained.d_model, len(trained.layers), trained.image_size, d_state)
        return trained, lambda: ArmEncoder(*sizes).eval()
    model = load_pretrainer(path)
    encoder = model.encoder
    return encoder, lambda: ArmPretrainer(
        encoder.d_model,
        len(encoder.layers),
        encoder.image_size,
        model.d_state,
        model.decoder_width,
        len(model.blocks),
        model.taps,
    ).encoder.eval()


@torch.no_grad()
def features(encoder: nn.Module, split: Any, device: torch.device, batch_size: int, workers: int) -> Tensor:
    """Mean over views and tokens: fp64 `[studies, d]`."""
    size = encoder.image_size
    dataset = ImageDataset(SplitImages(split), size)
    encoder.to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    batches = [list(range(i, min(i + batch_size, len(dataset)))) for i in range(0, len(dataset), batch_size)]
    found = []
    for batch in load_batches(dataset, batches, collate_images, workers=workers):
        images = (batch.to(device).pixels[:, None].float() / 255 - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = encoder(images)
        found.append(tokens.float().mean(dim=1).cpu())
    views = [len(images) for images in split.select_columns(["views"])["views"]]
    return torch.stack([study.mean(dim=0) for study in torch.cat(found).double().split(views)])


def fit(x: Tensor, y: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Logistic regressions of all labels at once: weights `[d, labels]` and biases `[labels]`."""
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="none").mean(0).sum()
        loss = loss + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def auroc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve; ties count half."""
    _, places, counts = np.unique(scores.numpy(), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    positive = truth.numpy() > 0
    p, n = int(positive.sum()), int((~positive).sum())
    return float((ranks[places][positive].sum() - p * (p + 1) / 2) / (p * n))


def probe(x: dict[str, Tensor], y: dict[str, Tensor]) -> list[float]:
    """AUROC of each label on the test split."""
    centre, scale = x["train"].mean(0), x["train"].std(0).clamp(min=1e-8)
    x = {name: (value - centre) / scale for name, value in x.items()}

    def score(weight: Tensor, bias: Tensor, split: str) -> list[float]:
        logits = x[split] @ weight + bias
        return [auroc(logits[:, i], y[split][:, i]) for i in range(logits.shape[1])]

    fits = [fit(x["train"], y["train"], decay) for decay in DECAYS]
    best = max(fits, key=lambda fitted: statistics.mean(score(*fitted, "validation")))
    return score(*best, "test")


def targets(splits: Any, fewest: int) -> tuple[list[str], dict[str, Tensor], list[str]]:
    """Labels that `fewest` studies of every split have, and as many lack; the other labels.

    Between them, by split, whether a study has each of the first: 0 or 1, `[studies, labels]`.
    """
    rows = {name: [set(labels or ()) for labels in splits[name]["labels"]] for name in SPLITS}
    every = sorted(set().union(*(labels for split in rows.values() for labels in split)))
    counts = {label: [sum(label in labels for labels in rows[name]) for name in SPLITS] for label in every}
    kept = [
        label
        for label in every
        if all(fewest <= count <= len(rows[name]) - fewest for count, name in zip(counts[label], SPLITS, strict=True))
    ]
    y = {name: torch.tensor([[float(label in labels) for label in kept] for labels in rows[name]]) for name in SPLITS}
    return kept, {name: value.double() for name, value in y.items()}, [label for label in every if label not in kept]


def _shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET_DIR")
    parser.add_argument("--encoder", nargs="+", required=True, metavar="RUN", help="runs of the same sizes")
    parser.add_argument("--seeds", type=int, default=3, help="encoders with random weights")
    parser.add_argument("--fewest", type=int, default=5, help="studies with and without a label, or it is left out")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    console = Console()
    splits = open_dataset(options.dataset)
    if missing := [name for name in SPLITS if name not in splits or "labels" not in splits[name].column_names]:
        raise SystemExit(f"{options.dataset}: no labels, or no split, for {', '.join(missing)}")
    labels, y, left_out = targets(splits, options.fewest)
    if not labels:
        raise SystemExit(f"no label has {options.fewest} studies with and without it in every split")

    def scores(encoder: nn.Module) -> list[float]:
        x = {
            name: features(encoder, splits[name], torch.device(options.device), options.batch_size, options.workers)
            for name in SPLITS
        }
        return probe(x, y)

    loaded = [encoders(path) for path in options.encoder]
    trained = [scores(encoder) for encoder, _ in loaded]
    fresh = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        fresh.append(scores(loaded[0][1]()))

    table = Table("label", "studies with it in test", "pre-trained", "random", title="AUROC of a linear probe, test")
    for i, label in enumerate(labels):
        table.add_row(
            label, str(int(y["test"][:, i].sum())), _shown([s[i] for s in trained]), _shown([s[i] for s in fresh])
        )
    macro = [[statistics.mean(s) for s in group] for group in (trained, fresh)]
    table.add_row("macro", str(len(y["test"])), *(_shown(values) for values in macro), style="bold", end_section=True)
    for name, values, paths in (
        ("pre-trained", macro[0], options.encoder),
        ("random", macro[1], [f"seed {seed}" for seed in range(options.seeds)]),
    ):
        for value, path in zip(values, paths, strict=True):
            table.add_row(
                f"macro, {path}", "", *((f"{value:.3f}", "") if name == "pre-trained" else ("", f"{value:.3f}"))
            )
    console.print(table)
    if left_out:
        console.print(f"too rare, left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
