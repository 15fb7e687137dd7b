"""Which directory a run goes to, and whether it may."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.output_paths import check_writable
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.recipe.load import dump_recipe, load_recipe
from emrrg_cli.recipe.paths import with_absolute_paths
from emrrg_cli.training.run_dir import check_run_dir, data_fingerprints, default_run_dir


def _recipe(*overrides: str) -> FinetuneRecipe:
    return load_recipe("tiny/finetune", overrides, stage="finetune")


@pytest.fixture
def started(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(_recipe("data.root=a")))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("recipe", "directory"),
    [
        ("iu_xray/finetune", "runs/iu_xray-finetune"),
        ("my/recipes/long.yaml", "runs/recipes-long"),
        ("long.yml", "runs/long"),
        ("/a/b.yaml", "runs/a-b"),
    ],
)
def test_the_default_is_named_after_the_recipe(recipe: str, directory: str) -> None:
    assert default_run_dir(recipe) == Path(directory)


def test_a_run_is_resumed_by_its_own_recipe(started: Path) -> None:
    assert default_run_dir(str(started / "recipe.yaml"), resume=True) == started
    assert default_run_dir(str(started / "recipe.yaml")) == Path("runs/run-recipe")
    assert default_run_dir("none/recipe.yaml", resume=True) == Path("runs/none-recipe")


def test_a_new_run_takes_a_free_or_an_empty_directory(tmp_path: Path) -> None:
    check_run_dir(tmp_path / "new" / "run", _recipe(), resume=False)
    check_run_dir(tmp_path, _recipe(), resume=False)
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_overwrites_nothing(started: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already exists and is not empty") as caught:
        check_run_dir(started, _recipe("data.root=a"), resume=False)
    assert "--resume" in str(caught.value.hint)
    with pytest.raises(UsageError, match="not empty") as caught:
        check_run_dir(tmp_path, _recipe(), resume=False)
    assert caught.value.hint == "Give another --output."
    with pytest.raises(UsageError, match=r"recipe\.yaml already exists"):
        check_run_dir(started / "recipe.yaml", _recipe(), resume=False)


def test_resume_needs_an_existing_run(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="there is no run to resume here"):
            check_run_dir(directory, _recipe(), resume=True)


@pytest.mark.parametrize(
    "free",
    [
        "output=elsewhere",
        "data.workers=3",
        "train.stop_after_steps=4",
        "train.checkpoint_every_steps=7",
        "train.log_every=3",
        "train.detect_non_finite=true",
        "train.micro_batch_size=2",
        "train.patience=3",
        "train.trackers=[]",
        "generation.batch_size=2",
    ],
)
def test_changes_without_effect_on_results_are_accepted(started: Path, free: str) -> None:
    check_run_dir(started, _recipe("data.root=a", free), resume=True)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["train.lr=1e-5"], "train.lr differs"),
        (["train.epochs=5"], "train.epochs differs"),
        (["data.root=b"], "data.root differs"),
        (["train.score_weights={CIDEr: 1.0}"], "train.score_weights differs"),
        (["model.adapter.targets=[X]", "train.seed=1"], "model.adapter.targets, train.seed differ"),
    ],
)
def test_another_recipe_is_refused_and_the_difference_named(started: Path, changed: list[str], told: str) -> None:
    with pytest.raises(UsageError, match="started with another recipe") as caught:
        check_run_dir(started, _recipe("data.root=a", *changed), resume=True)
    assert caught.value.message.endswith(told)
    assert str(started / "recipe.yaml") in str(caught.value.hint)


def test_paths_of_a_recipe_mean_the_same_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen").mkdir()
    (tmp_path / "scratch").mkdir()
    given = ["data.root=sets/a", "model.encoder.weights=../encoder.safetensors", "model.llm.name=qwen"]
    recipe = with_absolute_paths(_recipe(*given))
    assert recipe.data.root == str(tmp_path / "sets" / "a")
    assert recipe.model.encoder.weights == str(tmp_path.parent / "encoder.safetensors")
    assert recipe.model.llm.name == str(tmp_path / "qwen")
    assert with_absolute_paths(recipe) == recipe
    for name in ("scratch", "org/qwen"):
        assert with_absolute_paths(_recipe(f"model.llm.name={name}")).model.llm.name == name
    assert with_absolute_paths(_recipe()).data.root is None


def test_a_run_is_resumed_from_another_directory_and_path(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (started / "recipe.yaml").write_text(dump_recipe(with_absolute_paths(_recipe("data.root=a"))))
    check_run_dir(started, _recipe("data.root=a"), resume=True)
    monkeypatch.chdir(started)
    check_run_dir(Path(), _recipe("data.root=../a"), resume=True)
    with pytest.raises(UsageError, match=r"data\.root differs"):
        check_run_dir(Path(), _recipe("data.root=a"), resume=True)


def test_a_run_is_not_resumed_with_other_data_in_the_same_place(tiny_dataset: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_dataset, data)
    recipe = _recipe(f"data.root={data}")
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    check_run_dir(run, recipe, resume=True)  # of an earlier version, which recorded nothing
    (run / "environment.json").write_text(json.dumps({"data": data_fingerprints(recipe)}))
    check_run_dir(run, recipe, resume=True)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    with pytest.raises(UsageError, match=r"the data in .*data has changed since .*run was started"):
        check_run_dir(run, recipe, resume=True)
    shutil.rmtree(data)
    with pytest.raises(UsageError, match="no such dataset directory"):
        check_run_dir(run, recipe, resume=True)


def test_a_run_goes_on_with_its_data_in_another_place(tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_dataset, tmp_path / "a")
    shutil.copytree(tiny_dataset, tmp_path / "moved")
    recipe, moved = _recipe(f"data.root={tmp_path / 'a'}"), _recipe(f"data.root={tmp_path / 'moved'}")
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "environment.json").write_text(json.dumps({"data": data_fingerprints(recipe)}))
    shutil.rmtree(tmp_path / "a")
    check_run_dir(run, moved, resume=True)
    for other in (_recipe(f"data.root={tmp_path / 'moved'}", "train.lr=1e-5"), _recipe()):
        with pytest.raises(UsageError, match=r"data\.root"):
            check_run_dir(run, other, resume=True)
    manifest = json.loads((tmp_path / "moved" / "manifest.json").read_text())
    (tmp_path / "moved" / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    with pytest.raises(UsageError, match=r"data\.root differs"):
        check_run_dir(run, moved, resume=True)


def test_datasets_have_a_fingerprint_and_image_folders_none(tiny_dataset: Path, tmp_path: Path) -> None:
    fingerprint = json.loads((tiny_dataset / "manifest.json").read_text())["fingerprint"]
    (tmp_path / "films").mkdir()
    pretrain = load_recipe("phantom/pretrain", [f"data.root={tmp_path / 'films'}"])
    assert data_fingerprints(pretrain) == data_fingerprints(_recipe()) == {}
    sets = f"data.sets=[{{root: '{tiny_dataset}'}}, {{root: '{tiny_dataset}/../{tiny_dataset.name}', weight: 0.5}}]"
    assert data_fingerprints(load_recipe("phantom/align", [sets])) == {str(tiny_dataset): fingerprint}


def test_an_unwritable_place_is_refused_before_the_work(
    tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="file is a file"):
            check_writable(directory)
    check_writable(tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("a/b"))
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for resume, directory in ((False, tmp_path / "new"), (True, started)):
        with pytest.raises(RunError, match="is read-only for you"):
            check_run_dir(directory, _recipe("data.root=a"), resume=resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path, resume: bool) -> None:
    with pytest.raises(UsageError, match=r"must be UTF-8 text, got .*run\\udce9"):
        check_run_dir(tmp_path / os.fsdecode(b"run\xe9"), load_recipe("tiny/finetune"), resume=resume)


def test_files_of_a_killed_first_write_are_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml.tmp-host-123-0123abcd").write_text("stage: fin")
    (tmp_path / ".lock").touch()
    check_run_dir(tmp_path, _recipe(), resume=False)
    (tmp_path / "recipe.yaml.tmp").touch()
    with pytest.raises(UsageError, match="not empty"):
        check_run_dir(tmp_path, _recipe(), resume=False)
