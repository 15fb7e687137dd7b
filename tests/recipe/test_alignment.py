"""Recipes of stage 2: what they say, and what is refused."""

from __future__ import annotations

import pytest

from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.load import dump_recipe, load_recipe


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_the_published_settings(size: str) -> None:
    recipe = load_recipe(f"xray/align-{size}", stage="align")
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.train.lr) == (48, 50, 1e-4)
    assert (recipe.model.encoder.size, recipe.model.encoder.image_size, recipe.model.dim) == (size, 224, 2048)
    assert recipe.model.text.name == "emilyalsentzer/Bio_ClinicalBERT"
    assert (recipe.model.text.pooling, recipe.data.max_text_tokens) == ("last", 128)


def test_the_phantom_recipes_share_one_encoder() -> None:
    encoder = load_recipe("phantom/align", stage="align").model.encoder
    after = load_recipe("phantom/finetune", stage="finetune").model.encoder
    before = load_recipe("phantom/pretrain", stage="pretrain").model.encoder
    assert encoder.model_dump() == after.model_dump()
    assert encoder.width_and_depth == before.width_and_depth
    assert (encoder.d_state, encoder.image_size) == (before.d_state, before.image_size)


def test_one_data_set_or_several(tmp_path: object) -> None:
    ((one, weight),) = load_recipe("phantom/align", ["data.root=a"], stage="align").data.all_sets()
    assert (one.root, one.section, one.cleaning, weight) == ("a", "report", "r2gen-iu", 1.0)
    sets = "data.sets=[{root: a, weight: 0.5}, {root: b, section: impression, cleaning: none}]"
    recipe = load_recipe("phantom/align", [sets, "data.max_views=1", "data.limit=7"], stage="align")
    (first, half), (second, whole) = recipe.data.all_sets()
    assert (half, whole) == (0.5, 1.0)
    assert (first.root, first.section, first.cleaning) == ("a", "report", "r2gen-iu")
    assert (second.root, second.section, second.cleaning) == ("b", "impression", "none")
    assert {(part.max_views, part.limit) for part in (first, second)} == {(1, 7)}
    assert load_recipe("phantom/align", stage="align").data.all_sets() == []


def test_a_dumped_recipe_reads_back(tmp_path: object) -> None:
    from pathlib import Path

    recipe = load_recipe("xray/align-base", ["data.sets=[{root: a, weight: 0.5}, {root: b}]"], stage="align")
    file = Path(str(tmp_path)) / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(str(file), stage="align") == recipe


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.sets=[{root: a, weight: 0}]", "data.sets[0].weight: must be more than 0, got 0"),
        ("data.sets=[{root: a}, {root: b, weight: -1}]", "data.sets[1].weight: must be more than 0, got -1"),
        ("data.sets=[{weight: 2}]", "data.sets[0].root: must be given"),
        ("data.sets=[{root: a, wieght: 2}]", "data.sets[0].wieght: unknown key; did you mean data.sets[0].weight?"),
        ("data.sets=a", "data.sets: expected a list of sections of settings, got"),
        ("data={root: a, sets: [{root: b}]}", "root and sets both name data"),
        ("train.batch_size=1", "train.batch_size: must be 2 or more, got 1"),
        ("train={batch_size: 4, micro_batch_size: 8}", "micro_batch_size 8 is larger than batch_size 4"),
        ("model.text.pooling=first", "model.text.pooling: expected one of last, mean"),
        ("model.text={name: scratch, frozen: true}", "frozen must be false"),
        ("model.text.scratch.heads=3", "hidden_size 128 must be a multiple of heads (3)"),
        ("train.score_weights={}", "train.score_weights: unknown key"),
        ("model.llm.name=x", "model.llm: unknown key"),
    ],
)
def test_wrong_settings_are_refused(override: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("phantom/align", [override], stage="align")
    assert told in caught.value.message
