from __future__ import annotations

import json
from pathlib import Path

import pytest

from emrrg_cli.app import main
from emrrg_cli.recipe.library import recipe_names, recipes_dir
from emrrg_cli.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_ls_shows_each_recipe_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "ls", "iu_xray/*full"]) == 0
    shown = capsys.readouterr().out
    assert shown == "iu_xray/finetune-full  Reports for IU X-Ray; the whole encoder is trained instead of LoRA.\n"
    assert main(["recipe", "ls", "iu_xray/*", "--json"]) == 0
    assert [entry["command"] for entry in json.loads(capsys.readouterr().out)][1:3] == [
        "emrrg finetune iu_xray/finetune data.root=DIR model.encoder.weights=FILE",
        "emrrg finetune iu_xray/finetune-full data.root=DIR model.encoder.weights=FILE",
    ]


def test_ls_json_names_stage_and_path_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "ls", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == recipe_names()
    assert {entry["stage"] for entry in entries} >= {"finetune", "preprocess", "evaluate", "generate"}
    assert all(Path(entry["path"]).is_file() for entry in entries)


def test_ls_refuses_a_pattern_that_matches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "ls", "zebra"]) == 2
    assert "no shipped recipe matches zebra" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_opens_with_command_example_and_purpose(name: str) -> None:
    first, second, third = (recipes_dir() / f"{name}.yaml").read_text().splitlines()[:3]
    assert third.startswith("# ")
    assert third.endswith(".")
    assert len(third) <= 80
    folder, file = name.split("/")
    command = file.split("-")[0]
    if command == "preprocess":
        command += " phantom" if folder == "phantom" else " r2gen"
    assert first.startswith(f"# emrrg {command} ")
    assert name.startswith("default/") or f" {name} " in first
    assert f"  emrrg {command} " in second


def test_show_prints_the_file_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "iu_xray/finetune"]) == 0
    assert capsys.readouterr().out == (recipes_dir() / "iu_xray" / "finetune.yaml").read_text()


def test_show_resolved_reads_back_as_the_same_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "iu_xray/finetune-full", "train.lr=5e-5", "model.adapter.targets=[X,Z]"]) == 0
    Path("shown.yaml").write_text(capsys.readouterr().out)
    shown = load_recipe("shown.yaml", stage="finetune")
    assert shown == load_recipe("iu_xray/finetune-full", ["train.lr=5e-5", "model.adapter.targets=[X,Z]"])
    assert (shown.train.lr, shown.model.adapter.targets) == (5e-5, ["X", "Z"])
    assert main(["recipe", "show", "tiny/finetune", "--resolved"]) == 0
    text = capsys.readouterr().out
    assert "weight_decay: 0.01  # weight decay of AdamW; not applied to biases" in text
    assert "(score | loss)" in text


def test_show_of_an_overlay_shows_only_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "default/generate", "generation.num_beams=1"]) == 0
    assert (
        capsys.readouterr().out == "stage: generate\ngeneration:\n  num_beams: 1  # beams of the beam search; 1: none\n"
    )


def test_cp_copies_and_the_copy_still_finds_its_parent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "cp", "iu_xray/finetune-full", "sub/mine.yaml"]) == 0
    assert "sub/mine.yaml" in capsys.readouterr().out
    assert load_recipe("sub/mine.yaml") == load_recipe("iu_xray/finetune-full")
    assert [path.name for path in Path("sub").iterdir()] == ["mine.yaml"]
    assert main(["recipe", "cp", "tiny/finetune", "sub"]) == 0
    assert Path("sub/finetune.yaml").is_file()


