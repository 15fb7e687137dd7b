"""Evaluates an encoder by a linear probe of its frozen features on the labels of a dataset directory.

    python tests/benchmarks/probe.py DATASET_DIR --encoder RUN [RUN ...] [--seeds 3] [--score-on validation test]
        [--pool mean deviation quarters]

The features of a study are the pooled output tokens of one encoder block, averaged over views and standardised. One
ridge regression per label is fitted on the training split. The block and the weight decay, the same for all labels,
have the best macro AUROC in a cross-validation by patient on the training split; the scored splits are not used for
this. The same is done with the same encoder with random weights, several times. The difference has a bootstrap interval
over patients. Each pooling method has its row; the labels are shown for the method that cross-validation chooses for
each encoder.

DATASET_DIR needs a column `labels`: `emrrg preprocess phantom` writes one, and `emrrg preprocess folder
--labels-column NAME` copies one from a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.image_dataset import ImageDataset, SplitImages, collate_images
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.errors import UsageError
from emrrg_cli.models.arm.pretrainer import ArmPretrainer, find_pretrainer, load_pretrainer
from emrrg_cli.vocabulary import IMAGENET_MEAN, IMAGENET_STD

DECAYS = [10.0**k for k in range(-4, 3)]  # factor of the squared weights, per mean squared error of an example
FOLDS = 5


def encoders(path: str) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Loads the encoder at a path, `[b, 3, h, w] -> [b, tokens, d]`, and a function that makes a random one like it."""
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


def _quarters(tokens: Tensor) -> Tensor:
    # Row-major patches; a class token, if there is one, is in the middle.
    count = tokens.shape[1]
    side = math.isqrt(count)
    if side * side != count:
        middle = (count - 1) // 2
        tokens = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
        side = math.isqrt(count - 1)
    squares = tokens.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.adaptive_avg_pool2d(squares, 2).flatten(1)


# `[b, tokens, d] -> [b, d]`, `[b, 2 d]` and `[b, 4 d]`.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda tokens: tokens.mean(dim=1),
    "deviation": lambda tokens: torch.cat([tokens.mean(dim=1), tokens.std(dim=1)], dim=1),
    "quarters": _quarters,
}


