"""What the end of a training notes about its films, and what `generate` says of films that are unlike them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emrrg_cli import load_generator
from emrrg_cli.app import main
from emrrg_cli.checksums import CHECKSUMS
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.default_model import LIMITS
from emrrg_cli.models import film_distance
from emrrg_cli.models.film_distance import FILM_DISTANCE, FilmDistance, describe
from emrrg_cli.recipe.load import load_run_recipe
from emrrg_cli.training import measure_films
from emrrg_cli.training.measure_films import measure_film_distance


def _measured(run: Path, copy: Path, dataset: Path) -> Path:
    shutil.copytree(run, copy)
    recipe = load_run_recipe(copy, None, [], "generate")
    films = ReportDataset(open_dataset(dataset)["train"], recipe.data, recipe.model.encoder.image_size)
    measure_film_distance(recipe, copy, films, films, torch.device("cpu"))
    return copy


def test_generate_names_films_unlike_the_training(
    varied_run: Path, tiny_dataset: Path, tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _measured(varied_run, tmp_path / "run", tiny_dataset)
    assert FILM_DISTANCE in json.loads((run / CHECKSUMS).read_text())
    films = tmp_path / "films"
    shutil.copytree(tiny_r2gen / "images" / "study00", films)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(films / "noise.png")
    command = ["generate", str(films), "--model", str(run), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 0
    assert "1 new report is for a film unlike the training films" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    for row, note in zip(rows, ([], ["unlike the training films"]), strict=True):
        assert [text.partition(" (")[0] for text in row["notes"]] == note
        assert (row["film_distance"] > 1) == bool(note)
        assert row["report"]

    (run / LIMITS).write_text("this model knows drawings only")
    assert main([*command, "--overwrite"]) == 0
    told = capsys.readouterr().err
    advice = "this model knows drawings only; this looks like something else: do not read the report as a finding"
    assert advice in told
    assert "the training films: this model knows drawings only, so do not read them as findings" in told
    rows = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    assert [advice in " ".join(row["notes"]) for row in rows] == [False, True]
    assert (tmp_path / "out" / "page.html").read_text().count(advice) == 1


@pytest.mark.usefixtures("no_java")
def test_a_training_measures_its_films(
    finetune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny_r2gen: Path
) -> None:
    for module in (film_distance, measure_films):
        monkeypatch.setattr(module, "LEAST", 4)  # the validation split has no more
    run = finetune("run", "model.adapter={targets: [X], rank: 2, alpha: 8.0}").directory
    assert FILM_DISTANCE in json.loads((run / CHECKSUMS).read_text())
    known = FilmDistance.load(run)
    assert known is not None
    # The encoder is that of `generate`, adapters included: the mean over the training films is the stored one.
    generator = load_generator(run, device="cpu")
    data = ReportDataset(open_dataset(generator.recipe.data.root)["train"], generator.recipe.data, 32)
    with torch.no_grad():
        pixels = [data[index].pixels for index in range(len(data))]
        films = [describe(generator.model.encode_films(views), views) for views in pixels]
    for part, values in zip((known.tokens, known.looks), zip(*films, strict=True), strict=True):
        assert torch.allclose(torch.cat(values).double().mean(dim=0), part.mean, atol=1e-5)


def test_few_films_are_not_measured(tiny_run: Path) -> None:
    assert not (tiny_run / FILM_DISTANCE).exists()  # four in its validation split
    assert load_generator(tiny_run, device="cpu").writer.film_distance is None
