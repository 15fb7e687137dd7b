"""The curves are drawn from any history."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg_cli.reporting import plots


def _history(steps: int, *, score: bool = True) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "train/loss": 1 + 8 / step, "train/lr": 1e-4 * (1 - step / steps)})
        if step % 50 == 0:
            rows.append({"step": step, "validation/loss": 1.5, "validation/score": 0.1, "validation/BLEU_4": 0.1})
    return rows


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_each_logged_value_has_a_panel(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "curves.png"
    plots.plot_curves(_history(200), path)
    whole = _size(path)
    plots.plot_curves([{k: v for k, v in row.items() if k != "validation/score"} for row in _history(200)], path)
    without_score = _size(path)
    plots.plot_curves([{"step": 1, "train/loss": 2.0}], path)
    assert whole[1] > without_score[1] > _size(path)[1]
    assert [entry.name for entry in path.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "train/loss": math.nan, "validation/loss": math.inf}],
        [{"step": 1, "train/loss": -3.0}, {"step": 2, "train/loss": 0.0}],
        [{"step": 3, "validation/loss": 2.0}, {"step": 3, "validation/score": None}],
        [{"step": step, "train/loss": 1e6 / step**3} for step in range(1, 500)],
    ],
    ids=["nothing", "no values", "not finite", "not positive", "one validation", "many decades"],
)
def test_odd_histories_are_drawn(tmp_path: Path, history: Any) -> None:
    plots.plot_curves(history, tmp_path / "curves.png")
    assert min(_size(tmp_path / "curves.png")) > 300


def test_the_last_row_of_a_step_counts_and_steps_are_sorted() -> None:
    history = [
        {"step": 2, "train/loss": 9.0},
        {"step": 3, "train/loss": 7.0},
        {"step": 1, "train/loss": 5.0},
        {"step": 2, "train/loss": 4.0, "train/lr": 0.1},
        {"step": 3, "train/loss": math.nan},
    ]
    assert plots._series(history, "train/loss") == ([1, 2], [5.0, 4.0])


def test_the_smoothed_curve_does_not_lag() -> None:
    line = [float(i) for i in range(300)]
    assert plots._smooth(line)[:-5] == pytest.approx(line[:-5])
    assert plots._smooth(line)[-1] == pytest.approx(296.5)