def test_cp_overwrites_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("mine\n")
    assert main(["recipe", "cp", "tiny/finetune", "mine.yaml"]) == 2
    assert "mine.yaml already exists" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine\n"
    assert main(["recipe", "cp", "tiny/finetune", "mine.yaml", "--overwrite"]) == 0
    assert main(["recipe", "cp", "tiny/finetune", "mine.yaml", "--force"]) == 0  # the earlier name
    assert Path("mine.yaml").read_text() == (recipes_dir() / "tiny" / "finetune.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "destination", "said"),
    [
        ("tiny/finetune", "mine.txt", "must end in .yaml"),
        ("x.yaml", "y.yaml", "is a path"),
        ("tiny/fine", "y.yaml", "tiny/finetune"),
    ],
)
def test_cp_refuses_recipes_that_could_not_be_run(
    name: str, destination: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "cp", name, destination]) == 2
    assert said in capsys.readouterr().err
    assert not Path(destination).exists()


def test_cp_into_a_place_that_cannot_be_written_fails_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert main(["recipe", "cp", "tiny/finetune", "file/mine.yaml"]) == 1
    assert "error: " in capsys.readouterr().err


def test_validate_names_stage_and_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "validate", "iu_xray/finetune-full"]) == 0
    assert main(["recipe", "validate", "default/preprocess"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "iu_xray/finetune-full: ok (stage finetune, protocol published)",
        "default/preprocess: ok (stage preprocess)",
    ]


def test_validate_refuses_with_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "validate", "iu_xray/finetune", "train.learning_ratee=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: command line: train.learning_ratee: unknown key; did you mean train.lr?\n"


def test_validate_lists_all_problems_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("stage: finetune\ntrain:\n  lr: [1]\n  epohcs: 2\n")
    assert main(["recipe", "validate", "mine.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems in recipe mine.yaml:",
        "  mine.yaml:3: train.lr: expected a number, got a list",
        "  mine.yaml:4: train.epohcs: unknown key; did you mean train.epochs?",
    ]


@pytest.mark.parametrize("stage", ["pretrain", "align"])
@pytest.mark.parametrize("roots", [("a", "a"), ("a", "./a/"), ("a", "b/../a"), ("a", "link"), ("b", "a", "b")])
def test_a_data_set_that_is_named_twice_is_refused(
    stage: str, roots: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to("a")
    sets = f"data.sets=[{', '.join(f'{{root: {root}}}' for root in roots)}]"
    assert main([stage, f"phantom/{stage}", sets]) == 2
    told = capsys.readouterr().err
    assert main(["recipe", "validate", f"phantom/{stage}", sets]) == 2
    assert capsys.readouterr().err == told
    first, last = roots[0], roots[-1]
    both = f"{first} twice" if first == last else f"one directory twice, as {first} and {last}"
    assert f"data.sets names {both}" in told
    assert main(["recipe", "validate", f"phantom/{stage}", "data.sets=[{root: a}, {root: b}]"]) == 0


def test_a_folder_of_films_and_its_subfolder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "films" / "sub").mkdir(parents=True)
    (tmp_path / "films" / "set" / "data").mkdir(parents=True)
    (tmp_path / "films" / "set" / "manifest.json").write_text("{}")
    sets = "data.sets=[{root: films/sub}, {root: films}]"
    for command in (["pretrain"], ["recipe", "validate"]):
        assert main([*command, "phantom/pretrain", sets]) == 2
        assert "data.sets names films and films/sub, which is inside it" in capsys.readouterr().err
    for fine in ("{root: films/set}, {root: films}", "{root: films/sub}, {root: films2}"):
        assert main(["recipe", "validate", "phantom/pretrain", f"data.sets=[{fine}]"]) == 0


@pytest.mark.parametrize("setting", ["context_dropout=0.5", "context_words=9"])
def test_settings_of_a_context_that_is_not_used(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["phantom/finetune", f"data.{setting}"]
    for before in (["finetune"], ["plan"], ["recipe", "validate"]):
        assert main([*before, *command]) == 2
        assert f"data.{setting} has no effect without data.context" in capsys.readouterr().err
    assert main(["recipe", "validate", *command, "data.context=[age]"]) == 0
    assert main(["recipe", "validate", "phantom/finetune", "data.context_dropout=0"]) == 0
