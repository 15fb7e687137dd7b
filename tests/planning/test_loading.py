"""How many studies a data set trains, and the loader's pace."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emrrg_cli.datasets import report_dataset as batches
from emrrg_cli.errors import RunError
from emrrg_cli.imaging import read as images
from emrrg_cli.planning import loading
from emrrg_cli.planning.loading import count_studies, seconds_per_study
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.recipe.load import load_recipe


def recipe_of(root: Path, *overrides: str) -> FinetuneRecipe:
    return load_recipe("tiny/finetune", [f"data.root={root}", *overrides], stage="finetune")


def test_a_study_takes_as_long_as_its_images(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = images.read_image
    seen = []

    def slowly(source: Any) -> Any:
        seen.append(source)
        time.sleep(0.02)
        return read(source)

    monkeypatch.setattr(batches, "read_image", slowly)
    monkeypatch.setattr(loading, "_BUDGET_S", 3600.0)  # a busy machine must not end the measurement early
    assert seconds_per_study(recipe_of(tiny_dataset, "data.max_views=1"), 4) >= 0.02
    assert len(seen) == 8 * 4


def test_processes_load(tiny_dataset: Path) -> None:
    # More than the split holds is asked for: its studies come again.
    assert seconds_per_study(recipe_of(tiny_dataset, "data.workers=2"), 64) > 0


def test_studies_are_counted_as_the_training_counts_them(tiny_dataset: Path, tmp_path: Path) -> None:
    # Every other study has two images, from the second on.
    assert count_studies(recipe_of(tiny_dataset)) == (16, 1.5)
    assert count_studies(recipe_of(tiny_dataset, "data.max_views=1")) == (16, 1.0)
    assert count_studies(recipe_of(tiny_dataset, "data.limit=3")) == (3, 4 / 3)
    # Studies without the text that is learned are left out, and nothing is taken from a manifest.
    (tmp_path / "data").mkdir()
    shard = "data/train-00000-of-00001.parquet"
    rows = pq.read_table(tiny_dataset / shard).to_pylist()
    for row in rows[:4]:
        row["report"] = " "
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(tiny_dataset / shard)), tmp_path / shard)
    assert count_studies(recipe_of(tmp_path)) == (12, 1.5)


@pytest.mark.parametrize("figure", [count_studies, lambda recipe: seconds_per_study(recipe, 4)])
def test_the_plan_refuses_what_training_refuses(
    figure: Callable[[FinetuneRecipe], Any], tiny_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"data\.section=impression"):
        figure(recipe_of(tiny_dataset, "data.section=impression"))
    shutil.copytree(tiny_dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("train-*", "manifest.json"))
    with pytest.raises(RunError, match="copy: this dataset directory has no split named train"):
        figure(recipe_of(tmp_path / "copy"))
