"""`pretrain` as a whole: what a run directory holds, exact continuation, both kinds of data, bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import emrrg_cli
from emrrg_cli.app import main
from emrrg_cli.datasets.image_dataset import FolderImages, JoinedImages
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.arm.pretrainer import load_pretrainer
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.training.pretrain import run_pretrain
from emrrg_cli.training.pretrain_data import held_out_ids, parts_of, refuse_held_out

MODEL = "model.encoder={d_model: 16, depth: 4, d_state: 4, image_size: 128}"
LOOP = "train={epochs: 2, batch_size: 8, lr: 0.002, warmup_epochs: 0, log_every: 1, validate_every_epochs: 1}"


@pytest.fixture(scope="module")
def options(tiny_dataset: Path) -> tuple[str, ...]:
    """Changes to `phantom/pretrain`: 24 training images, three steps an epoch, milliseconds each."""
    return (f"data.root={tiny_dataset}", MODEL, "model.decoder_width=16", LOOP, "train.trackers=[]")


def run_in(folder: Path, run_of: Any, *overrides: str, resume: bool = False) -> Any:
    recipe = load_recipe("phantom/pretrain", overrides, stage="pretrain")
    return run_of(folder, run_pretrain(recipe, folder, resume=resume, expected_processes=0))


@pytest.fixture
def pretrain(options: tuple[str, ...], tmp_path: Path, run_of: Any) -> Callable[..., Any]:
    """Runs `pretrain` in this process."""
    return lambda name, *overrides, **how: run_in(tmp_path / name, run_of, *options, *overrides, **how)


@pytest.fixture(scope="module")
def whole(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, run_of: Any) -> Any:
    """An uninterrupted run of six steps. Not to be changed."""
    return run_in(tmp_path_factory.mktemp("whole") / "run", run_of, *options)


@pytest.fixture
def films(tiny_r2gen: Path, tmp_path: Path) -> Path:
    """A plain folder of 16 images and a file that is none."""
    root = tmp_path / "films"
    for i, path in enumerate(sorted((tiny_r2gen / "images").rglob("*.png"))[:16]):
        (root / str(i % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / str(i % 2) / f"{i}.png")
    (root / "notes.txt").write_text("no image")
    return root


# -- the run directory -------------------------------------------------------------------------------------------


def test_a_run_directory_explains_itself_and_its_model_loads(whole: Any, options: tuple[str, ...]) -> None:
    names = {entry.name for entry in whole.directory.iterdir()}
    assert names == {
        "recipe.yaml",
        "environment.json",
        "history.jsonl",
        "curve.png",
        "checkpoints",
        "model",
        "pictures",
    }
    assert load_recipe(str(whole.directory / "recipe.yaml")) == load_recipe("phantom/pretrain", options)
    rows = [(row["step"], sorted(set(row) - {"step", "epoch"})) for row in whole.history]
    step, validation = ["train/grad_norm", "train/loss", "train/lr"], ["validation/loss"]
    assert rows == [(1, step), (2, step), (3, step), (3, validation), (4, step), (5, step), (6, step), (6, validation)]
    assert sorted(path.name for path in (whole.directory / "pictures").iterdir()) == ["epoch-001.png", "epoch-002.png"]
    with Image.open(whole.directory / "pictures" / "epoch-002.png") as picture:
        picture.load()
        assert picture.width > 500
    assert {path.name for path in (whole.directory / "model").iterdir()} == {
        *("pretrainer.json", "pretrainer.safetensors", "checksums.json")
    }
    model = emrrg_cli.load_pretrainer(whole.directory)
    assert whole.summary.best_step == 6
    for name, tensor in whole.weights.items():
        assert torch.equal(model.state_dict()[name.removeprefix("pretrainer.")], tensor), name


def test_the_validation_loss_is_of_the_exported_model(pretrain: Any, tiny_dataset: Path) -> None:
    from emrrg_cli.datasets.directory import open_dataset
    from emrrg_cli.datasets.image_dataset import ImageDataset, SplitImages
    from emrrg_cli.vocabulary import IMAGENET_MEAN, IMAGENET_STD

    run = pretrain("run", "train.epochs=1", "train.micro_batch_size=4")
    dataset = ImageDataset(SplitImages(open_dataset(tiny_dataset)["validation"]), 128)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    model = load_pretrainer(run.directory)
    with torch.no_grad():
        losses = [float(model(((dataset[i].float() / 255 - mean) / std)[None]).loss) for i in range(len(dataset))]
    assert len(losses) == 6  # four studies, two of them with two views
    assert run.series("validation/loss") == pytest.approx([sum(losses) / 6], rel=1e-5)


@pytest.mark.slow
def test_training_learns_and_the_rate_follows_the_batch(pretrain: Any) -> None:
    run = pretrain("run", "train.epochs=10", "train.validate_every_epochs=10", "train.lr_batch_size=4")
    losses = run.series("train/loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert run.series("train/lr")[0] == pytest.approx(0.004)


# -- continuation ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(4,), (3,), (1, 1)])  # within an epoch, between epochs, twice
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(pretrain: Any, whole: Any, stops: tuple[int, ...]) -> None:
    for number, steps in enumerate(stops):
        pretrain("part", f"train.stop_after_steps={steps}", resume=number > 0)
        torch.rand(10)
    resumed = pretrain("part", resume=True)
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name
    assert resumed.series("train/loss") == whole.series("train/loss")
    assert resumed.series("validation/loss") == whole.series("validation/loss")


@pytest.mark.slow
def test_each_epoch_has_its_own_crops(pretrain: Any) -> None:
    frozen = ("train.lr=1e-30", "train.micro_batch_size=8", "train.batch_size=24", "train.epochs=3")
    crops = pretrain("crops", *frozen).series("train/loss")
    assert len(set(crops)) == 3
    whole = pretrain("whole", *frozen, "data.crop_scale=[1, 1]", "data.flip=false").series("train/loss")
    assert whole == pytest.approx([whole[0]] * 3, rel=1e-3)  # no crop of the whole area fits but the middle one
    other = pretrain("other", *frozen, "train.seed=7").series("train/loss")
    assert not set(other) & set(crops)


@pytest.mark.slow
def test_micro_batches_workers_and_checkpointing_change_nothing(pretrain: Any, difference: Any) -> None:
    plain = pretrain("plain", "train.max_steps=3")
    for name, change in (
        ("micro", "train.micro_batch_size=3"),
        ("workers", "data.workers=1"),
        ("checkpointing", "train.gradient_checkpointing=true"),
    ):
        other = pretrain(name, "train.max_steps=3", change)
        assert other.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-5), name
        assert difference(other.weights, plain.weights) < 1e-5, name


@pytest.mark.slow
def test_two_processes_do_what_one_does(
    options: tuple[str, ...], pretrain: Any, tmp_path: Path, run_of: Any, forked: Any
) -> None:
    one = pretrain("one", "train.epochs=1")
    arguments = ["pretrain", "phantom/pretrain", *options, "train.epochs=1", "--output", str(tmp_path / "two")]
    done = forked(*arguments, "--num-processes", "2", processes=2)
    assert [process.returncode for process in done] == [0, 0], done
    two = run_of(tmp_path / "two")
    assert two.series("train/loss") == pytest.approx(one.series("train/loss"), rel=1e-5)
    assert two.series("validation/loss") == pytest.approx(one.series("validation/loss"), rel=1e-4)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2


# -- a folder of images, and a model to go on from ---------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_on_a_folder_keeps_its_list_of_images(
    pretrain: Any, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (f"data.root={films}", "data.validation=0.2")
    whole = pretrain("whole", *data)
    assert "1 of 17 files are skipped: 1 not an image; first: notes.txt" in capsys.readouterr().err
    record = json.loads((whole.directory / "images.json").read_text())
    assert (len(record["train"]), len(record["validation"])) == (13, 3)
    assert record["left_out"] == {"not an image": 1}
    assert len(whole.series("train/loss")) == 2  # one step an epoch
    assert len(whole.series("validation/loss")) == 2
    pretrain("part", *data, "train.stop_after_steps=1")
    shutil.copy(films / "0" / "0.png", films / "0" / "another.png")
    resumed = pretrain("part", *data, resume=True)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_a_run_is_not_resumed_on_other_images(pretrain: Any, films: Path) -> None:
    data = (f"data.root={films}", "data.validation=0.2")
    pretrain("part", *data, "train.stop_after_steps=1")
    (films / "0" / "0.png").write_bytes((films / "1" / "1.png").read_bytes() + b"\0")
    (films / "0" / "2.png").unlink()
    with pytest.raises(
        UsageError, match=r"2 images of .*films were removed or .* since .*part was started; the first is 0/[02]\.png"
    ):
        pretrain("part", *data, resume=True)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_an_image_may_have_a_name_that_is_not_utf8(pretrain: Any, films: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (films / "0" / "0.png").rename(films / "0" / name)
    data = (f"data.root={films}", "data.validation=0")
    part = pretrain("part", *data, "train.stop_after_steps=1")
    assert f"0/{name}" in json.loads((part.directory / "images.json").read_text())["train"]
    pretrain("part", *data, resume=True)


def test_without_validation_images_the_last_model_is_the_result(pretrain: Any, films: Path) -> None:
    run = pretrain("run", f"data.root={films}", "data.validation=0")
    assert run.summary.best is None
    assert not run.series("validation/loss")
    assert (run.directory / "model" / "pretrainer.json").is_file()
    assert (run.directory / "pictures" / "epoch-002.png").is_file()


@pytest.mark.slow
def test_a_run_starts_from_the_model_of_another(pretrain: Any, whole: Any, tmp_path: Path, difference: Any) -> None:
    still = "train.lr=1e-30"
    second = pretrain("second", f"model.encoder.weights={whole.directory}", still, "train.max_steps=1")
    assert difference(second.exported, whole.exported) < 1e-6
    third = pretrain("third", f"model.encoder.weights={second.directory / 'model'}", still, "train.max_steps=1")
    assert difference(third.exported, whole.exported) < 1e-6
    with pytest.raises(RunError, match="the weights do not fit the model of the recipe"):
        pretrain("other", f"model.encoder.weights={whole.directory}", "model.decoder_width=32")
    with pytest.raises(UsageError, match="contains no pre-trained model of stage 1"):
        pretrain("other", f"model.encoder.weights={whole.directory / 'pictures'}")
    assert not (tmp_path / "other").exists()


# -- several data sets, and studies that must not be among them -----------------------------------------------------


@pytest.mark.slow
def test_a_folder_and_a_dataset_are_trained_on_together(
    pretrain: Any, films: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = f"data.sets=[{{root: '{films}'}}, {{root: '{tiny_dataset}'}}]"
    data = ("data.root=null", sets, "data.validation=0.2")
    whole = pretrain("whole", *data)
    (record,) = json.loads((whole.directory / "images.json").read_text())
    assert (len(record["train"]), len(record["validation"])) == (13, 3)
    assert whole.last_step() == 2 * ((13 + 24) // 8)
    pretrain("part", *data, "train.stop_after_steps=3")
    resumed = pretrain("part", *data, resume=True)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_joined_images_are_those_of_their_sources(films: Path) -> None:
    names = [f"{i % 2}/{i}.png" for i in range(5)]
    joined = JoinedImages([FolderImages(films, names[:2]), FolderImages(films, names[2:])])
    assert [joined.read(i) for i in range(len(joined))] == [films / name for name in names]
    assert [joined.name(i) for i in range(5)] == [str(films / name) for name in names]


@pytest.mark.parametrize("place", ["{study}/0.png", "deep/{study}.png"])
def test_a_held_out_study_among_the_images_is_refused(
    pretrain: Any, films: Path, tiny_dataset: Path, place: str
) -> None:
    from emrrg_cli.datasets.directory import open_dataset

    held_out = (f"data.root={films}", "data.validation=0", f"data.held_out=['{tiny_dataset}']")
    pretrain("clean", *held_out, "train.max_steps=1")
    target = films / place.format(study=open_dataset(tiny_dataset)["test"]["study_id"][0])
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(films / "0" / "0.png", target)
    with pytest.raises(UsageError, match=r"films: 1 of its images or studies are kept for validation or test in"):
        pretrain("bad", *held_out)
    assert not (films.parent / "bad").exists()


def test_a_dataset_may_train_beside_its_own_held_out_studies(pretrain: Any, tiny_dataset: Path) -> None:
    from emrrg_cli.datasets.directory import open_dataset

    assert pretrain("run", f"data.held_out=['{tiny_dataset}']", "train.max_steps=1").last_step() == 1
    held_out = held_out_ids([str(tiny_dataset)])
    study = open_dataset(tiny_dataset)["validation"]["study_id"][0]
    with pytest.raises(UsageError, match=f"1 of its images or studies .* the first is {study}"):
        refuse_held_out(tiny_dataset, [(study, {study}), ("other", {"other"})], held_out)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("images/CXR2384_IM-0942-1001.png", "CXR2384"),
        ("CXR2384/0.jpg", "CXR2384"),
        ("CXR1_1_IM-0001/1.jpg", "CXR1_1_IM-0001"),
    ],
)
def test_a_path_of_iu_x_ray_identifies_its_report(name: str, known: str) -> None:
    assert known in parts_of(name)
    assert "CXR238" not in parts_of(name)


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.root=null", "data.root is not set"),
        ("data.sets=[{root: a}]", "root and sets both name data"),
        ("data.root={empty}", "no files in"),
        ("data.root={gone}", "gone: no such folder"),
        ("data.root={texts}", "1 of 1 files are skipped: 1 not an image; first: a.txt"),
        ("train.batch_size=25", "has 24 usable examples, fewer than train.batch_size=25"),
        ("data.limit=5", "has 5 usable examples, fewer than train.batch_size=8"),
        ("model.encoder.image_size=64", "model.encoder.image_size: must be 128 or more, got 64"),
        ("model.encoder.image_size=160", "image_size must be a multiple of the cluster size 64, got 160"),
        ("model.decoder_width=96", "decoder_width must be a multiple of 64"),
        ("model.decoder_depth=5", "decoder_depth 5 is larger than the depth of the encoder, 4"),
        ("data.crop_scale=[0.5, 0.2]", "crop_scale must be ascending"),
        ("data.crop_scale=[0, 1]", "crop_scale must be ascending"),
        ("model.encoder.drop_path=0.1", "unknown key"),
        ("train.select=loss", "unknown key"),
    ],
)
def test_bad_input_is_one_clear_message_and_leaves_nothing(
    override: str, said: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    places = {name: str(tmp_path / name) for name in ("empty", "gone", "texts")}
    for name, place in places.items():
        override = override.replace(f"{{{name}}}", place)
    code = main(["pretrain", "phantom/pretrain", *options, override, "--output", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_fit_is_refused_before_loading(pretrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emrrg_cli.training.pretrain.build_pretrainer", None)
    with pytest.raises(UsageError, match=r"5 usable examples, fewer than train\.batch_size=8"):
        pretrain("run", "data.limit=5")


def test_a_list_of_images_that_is_broken_is_named(pretrain: Any, films: Path, tmp_path: Path) -> None:
    pretrain("run", f"data.root={films}", "train.stop_after_steps=1")
    (tmp_path / "run" / "images.json").write_text("{")
    with pytest.raises(RunError, match=r"images\.json is damaged"):
        pretrain("run", f"data.root={films}", resume=True)
    (tmp_path / "run" / "checksums.json").unlink()  # as in a run of an earlier version
    with pytest.raises(RunError, match=r"images\.json, the list of this run's images, cannot be read"):
        pretrain("run", f"data.root={films}", resume=True)
