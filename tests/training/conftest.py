"""Short real runs of `finetune`, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest


def _tensors(file: Path) -> dict[str, Any]:
    # Tests ask for one tensor after the other: a file is read once, until another one takes its place.
    about = file.stat()
    return dict(_read(file, about.st_ino, about.st_mtime_ns))


@lru_cache(maxsize=16)
def _read(file: Path, *version: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(file)


@dataclass
class Run:
    """A run directory, read as it is now; `summary` is None after a run in another process."""

    directory: Path
    summary: Any = None

    @property
    def history(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.directory / "history.jsonl").read_text().splitlines()]

    def series(self, key: str) -> list[float]:
        return [row[key] for row in self.history if key in row]

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoints" / (self.directory / "checkpoints" / "last").read_text().strip()

    @property
    def weights(self) -> dict[str, Any]:
        """Trained parameters at the last checkpoint."""
        return _tensors(self.checkpoint / "trainable.safetensors")

    @property
    def exported(self) -> dict[str, Any]:
        """Every tensor under `model/`, by file and name."""
        files = sorted((self.directory / "model").rglob("*.safetensors"))
        return {f"{file.name}:{name}": t for file in files for name, t in _tensors(file).items()}

    def last_step(self) -> int:
        return int(self.checkpoint.name.removeprefix("step-"))


@pytest.fixture(autouse=True)
def quick_pictures(quick_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also leaves out what comes before the plots are written, and the pictures of films."""
    from emrrg_cli.files.atomic import atomic_write_bytes
    from emrrg_cli.training import pretrain, run_setup

    monkeypatch.setattr(run_setup, "plot_curves", lambda history, path: atomic_write_bytes(path, b"a curve"))
    monkeypatch.setattr(pretrain, "draw_predictions", lambda *films, path, **more: atomic_write_bytes(path, b"films"))


@pytest.fixture
def finetune(tiny_overrides: tuple[str, ...], tmp_path: Path) -> Callable[..., Run]:
    """Runs `finetune` in this process; `train.select` is `loss` unless said otherwise, so that nothing is generated."""
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.training.finetune import run_finetune

    def run(name: str, *overrides: str, resume: bool = False) -> Run:
        changes = [*tiny_overrides, "train.trackers=[]", "train.select=loss", *overrides]
        recipe = load_recipe("tiny/finetune", changes, stage="finetune")
        summary = run_finetune(recipe, tmp_path / name, resume=resume, expected_processes=0)
        return Run(tmp_path / name, summary)

    return run


@pytest.fixture
def with_column(tiny_dataset: Path, tmp_path: Path) -> Callable[[str, Callable[[list[Any]], list[Any]]], Path]:
    """`with_column(name, change)`: a copy of `tiny_dataset` with other values in a column of its training split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def copy(name: str, change: Callable[[list[Any]], list[Any]]) -> Path:
        root = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
        (shard,) = root.glob("data/train-*.parquet")
        table = pq.read_table(shard)
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        pq.write_table(table.set_column(place, field, pa.array(change(table[name].to_pylist()), field.type)), shard)
        return root

    return copy


@pytest.fixture(scope="session")
def run_of() -> type[Run]:
    """`Run`, for directories that other processes made."""
    return Run


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Over all tensors of two models with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture
def difference() -> Callable[[dict[str, Any], dict[str, Any]], float]:
    return largest_difference
