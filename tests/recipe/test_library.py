from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.library import find_recipe, read_layers, recipe_names, recipes_dir

SHIPPED = [
    "chexpert_plus/finetune",
    "chexpert_plus/finetune-full",
    "covid_chestxray/finetune",
    "default/evaluate",
    "default/generate",
    "default/preprocess",
    "iu_xray/finetune",
    "iu_xray/finetune-full",
    "mimic_cxr/finetune",
    "mimic_cxr/finetune-full",
    "phantom/pretrain",
    "tiny/finetune",
    "xray/pretrain-base",
    "xray/pretrain-huge",
    "xray/pretrain-large",
]
IU_XRAY = ["align", "finetune", "finetune-full", "finetune-small", "finetune-smollm2", "pretrain"]


def test_every_shipped_recipe_is_listed() -> None:
    assert set(SHIPPED) <= set(recipe_names())


def test_names_are_sorted_and_match_wildcards_or_a_part() -> None:
    assert recipe_names() == sorted(recipe_names())
    assert recipe_names("iu_xray/*") == [f"iu_xray/{name}" for name in IU_XRAY]
    assert recipe_names("default") == ["default/evaluate", "default/generate", "default/preprocess"]
    assert recipe_names("*/finetun?") == [name for name in recipe_names() if name.endswith("/finetune")]
    assert recipe_names("nothing") == []


def test_a_recipe_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe("iu_xray/finetune") == recipes_dir() / "iu_xray" / "finetune.yaml"
    (tmp_path / "mine.yaml").write_text("stage: finetune\n")
    assert find_recipe(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mine.yaml").read_text() == "stage: finetune\n"


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("iu_xrya/finetune", "iu_xray/finetune"),
        ("iu_xray", "iu_xray/finetune"),
        ("iu_xray/finetune.yaml", "A shipped recipe is named without .yaml: iu_xray/finetune"),
        ("zzzz", "emrrg recipe ls"),
        ("../recipes/iu_xray/finetune", "iu_xray/finetune"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest_names(
    ref: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        find_recipe(ref)
    assert said in (caught.value.hint or "")


def test_extends_takes_shipped_names_and_relative_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("extends: tiny/finetune\ntrain: {epochs: 7}\n")
    (tmp_path / "sub" / "child.yaml").write_text("extends: ../base.yaml\noutput: here\n")
    layers = read_layers(tmp_path / "sub" / "child.yaml")
    assert [Path(layer.name).stem for layer in layers] == ["finetune", "base", "child"]
    assert layers[-1].values == {"output": "here"}


def test_recipes_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UsageError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_layers(tmp_path / "a.yaml")


@pytest.mark.parametrize("parent", ["[a, b]", "3", "gone.yaml", "no/such"])
def test_a_wrong_parent_names_the_line(parent: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"stage: finetune\nextends: {parent}\n")
    with pytest.raises(UsageError, match=r"a\.yaml:2: extends: "):
        read_layers(tmp_path / "a.yaml")


def test_an_unreadable_recipe_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("stage: fin\xe9".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_layers(tmp_path / "latin.yaml")


def test_recipes_are_looked_up_and_checked_without_torch() -> None:
    code = (
        "import sys, json; from emrrg_cli.recipe.load import load_recipe; load_recipe('iu_xray/finetune');"
        "print(json.dumps([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(UsageError, match=r"mine\.yaml is a folder"):
        find_recipe(str(tmp_path / "mine.yaml"))