@torch.no_grad()
def features(
    encoder: nn.Module, split: Any, pools: Sequence[str], device: torch.device, batch_size: int, workers: int
) -> dict[str, Tensor]:
    """Computes the features of each block by pooling method, the last after the final norm: `[blocks, studies, d]`."""
    size = encoder.image_size
    dataset = ImageDataset(SplitImages(split), size)
    encoder.to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    batches = [list(range(i, min(i + batch_size, len(dataset)))) for i in range(0, len(dataset), batch_size)]
    taps = range(1, len(encoder.layers) + 1)
    found: dict[str, list[Tensor]] = {pool: [] for pool in pools}
    for batch in load_batches(dataset, batches, collate_images, workers=workers):
        images = (batch.to(device).pixels[:, None].float() / 255 - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            *tokens, last = encoder.blocks(encoder.embed(images), encoder.order, taps)
            tokens.append(encoder.norm_f(last))
        for pool in pools:
            found[pool].append(torch.stack([POOLS[pool](block.float()) for block in tokens]).cpu())
    views = [len(images) for images in split.select_columns(["views"])["views"]]
    return {
        pool: torch.stack([study.mean(dim=1) for study in torch.cat(x, dim=1).double().split(views, dim=1)], dim=1)
        for pool, x in found.items()
    }


def auroc(scores: Tensor, truth: Tensor) -> float:
    """Computes the area under the ROC curve; ties count half."""
    _, places, counts = np.unique(scores.numpy(), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    positive = truth.numpy() > 0
    p, n = int(positive.sum()), int((~positive).sum())
    return float((ranks[places][positive].sum() - p * (p + 1) / 2) / (p * n))


def fit_and_score(x: Tensor, y: Tensor, other: Tensor) -> list[Tensor]:
    """Fits on `x` and `y`, and computes the scores of other studies for each of `DECAYS`.

    Ridge regression on 0 and 1 needs one decomposition for all labels and decays, while logistic regressions must be
    solved one by one. AUROC uses only the order of the scores, which is almost the same.

    Args:
        x: `[studies, d]`.
        y: `[studies, labels]`.
        other: `[others, d]`.
    """
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-8)
    x, other, target = (x - centre) / scale, (other - centre) / scale, y - y.mean(0)
    n, d = x.shape
    if d > n:  # the weights are sums of studies, so as many unknowns as studies are enough
        values, vectors = torch.linalg.eigh(x @ x.T)
        left, right = other @ x.T @ vectors, vectors.T @ target
    else:
        values, vectors = torch.linalg.eigh(x.T @ x)
        left, right = other @ vectors, vectors.T @ (x.T @ target)
    return [left @ (right / (values + n * decay)[:, None]) for decay in DECAYS]


def folds(patients: Sequence[str | None], count: int) -> Tensor:
    """Returns the fold of each study: studies of a patient are together; without a patient, each study counts alone."""
    names = [f"study {i}" if patient is None else f"patient {patient}" for i, patient in enumerate(patients)]
    distinct = sorted(set(names))
    order = np.random.default_rng(0).permutation(len(distinct))
    fold = {name: int(place) % count for name, place in zip(distinct, order, strict=True)}
    return torch.tensor([fold[name] for name in names])


@dataclass
class Probe:
    """The result of a probe: `scores` `[studies, labels]`, and the chosen settings."""

    scores: Tensor
    block: int
    decay: float
    cross_validated: float


def probe(train: Tensor, y: Tensor, fold: Tensor, other: Tensor) -> Probe:
    """Chooses block and decay on the training split and scores other studies.

    Args:
        train: `[blocks, studies, d]`.
        y: `[studies, labels]`.
        fold: fold of each study of the training split.
        other: features of the studies to score.
    """
    best: tuple[float, int, int] = (-1.0, 0, 0)
    for block, x in enumerate(train):
        held_out = y.new_zeros(len(DECAYS), *y.shape)
        for number in fold.unique():
            out = fold == number
            held_out[:, out] = torch.stack(fit_and_score(x[~out], y[~out], x[out]))
        for decay, scores in enumerate(held_out):
            best = max(best, (macro_auroc(scores, y), block, decay))
    value, block, decay = best
    return Probe(fit_and_score(train[block], y, other[block])[decay], block + 1, DECAYS[decay], value)


def macro_auroc(scores: Tensor, truth: Tensor) -> float:
    """The mean over labels."""
    return statistics.mean(auroc(scores[:, i], truth[:, i]) for i in range(truth.shape[1]))


def interval(
    trained: Sequence[Tensor], fresh: Sequence[Tensor], truth: Tensor, patients: Tensor, draws: int = 1000
) -> tuple[float, float]:
    """Computes the 95 % bootstrap interval of the mean macro AUROC of some scores minus that of others.

    Args:
        patients: number of the patient of each study; patients are drawn, with all their studies.
    """
    rng = np.random.default_rng(0)
    studies = [torch.nonzero(patients == patient)[:, 0] for patient in patients.unique()]
    found = []
    while len(found) < draws:
        drawn = torch.cat([studies[i] for i in rng.integers(len(studies), size=len(studies))])
        positive = truth[drawn].mean(0)
        if bool(((positive > 0) & (positive < 1)).all()):
            means = [
                statistics.mean(macro_auroc(scores[drawn], truth[drawn]) for scores in group)
                for group in (trained, fresh)
            ]
            found.append(means[0] - means[1])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def targets(rows: Sequence[Sequence[set[str]]], fewest: int) -> tuple[list[str], list[Tensor], list[str]]:
    """Returns the labels that at least `fewest` studies of every group have and as many lack, and the other labels.

    Between them, by group, whether a study has each of these labels: 0 or 1, `[studies, labels]`.
    """
    every = sorted(set().union(*(labels for group in rows for labels in group)))
    counts = {label: [sum(label in labels for labels in group) for group in rows] for label in every}
    kept = [
        label
        for label in every
        if all(fewest <= count <= len(group) - fewest for count, group in zip(counts[label], rows, strict=True))
    ]
    y = [torch.tensor([[float(label in labels) for label in kept] for labels in group]).double() for group in rows]
    return kept, y, [label for label in every if label not in kept]


def _shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET_DIR")
    parser.add_argument("--encoder", nargs="+", required=True, metavar="RUN", help="runs of the same sizes")
    parser.add_argument("--seeds", type=int, default=3, help="encoders with random weights")
    parser.add_argument("--fewest", type=int, default=5, help="studies with and without a label, or it is left out")
    parser.add_argument("--score-on", nargs="+", default=["test"], metavar="SPLIT", help="splits that are scored")
    parser.add_argument("--pool", nargs="+", default=["mean"], choices=POOLS, help="ways to pool the tokens")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    console = Console()
    splits = open_dataset(options.dataset)
    wanted = ("train", *options.score_on)
    if missing := [name for name in wanted if name not in splits or "labels" not in splits[name].column_names]:
        raise SystemExit(f"{options.dataset}: no labels, or no split, for {', '.join(missing)}")
    groups = (["train"], options.score_on)

    def column(name: str, group: Sequence[str]) -> list[Any]:
        return [value for split in group for value in splits[split][name]]

    labels, (y, truth), left_out = targets(
        [[set(found or ()) for found in column("labels", group)] for group in groups], options.fewest
    )
    if not labels:
        raise SystemExit(
            f"no label has {options.fewest} studies with and without it, in training and in what is scored"
        )
    fold = folds(column("patient_id", groups[0]), FOLDS)
    patients = folds(column("patient_id", groups[1]), len(truth))

    device = torch.device(options.device)

    def probed(encoder: nn.Module) -> dict[str, Probe]:
        x = [
            features(encoder, splits[name], options.pool, device, options.batch_size, options.workers)
            for name in wanted
        ]
        return {
            pool: probe(x[0][pool], y, fold, torch.cat([one[pool] for one in x[1:]], dim=1)) for pool in options.pool
        }

    loaded = [encoders(path) for path in options.encoder]
    trained = [probed(encoder) for encoder, _ in loaded]
    fresh = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        fresh.append(probed(loaded[0][1]()))

    where = " and ".join(options.score_on)
    groups_of_probes = (trained, fresh)
    best = [[max(one.values(), key=lambda p: p.cross_validated) for one in group] for group in groups_of_probes]
    table = Table("label", "studies with it", "pre-trained", "random", title=f"AUROC of a linear probe, {where}")
    for i, label in enumerate(labels):
        values = [[auroc(one.scores[:, i], truth[:, i]) for one in group] for group in best]
        table.add_row(label, str(int(truth[:, i].sum())), *map(_shown, values))
    macro = [[macro_auroc(one.scores, truth) for one in group] for group in best]
    table.add_row("macro", f"of {len(truth)}", *map(_shown, macro), style="bold")
    console.print(table)

    table = Table("pooled", "encoder", "block", "decay", f"macro, {where}", "macro, cross-validation on train")
    names = ([*options.encoder], [f"random, seed {seed}" for seed in range(options.seeds)])
    for pool in options.pool:
        for group, group_names in zip(groups_of_probes, names, strict=True):
            for name, probes in zip(group_names, group, strict=True):
                one = probes[pool]
                figures = (macro_auroc(one.scores, truth), one.cross_validated)
                table.add_row(pool, name, str(one.block), f"{one.decay:g}", *(f"{value:.3f}" for value in figures))
        for name, group in zip(("pre-trained", "random"), groups_of_probes, strict=True):
            if group:
                scored = _shown([macro_auroc(one[pool].scores, truth) for one in group])
                chosen_by = _shown([one[pool].cross_validated for one in group])
                table.add_row(pool, f"{name}, mean", "", "", scored, chosen_by, style="bold")
        table.add_section()
    console.print(table)
    if fresh:
        pairs = {pool: [[one[pool] for one in group] for group in groups_of_probes] for pool in options.pool}
        for pool, (ours, theirs) in {**pairs, "chosen by cross-validation": best}.items():
            low, high = interval([one.scores for one in ours], [one.scores for one in theirs], truth, patients)
            difference = statistics.mean(macro_auroc(one.scores, truth) for one in ours) - statistics.mean(
                macro_auroc(one.scores, truth) for one in theirs
            )
            console.print(
                f"{pool}: pre-trained less random {difference:+.3f}, 95 % of bootstrap {low:+.3f} to {high:+.3f}"
            )
    if left_out:
        console.print(f"too rare, left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
