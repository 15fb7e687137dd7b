"""The benchmark that trains the small model of synthetic films: how it reads sides, and what it exports."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from emrrg_cli import load_generator
from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.default_model import LIMITS, SYNTHETIC_ONLY, read_limits
from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.models import film_distance
from emrrg_cli.models.film_distance import FILM_DISTANCE
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.training import measure_films


@pytest.fixture(scope="module")
def box() -> ModuleType:
    """`tests/benchmarks/box.py`."""
    spec = importlib.util.spec_from_file_location("box", Path(__file__).parents[1] / "benchmarks" / "box.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["box"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sides_are_read_back_from_reports(box: ModuleType) -> None:
    studies = [synthetic_study(21, index) for index in range(600)]
    cases = [case for case, _ in studies]
    texts = [clean_report(report.findings, "r2gen-iu") for _, report in studies]
    for case, text in zip(cases, texts, strict=True):
        said = box.read_sides(text)
        for name, truth in box.sides(case).items():
            assert said[name] == truth, (name, text)
    assert box.side_accuracy(cases, texts) == 1.0
    swapped = [text.replace("left", "LEFT").replace("right", "left").lower() for text in texts]
    assert box.side_accuracy(cases, swapped) < 0.6


def test_the_recipes_of_the_box_share_one_encoder() -> None:
    encoders = [load_recipe(f"box/{stage}", stage=stage).model.encoder for stage in ("pretrain", "align", "finetune")]  # type: ignore[attr-defined]
    for name in ("d_model", "depth", "d_state", "image_size"):
        assert len({getattr(encoder, name) for encoder in encoders}) == 1


def test_the_test_split_has_a_thousand_films_or_a_tenth(box: ModuleType, tmp_path: Path) -> None:
    assert box.Work(tmp_path, 40_000, 0, False).split == "0.950,0.025,0.025"
    assert box.Work(tmp_path, 200, 0, True).split == "0.800,0.1,0.1"


FOUND = {
    "films": 10,
    "f1": {"micro": [0.9, 0.1, 0.0]},
    "sides": 0.97,
    "language": {"BLEU_4": (0.2, 0.25)},
    "parameters": 1000,
}


@pytest.mark.slow
def test_an_export_is_half_as_large_and_writes_reports(
    box: ModuleType,
    tiny_run: Path,
    tiny_dataset: Path,
    tiny_r2gen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "draw").symlink_to(tiny_dataset)
    box.export(tiny_run, tmp_path / "box", FOUND, box.Work(tmp_path, 200, 3, True))
    for file in (tmp_path / "box" / "model").rglob("*.safetensors"):
        whole = load_file(tiny_run / file.relative_to(tmp_path / "box"))
        half = load_file(file)
        assert set(half) == set(whole)
        assert all((half[name].float() - whole[name].float()).abs().max() < 2e-3 for name in whole)
        assert file.stat().st_size < 0.7 * (tiny_run / file.relative_to(tmp_path / "box")).stat().st_size
    text = (tmp_path / "box" / "README.md").read_text()
    assert "synthetic films only" in text
    assert "not for clinical use" in text
    assert "97.0%" in text
    for file in (file for file in (tmp_path / "box").rglob("*") if file.suffix in (".yaml", ".json")):
        assert str(tmp_path.parent) not in file.read_text(), file
    assert "model/" not in json.dumps(json.loads((tmp_path / "box" / "checksums.json").read_text()))
    image = next((tiny_r2gen / "images").rglob("*.png"))
    assert load_generator(tmp_path / "box", device="cpu").generate([image])[0]
    assert "checksums" not in capsys.readouterr().err


def test_an_export_knows_its_films_and_its_limits(
    box: ModuleType, tiny_run: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (film_distance, measure_films):
        monkeypatch.setattr(module, "LEAST", 4)  # the validation split has no more
    (tmp_path / "draw").symlink_to(tiny_dataset)
    out = tmp_path / "box"
    box.export(tiny_run, out, FOUND, box.Work(tmp_path, 200, 3, True))
    assert load_generator(out, device="cpu").writer.film_distance is not None
    assert read_limits(out) == SYNTHETIC_ONLY
    assert {FILM_DISTANCE, LIMITS} <= set(json.loads((out / "checksums.json").read_text()))
