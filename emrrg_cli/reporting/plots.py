"""Plots the curves of a training run as one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from emrrg_cli.files.atomic import atomic_write_bytes

TRAIN = "#4878a8"
VALIDATION = "#c44e52"
SCORE = "#55895a"
MUTED = "#666666"
# From this many points on, the raw curve looks noisy, so a smoothed curve is drawn over it.
_SMOOTH_FROM = 60
# Losses with this ratio of largest to smallest get a logarithmic axis; otherwise the first steps would hide the others.
_LOG_FROM = 10.0

Points = tuple[list[float], list[float]]


def plot_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot a run's loss, learning rate and, if it was computed, selection score over the optimizer steps.

    Args:
        history: Rows with `step` and any of `train/loss`, `train/lr`, `validation/loss`, `validation/score`; other keys
            are ignored. If a step occurs twice, as after a resume, the later row counts. Values that are not finite
            leave a gap.
        path: The PNG to write.

    Raises:
        RunError: The file cannot be written.
    """
    # Figure without pyplot needs no window system and shares no state with other plots of the caller.
    from matplotlib.figure import Figure

    train, validation = _series(history, "train/loss"), _series(history, "validation/loss")
    rate, score = _series(history, "train/lr"), _series(history, "validation/score")
    heights = [3.2] + [1.4] * bool(score[0]) + [0.9] * bool(rate[0])
    figure = Figure(figsize=(8, 1.0 + sum(heights)), dpi=130, layout="constrained")
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axis in axes:
        _plain(axis)
    axes[-1].set_xlabel("optimizer step")

    _draw_loss(axes.pop(0), train, validation)
    if score[0]:
        axis = axes.pop(0)
        _draw_points(axis, score, SCORE, best=max(score[1]), label="score")
        axis.set_ylabel("selection score")
        axis.margins(y=0.15)
        axis.legend(frameon=False, loc="best")
    if rate[0]:
        axis = axes.pop(0)
        axis.plot(*rate, color=MUTED, linewidth=1.3)
        axis.fill_between(*rate, color=MUTED, alpha=0.12, linewidth=0)
        axis.set_ylabel("learning rate")
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))

    figure.align_ylabels()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write_bytes(path, buffer.getvalue())


def _series(history: Sequence[Mapping[str, float]], key: str) -> Points:
    """Returns steps and finite values of one key, in the order of the steps."""
    values: dict[float, float] = {}
    for row in history:
        value = row.get(key)
        if value is None:
            continue
        if math.isfinite(value):
            values[row["step"]] = value
        else:
            values.pop(row["step"], None)
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _draw_loss(axis: Any, train: Points, validation: Points) -> None:
    axis.set_ylabel("loss")
    steps, values = train
    if steps:
        many = len(steps) >= _SMOOTH_FROM
        marker = "o" if len(steps) == 1 else None
        axis.plot(
            steps, values, color=TRAIN, linewidth=1.0, alpha=0.3 if many else 1.0, marker=marker, label=_unless(many)
        )
        if many:
            axis.plot(steps, _smooth(values), color=TRAIN, linewidth=1.8, label="train (smoothed)")
    if validation[0]:
        _draw_points(axis, validation, VALIDATION, best=min(validation[1]), label="validation")
    losses = values + validation[1]
    if not losses:
        axis.text(0.5, 0.5, "no losses logged", transform=axis.transAxes, ha="center", color=MUTED)
        return
    if min(losses) > 0 and max(losses) / min(losses) >= _LOG_FROM:
        _logarithmic(axis)
    axis.legend(frameon=False, loc="best")


def _unless(many: bool) -> str:
    """Returns the label of the raw curve; matplotlib hides labels that start with an underscore."""
    return "_raw" if many else "train"


def _draw_points(axis: Any, points: Points, colour: str, *, best: float, label: str) -> None:
    """Draws a series of few points; a ring and the legend mark the best one (the first if several are equal)."""
    steps, values = points
    at = steps[values.index(best)]
    text = f"{label} (best {best:.3f} at step {at:,.0f})"
    # Many points get small dots, so that they do not merge.
    size = 4.5 if len(steps) <= 40 else 2.0
    axis.plot(steps, values, color=colour, linewidth=1.2, marker="o", markersize=size, label=text)
    axis.plot([at], [best], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=colour)


def _smooth(values: Sequence[float]) -> list[float]:
    """Computes a running mean over about a thirtieth of the curve, centred on each point so that it does not lag."""
    half = max(1, len(values) // 60)
    sums = [0.0, *accumulate(values)]
    smoothed = []
    for index in range(len(values)):
        # The window shrinks symmetrically at the steep start, but not at the end, where few points would be noisy.
        back = min(half, index)
        first, last = index - back, min(index + back + 1, len(values))
        smoothed.append((sums[last] - sums[first]) / (last - first))
    return smoothed


def _logarithmic(axis: Any) -> None:
    """Makes the loss axis logarithmic, with ticks in plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9, color=MUTED)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
