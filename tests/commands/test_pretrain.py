"""`emrrg pretrain` from the command line: on a folder of images, stopped, resumed, and handed on."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import emrrg_cli
from emrrg_cli.app import main

OPTIONS = (
    "model.encoder={d_model: 16, depth: 4, d_state: 4, image_size: 128}",
    "model.decoder_width=16",
    "train={epochs: 2, batch_size: 4, lr: 0.002, trackers: []}",
    "data.validation=0.2",
)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Ten images of blots, some colour and some deep grey, of several sizes and kinds."""
    rng = np.random.default_rng(0)
    root = tmp_path / "films"
    (root / "deep").mkdir(parents=True)
    for i in range(10):
        blots = Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8)).resize(
            (90 + i, 70), Image.Resampling.BICUBIC
        )
        if i < 4:
            blots.save(root / f"{i}.png")
        elif i < 7:
            blots.convert("RGB").save(root / f"{i}.jpg")
        else:
            Image.fromarray(np.asarray(blots).astype(np.uint16) * 16).save(root / "deep" / f"{i}.tif")
    return root


@pytest.mark.slow
def test_from_a_folder_to_a_model_with_a_stop_between(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["pretrain", "phantom/pretrain", "data.root=films", *OPTIONS]
    assert main([*arguments, "train.stop_after_steps=3"]) == 0
    run = tmp_path / "runs" / "phantom-pretrain"
    assert "3 (train.stop_after_steps=3)" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "Give --resume to continue it" in capsys.readouterr().err
    assert main(["pretrain", str(run / "recipe.yaml"), "--resume", "train.stop_after_steps=null"]) == 0
    said = capsys.readouterr().err
    assert "4 (schedule ended)" in said
    assert f"emrrg align RECIPE model.encoder.weights={shlex.quote(str(run))}" in said
    output = emrrg_cli.load_pretrainer(run)(torch.randn(2, 3, 128, 128))
    assert output.prediction.shape == (2, 48, 768)
    assert output.loss.ndim == 0
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["epoch-002.png"]


def test_the_recipe_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "xray/pretrain-large", "--print-recipe", "train.batch_size=64"]) == 0
    printed = capsys.readouterr().out
    for line in ("stage: pretrain", "size: large", "image_size: 192", "lr_batch_size: 256", "batch_size: 64"):
        assert line in printed


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_the_shipped_recipes_are_the_published_settings(size: str) -> None:
    from emrrg_cli.recipe.load import load_recipe

    recipe = load_recipe(f"xray/pretrain-{size}", stage="pretrain")
    train = recipe.train
    assert recipe.model.encoder.size == size
    assert (recipe.model.encoder.image_size, recipe.model.decoder_width, recipe.model.decoder_depth) == (192, 512, 4)
    assert (recipe.data.crop_scale, recipe.data.flip) == ([0.2, 1.0], True)
    assert (train.betas, train.weight_decay, train.clip_norm) == ([0.9, 0.95], 0.05, 3.0)
    assert (train.epochs, train.warmup_epochs, train.schedule, train.min_lr) == (100, 5, "cosine", 0)
    assert (train.peak_lr * 256 / train.batch_size, train.precision) == (pytest.approx(1.5e-4), "auto")


def test_a_recipe_of_another_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "tiny/finetune"]) == 2
    assert "recipe tiny/finetune is for `finetune`, not `pretrain`" in capsys.readouterr().err
