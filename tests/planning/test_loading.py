"""The loader's pace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.data import batches, images
from emrrg_cli.errors import RunError
from emrrg_cli.planning.loading import seconds_per_study
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.recipe.schema import FinetuneRecipe


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
    assert seconds_per_study(recipe_of(tiny_dataset, "data.max_views=1"), 4) >= 0.02
    assert len(seen) == 8 * 4


def test_processes_load(tiny_dataset: Path) -> None:
    # More than the split holds is asked for: its studies come again.
    assert seconds_per_study(recipe_of(tiny_dataset, "data.workers=2"), 64) > 0


def test_what_the_training_refuses_is_refused(tiny_dataset: Path) -> None:
    with pytest.raises(RunError, match=r"data\.section=impression"):
        seconds_per_study(recipe_of(tiny_dataset, "data.section=impression"), 4)
