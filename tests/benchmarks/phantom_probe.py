"""Measures what a linear model of pixels predicts from synthetic films: F1 of each finding, and macro F1.

    python tests/benchmarks/phantom_probe.py [--train 4000] [--test 1000] [--seed 0] [--workers 2]

The films are frontal, drawn at 128 pixels and averaged to 64 x 64. One ridge regression per finding is fitted on three
quarters of the training films; the others choose its weight decay and the threshold with the best F1. The floor is
the better constant answer: every film has the finding (the answer "none" has F1 0).

The films should be hard for this model: position, exposure and anatomy vary, and look-alikes of findings occur without
them. The aim is a macro F1 below .50.
"""

from __future__ import annotations

import argparse

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from probe import DECAYS, fit_and_score
from rich.console import Console
from rich.table import Table
from torch import Tensor

from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.phantom.parameters import LABELS
from emrrg_cli.phantom.render import render

SIZE = 64


def draw(seed: int, index: int) -> tuple[NDArray[np.float32], list[float]]:
    """Returns the pixels of a film, `[SIZE * SIZE]`, 0 to 1, and its labels, `[8]`."""
    case, _ = synthetic_study(seed, index)
    film = render(case, 2 * SIZE).astype(np.float32) / 255
    return film.reshape(SIZE, 2, SIZE, 2).mean((1, 3)).ravel(), [
        float(name in case.findings.labels()) for name in LABELS
    ]


def f1(found: Tensor, truth: Tensor) -> float:
    """Computes F1 of two boolean vectors; 0 if both are empty."""
    return 2 * int((found & truth).sum()) / max(1, int(found.sum() + truth.sum()))


def best_threshold(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    """Finds the threshold on these scores with the best F1; returns F1 and threshold."""
    return max(
        (f1(scores > t, truth), float(t)) for t in torch.quantile(scores, torch.linspace(0.3, 0.995, 140).double())
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    count = arguments.train + arguments.test
    films = joblib.Parallel(n_jobs=arguments.workers)(
        joblib.delayed(draw)(arguments.seed, index) for index in range(count)
    )
    x = torch.tensor(np.stack([pixels for pixels, _ in films])).double()
    y = torch.tensor([labels for _, labels in films]).double()
    fit = arguments.train * 3 // 4
    scores = torch.stack(fit_and_score(x[:fit], y[:fit], x[fit:]))  # [decays, films, findings]
    truth, choose = y[fit:] > 0, arguments.train - fit
    table = Table(title=f"ridge regression on {SIZE} x {SIZE} pixels, {fit:,} films", title_justify="left")
    for name in ("finding", "prevalence", "F1", "floor", "weight decay"):
        table.add_column(name, justify="left" if name == "finding" else "right")
    values, floors = [], []
    for place, name in enumerate(LABELS):
        (_, threshold), decay = max(
            (best_threshold(column[:choose], truth[:choose, place]), decay)
            for decay, column in enumerate(scores[:, :, place])
        )
        tested = truth[choose:, place]
        values.append(f1(scores[decay, choose:, place] > threshold, tested))
        floors.append(f1(torch.ones_like(tested), tested))
        share = f"{tested.double().mean():.3f}"
        table.add_row(name, share, f"{values[-1]:.3f}", f"{floors[-1]:.3f}", f"{DECAYS[decay]:g}")
    table.add_section()
    table.add_row("macro", "", f"{np.mean(values):.3f}", f"{np.mean(floors):.3f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
