from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import Settings
from emrrg_cli.recipe.explain import explained
from emrrg_cli.recipe.layers import Layer
from emrrg_cli.recipe.library import recipe_names
from emrrg_cli.recipe.load import (
    OVERLAYS,
    RECIPES,
    dump_recipe,
    load_recipe,
    load_run_recipe,
    load_saved_recipe,
    resolve_recipe,
)
from emrrg_cli.recipe.overrides import parse_overrides
from emrrg_cli.recipe.protocols import PROTOCOLS
from emrrg_cli.recipe.suggest import is_section, members
from emrrg_cli.recipe.yaml12 import dump, parse_layer
from emrrg_cli.vocabulary import PUBLISHED_PROMPT

KNOWN_STAGES = ", ".join([*RECIPES, *OVERLAYS])


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a recipe into the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "r.yaml") -> str:
        Path(name).write_text(text)
        return name

    return _write


def problems(ref: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        resolve_recipe(ref, overrides)
    lines = caught.value.message.splitlines()
    return [line.strip() for line in (lines[1:] if " problems in recipe " in lines[0] else lines)]


# --- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("+7", 7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        ("[X, Z]", ["X", "Z"]),
        ("&a x", "x"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = parse_layer(f"key: {text}\n", "f").values["key"]
    assert read == value
    assert type(read) is type(value)


def test_keys_are_text_and_their_lines_are_known() -> None:
    layer = parse_layer("# c\na:\n  b: 1\n  12: 2\nlist:\n  - x\n  - y\n", "f.yaml")
    assert layer.values == {"a": {"b": 1, "12": 2}, "list": ["x", "y"]}
    assert layer.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "12"): 4,
        ("list",): 5,
        ("list", "0"): 6,
        ("list", "1"): 7,
    }
    assert layer.where(("a", "b")) == "f.yaml:3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\n", "f:3: not valid YAML"),
        ("a: 1\n b: 2\n", "f:2: not valid YAML"),
        ("- 1\n", "f:1: a recipe is a mapping of keys to values, this is a list"),
        ("just words\n", "f:1: a recipe is a mapping of keys to values, this is a single value"),
        ("a: 1\n---\nb: 2\n", "f:2: not valid YAML"),
        ("[a]: 1\n", "f:1: a key must be a single word"),
        ("a: !!python/name:os.system x\n", "f:1: cannot read 'x'"),
        ("a: 1e999\n", "f:1: cannot read '1e999'"),
        ("a: &x [*x]\n", "f:1: this value contains itself"),
        ("a: *gone\n", "f:1: not valid YAML"),
        ("a: \x01\n", "f: not valid YAML"),
    ],
)
def test_bad_yaml_names_file_and_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layer(text, "f")
    assert caught.value.message.startswith(message)
    assert caught.value.exit_code == 2


def test_a_repeated_key_is_refused_with_both_lines() -> None:
    with pytest.raises(UsageError) as caught:
        parse_layer("train:\n  lr: 1\n  lr: 2\nx: 1\nx: 2\n", "f")
    assert caught.value.message.splitlines() == [
        "f:3: train.lr: given twice, first on line 2",
        "f:5: x: given twice, first on line 4",
    ]


def test_an_empty_file_has_no_stage(write: Any) -> None:
    assert problems(write("# nothing\n")) == [f"r.yaml: stage: must be given; one of {KNOWN_STAGES}"]


@pytest.mark.parametrize(
    "text", ["1e5", "no", "null", "0o7", "1_0", "a: b", "# x", "", "é", "12:30", "two\nlines", "="]
)
def test_text_that_looks_like_something_else_survives_a_dump(text: str) -> None:
    values = {"a": text, "b": {"c": [text, 1e-6, 1e16, 3, True, None]}}
    assert parse_layer(dump(values), "f").values == values


# --- overrides


def test_overrides_are_yaml_values_at_dotted_keys() -> None:
    layer = parse_overrides(
        ["train.lr=5e-5", "model.adapter.targets=[X,Z]", "model.encoder.weights=null", "output=a=b", "train.lr=1e-3"]
    )
    assert layer == Layer(
        "command line",
        {
            "train": {"lr": 1e-3},
            "model": {"adapter": {"targets": ["X", "Z"]}, "encoder": {"weights": None}},
            "output": "a=b",
        },
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("/a b,c/run #2", "/a b,c/run #2"), ("'x' # y", "x"), ('"a #b"', "a #b"), ("1 # one", 1), ("a#b", "a#b")],
)
def test_a_path_with_a_number_sign_is_whole(text: str, value: object) -> None:
    assert parse_overrides([f"a={text}"]).values == {"a": value}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.lr"], "not of the form key=value"),
        (["=3"], "empty part"),
        (["train..lr=3"], "empty part"),
        ([".lr=3"], "empty part"),
        (["data.root="], "data.root: no value after ="),
        (["a=[1"], "a: not valid YAML"),
        (["a={b: 1, b: 2}"], "b: given twice"),
        (["train.lr=1", "train.lr.x=2"], "train.lr.x: train.lr already has a value"),
        (["stage=preprocess"], "stage: cannot be overridden"),
    ],
)
def test_malformed_overrides_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_overrides(overrides)
    assert caught.value.message.startswith("command line: ")
    assert said in caught.value.message


# --- layers and protocols


def test_later_layers_win_key_by_key_and_replace_lists(write: Any) -> None:
    write("stage: finetune\ntrain: {lr: 1e-3, epochs: 3, betas: [0.9, 0.95]}\noutput: base\n", "base.yaml")
    write("extends: base.yaml\ntrain: {epochs: 4, betas: [0.8, 0.9]}\n", "child.yaml")
    recipe = load_recipe("child.yaml", ["train.seed=7"], stage="finetune")
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.betas) == (1e-3, 4, [0.8, 0.9])
    assert (recipe.train.seed, recipe.output) == (7, "base")


def test_the_default_protocol_is_the_weakest_layer(write: Any) -> None:
    recipe = load_recipe(write("stage: finetune\n"), stage="finetune")
    assert recipe.protocol == "ours"
    assert recipe.model.adapter.targets == ["X"]
    assert recipe.evaluation.references == "whole"
    assert (
        load_recipe(
            write("stage: finetune\nmodel: {adapter: {targets: none}}\n"), stage="finetune"
        ).model.adapter.targets
        == "none"
    )


def test_a_protocol_overrides_only_weaker_layers(write: Any) -> None:
    write(
        "stage: finetune\nmodel: {adapter: {targets: [Z]}}\ngeneration: {num_beams: 7, min_new_tokens: 1}\n",
        "base.yaml",
    )
    write("extends: base.yaml\nprotocol: published\ngeneration: {num_beams: 5}\n", "child.yaml")
    recipe = load_recipe("child.yaml", stage="finetune")
    assert recipe.protocol == "published"
    assert recipe.model.adapter.targets == "full"
    assert (recipe.generation.num_beams, recipe.generation.min_new_tokens) == (5, 80)
    assert recipe.evaluation.references == "clipped"

    switched = load_recipe("child.yaml", ["protocol=ours", "generation.max_new_tokens=50"], stage="finetune")
    assert switched.protocol == "ours"
    assert switched.model.adapter.targets == ["X"]
    assert switched.generation.num_beams == PROTOCOLS["ours"]["generation"]["num_beams"]
    assert switched.generation.max_new_tokens == 50


def test_recipes_never_change_presets() -> None:
    before = yaml.safe_dump(PROTOCOLS)
    load_recipe("iu_xray/finetune-full", ["model.adapter.targets=[Z]", "generation.num_beams=9"])
    assert yaml.safe_dump(PROTOCOLS) == before


# --- problems


def test_our_key_is_suggested_for_a_misspelt_synonym() -> None:
    assert problems("iu_xray/finetune", "train.learning_ratee=1") == [
        "command line: train.learning_ratee: unknown key; did you mean train.lr?"
    ]


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.epoch=1", "train.epochs"),
        ("train.max_epochs=1", "train.epochs"),
        ("lr=1", "train.lr"),
        ("learning-rate=1", "train.lr"),
        ("learning_ratee=1", "train.lr"),
        ("train.num_beams=1", "generation.num_beams"),
        ("model.adapter.r=1", "model.adapter.rank"),
        ("model.adapter.target_modules=[X]", "model.adapter.targets"),
        ("data.path=x", "data.root"),
        ("batch_size=1", "train.batch_size or generation.batch_size"),
        ("training.lr=1", "train"),
    ],
)
def test_unknown_keys_get_the_nearest_valid_one(override: str, suggestion: str) -> None:
    key = override.split(".lr=")[0] if override.startswith("training") else override.split("=")[0]
    assert problems("tiny/finetune", override) == [f"command line: {key}: unknown key; did you mean {suggestion}?"]


def test_an_unknown_key_without_match_says_where_keys_are_listed() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("tiny/finetune", ["train.qqqq=1"])
    assert caught.value.message == "command line: train.qqqq: unknown key"
    assert "--resolved" in (caught.value.hint or "")


def test_every_problem_is_listed_in_order_with_its_line(write: Any) -> None:
    write("stage: finetune\ntrain:\n  lr: fast\n", "base.yaml")
    ref = write(
        "extends: base.yaml\n"
        "protocol: publishd\n"
        "generation:\n"
        "  num_beams: 0\n"
        "  temperature: null\n"
        "model:\n"
        "  adapter:\n"
        "    targets:\n"
        "      - X\n"
        "      - Q\n"
        "  llm: big\n"
        "train.seed: 3\n"
    )
    assert problems(ref, "train.epochs=1.5", "evaluation.reference=whole") == [
        'base.yaml:3: train.lr: expected a number, got the text "fast"',
        'r.yaml:2: protocol: expected one of published, ours, got the text "publishd"; did you mean published?',
        "r.yaml:4: generation.num_beams: must be 1 or more, got 0",
        "r.yaml:5: generation.temperature: expected a number, got null",
        "r.yaml:10: model.adapter.targets[1]: expected one of X, Z, dt, B, C, in_proj, x_proj, dt_proj, out_proj, "
        'patch_embed, mlp, llm, got the text "Q"',
        'r.yaml:11: model.llm: expected a section of settings, got the text "big"',
        "r.yaml:12: train.seed: dotted keys are for the command line; in a file, nest the key in its section",
        "command line: train.epochs: expected a whole number, got 1.5",
        "command line: evaluation.reference: unknown key; did you mean evaluation.references?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.llm.frozen=yes", 'model.llm.frozen: expected true or false, or null, got the text "yes"'),
        ("train.batch_size=true", "train.batch_size: expected a whole number, got true"),
        ("train.batch_size='4'", 'train.batch_size: expected a whole number, got the text "4"'),
        ("data.root=3", "data.root: expected text, or null, got 3"),
        ("train.betas=[0.9]", "train.betas: must have at least 2 items, got 1"),
        ("train.betas=0.9", "train.betas: expected a list of numbers, got 0.9"),
        ("train.score_weights={CIDEr: a}", 'train.score_weights.CIDEr: expected a number, got the text "a"'),
        ("train.score_weights=[1]", "train.score_weights: expected a mapping of names to numbers, got a list"),
        ("model.encoder.drop_path=1", "model.encoder.drop_path: must be less than 1, got 1"),
        ("generation.top_p=1.5", "generation.top_p: must be 1 or less, got 1.5"),
        ("train.seed=2147483648", "train.seed: must be less than 2147483648, got 2147483648"),
        ("generation.seed=4294967296", "generation.seed: must be less than 2147483648, got 4294967296"),
        ("train.lr=0", "train.lr: must be more than 0, got 0"),
        ("train.lr.x=0", "train.lr: expected a number, got a mapping"),
        (
            "model.prompt='Human:'",
            "model.prompt: must contain <ImageHere> once, in the place of the image; it occurs 0 times",
        ),
        (
            "model.prompt='<ImageHere><ImageHere> a'",
            "model.prompt: must contain <ImageHere> once, in the place of the image; it occurs 2 times",
        ),
        (
            "model.prompt='a <ImageHere> '",
            "model.prompt: must have text after <ImageHere>, before the report",
        ),
        ("train=null", "train: a section without settings; remove it"),
        (
            "train.schedule=Cosin",
            'train.schedule: expected one of cosine, constant, got the text "Cosin"; did you mean cosine?',
        ),
    ],
)
def test_wrong_values_are_explained_in_plain_words(override: str, message: str) -> None:
    assert problems("tiny/finetune", override) == [f"command line: {message}"]


def test_a_union_gives_one_problem() -> None:
    (problem,) = problems("tiny/finetune", "model.adapter.targets=x")
    assert problem.endswith('or one of full, none, got the text "x"; did you mean [X]?')
    (problem,) = problems("tiny/finetune", "model.adapter.targets={a: 1}")
    assert problem.endswith("or one of full, none, got a mapping")
    assert problems("default/preprocess", "size=orignal") == [
        'command line: size: expected a whole number, or original, got the text "orignal"; did you mean original?'
    ]


def test_a_conflict_names_the_key_that_caused_it(write: Any) -> None:
    ref = write("stage: finetune\ntrain:\n  epochs: 1\n  min_lr: 1.0\n")
    assert problems(ref) == ["r.yaml:4: train: min_lr 1.0 is larger than lr 0.0001"]
    assert problems("tiny/finetune", "train.micro_batch_size=16") == [
        "command line: train: micro_batch_size 16 is larger than batch_size 8"
    ]
    assert problems("default/preprocess", "size=3") == ["command line: size must be 32 or more, got 3"]


# --- stages, runs, round trips


def test_a_recipe_for_another_stage_is_refused() -> None:
    with pytest.raises(UsageError, match="recipe default/preprocess is for `preprocess`, not `finetune`"):
        load_recipe("default/preprocess", stage="finetune")
    with pytest.raises(UsageError, match="recipe tiny/finetune is for `finetune`, not `preprocess`"):
        load_recipe("tiny/finetune", stage="preprocess")
    with pytest.raises(UsageError, match="recipe default/evaluate is for `evaluate`"):
        load_recipe("default/evaluate")


def test_an_unknown_stage_lists_the_stages(write: Any) -> None:
    assert problems(write("stage: finetun\n")) == [
        f"r.yaml:1: stage: expected one of {KNOWN_STAGES}, got finetun; did you mean finetune?"
    ]
    assert problems(write("stage: [finetune]\n"))[0].startswith("r.yaml:1: stage: expected one of")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert resolve_recipe(name)["stage"] == name.split("/")[1].split("-")[0]


@pytest.mark.parametrize("name", [name for name in recipe_names() if "evaluate" not in name and "generate" not in name])
def test_an_explained_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "explained.yaml").write_text(explained(recipe.model_dump(), type(recipe)))
    assert load_recipe(str(tmp_path / "explained.yaml")) == recipe


def test_an_explained_value_of_several_lines_reads_back(tmp_path: Path) -> None:
    overrides = [
        'model.prompt="one: \\n<ImageHere># no comment\\ntwo\\n"',
        "train.self_critical={}",
        f"data.root={'x ' * 120}#",
    ]
    for name, given in (("tiny/finetune", overrides), ("xray/align-base", [f"data.sets={[{'root': 'x' * 99}] * 3}"])):
        recipe = load_recipe(name, given)
        text = explained(recipe.model_dump(), type(recipe))
        (tmp_path / "explained.yaml").write_text(text)
        assert load_recipe(str(tmp_path / "explained.yaml")) == recipe


@pytest.mark.parametrize("schema", RECIPES.values())
def test_every_setting_of_a_recipe_says_what_it_means(schema: type[Settings]) -> None:
    sections, unexplained = [schema], []
    for section in sections:
        for name, field in section.model_fields.items():
            kinds = [(get_args(kind) or [kind])[-1] for kind in members(field.annotation)]
            inner = [kind for kind in kinds if is_section(kind)]
            sections += inner
            if not inner and name != "stage" and not field.description:
                unexplained.append(f"{section.__name__}.{name}")
    assert not unexplained


@pytest.mark.parametrize("name", [name for name in recipe_names() if "evaluate" not in name and "generate" not in name])
def test_a_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(str(tmp_path / "resolved.yaml"))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize(
    ("dataset", "batch", "epochs", "tokens", "beams", "shortest", "longest", "size"),
    [
        ("iu_xray", 4, 20, 60, 5, 40, 100, "base"),
        ("mimic_cxr", 6, 5, 100, 3, 80, 120, "large"),
        ("chexpert_plus", 6, 10, 100, 3, 80, 120, "large"),
    ],
)
@pytest.mark.parametrize("variant", ["finetune", "finetune-full"])
def test_recipes_of_the_paper_have_its_settings(
    dataset: str, batch: int, epochs: int, tokens: int, beams: int, shortest: int, longest: int, size: str, variant: str
) -> None:
    recipe = load_recipe(f"{dataset}/{variant}", stage="finetune")
    train, generation = recipe.train, recipe.generation
    assert (train.batch_size, train.epochs, recipe.data.max_report_tokens) == (batch, epochs, tokens)
    assert (generation.num_beams, generation.min_new_tokens, generation.max_new_tokens) == (beams, shortest, longest)
    assert (generation.repetition_penalty, generation.length_penalty) == (2.0, 2.0)
    assert (train.lr, train.min_lr, train.schedule, train.schedule_unit) == (1e-4, 1e-6, "cosine", "epoch")
    assert train.score_weights == {"BLEU_4": 0.8, "CIDEr": 0.2}
    assert recipe.model.llm.is_frozen
    assert (recipe.model.encoder.size, recipe.model.encoder.image_size, recipe.model.hybrid.every) == (size, 224, 8)
    assert recipe.data.cleaning == ("r2gen-iu" if dataset == "iu_xray" else "r2gen-mimic")
    if variant == "finetune":
        assert (recipe.protocol, recipe.model.adapter.targets, recipe.model.adapter.rank) == ("ours", ["X"], 16)
    else:
        assert (recipe.protocol, recipe.model.adapter.targets) == ("published", "full")
        assert recipe.evaluation.references == "clipped"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    recipe = load_recipe("tiny/finetune", ["generation.max_new_tokens=70", "data.root=somewhere"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(recipe))
    return tmp_path / "run"


def test_a_run_without_a_prompt_has_the_published_one(run_dir: Path) -> None:
    file = run_dir / "recipe.yaml"
    document = resolve_recipe(str(file))
    assert document["model"].pop("prompt") == PUBLISHED_PROMPT
    file.write_text(dump(document))
    assert "ImageHere" not in file.read_text()
    assert load_run_recipe(run_dir, None, [], "evaluate").model.prompt == PUBLISHED_PROMPT


def test_a_run_of_another_version_is_read(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "recipe.yaml"
    expected, document = load_saved_recipe(run_dir), resolve_recipe(str(file))
    document["generation"] |= {"findings_draws": None, "gone": {"a": None, "b": {"c": False}}}
    file.write_text(dump(document))
    for read in (load_saved_recipe, lambda run: load_run_recipe(run, None, [], "generate")):
        capsys.readouterr()
        assert read(run_dir) == expected
        assert capsys.readouterr().err == (
            f"{file} is of another version; settings that were off there are ignored: "
            "generation.findings_draws, generation.gone\n"
        )
    assert problems(str(file))[0].endswith("generation.findings_draws: unknown key")  # as a recipe of a user
    document["generation"]["findings_draws"] = 4
    file.write_text(dump(document))
    for read in (load_saved_recipe, lambda run: load_run_recipe(run, None, [], "generate")):
        with pytest.raises(UsageError, match=r"generation\.findings_draws: unknown key"):
            read(run_dir)


def test_an_overlay_changes_only_its_own_settings(run_dir: Path) -> None:
    assert load_run_recipe(run_dir, None, [], "evaluate") == load_recipe(str(run_dir / "recipe.yaml"))
    recipe = load_run_recipe(run_dir, None, ["generation.num_beams=4", "data.root=null"], "generate")
    assert (recipe.stage, recipe.data.root) == ("finetune", None)
    assert (recipe.generation.num_beams, recipe.generation.max_new_tokens) == (4, 70)


def test_an_overlay_recipe_may_be_a_file_that_extends_another(run_dir: Path, write: Any) -> None:
    ref = write("extends: default/generate\ngeneration: {do_sample: true, temperature: 0.7}\n")
    recipe = load_run_recipe(run_dir, ref, ["generation.temperature=0.5"], "generate")
    assert (recipe.generation.do_sample, recipe.generation.temperature) == (True, 0.5)


def test_a_protocol_in_an_overlay_leaves_the_model_as_trained(run_dir: Path) -> None:
    (run_dir / "recipe.yaml").write_text(dump_recipe(load_recipe("tiny/finetune", ["model.adapter.targets=[Z]"])))
    recipe = load_run_recipe(run_dir, None, ["protocol=published"], "evaluate")
    assert recipe.protocol == "published"
    assert recipe.evaluation.references == "clipped"
    assert recipe.generation.min_new_tokens == 80
    assert recipe.model.adapter.targets == ["Z"]


def test_an_overlay_cannot_change_training_or_conflict(run_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"command line: train: was fixed when the run was trained; `evaluate`"):
        load_run_recipe(run_dir, None, ["train.lr=1"], "evaluate")
    with pytest.raises(
        UsageError, match=r"command line: generation: min_new_tokens 90 is larger than max_new_tokens 70"
    ):
        load_run_recipe(run_dir, None, ["generation.min_new_tokens=90"], "evaluate")
    with pytest.raises(UsageError, match=r"unknown key; did you mean generation.num_beams"):
        load_run_recipe(run_dir, None, ["generation.beam_size=2"], "evaluate")


def test_an_overlay_changes_only_llm_place_and_computation(run_dir: Path, write: Any) -> None:
    recipe = load_run_recipe(
        run_dir, None, ["model.llm.name=/elsewhere", "model.llm.dtype=bf16", "model.scan=reference"], "evaluate"
    )
    assert (recipe.model.llm.name, recipe.model.llm.dtype, recipe.model.scan) == ("/elsewhere", "bf16", "reference")
    overlay = "model:\n  visual_prompt: pooled\n  llm:\n    name: /elsewhere\n    quantization: 4bit\n"
    with pytest.raises(UsageError) as caught:
        load_run_recipe(
            run_dir, write(f"stage: generate\n{overlay}"), ["model.adapter={rank: 2}", "model.viws=concat"], "generate"
        )
    said = "was fixed when the run was trained; `generate` cannot change it"
    assert [line.strip() for line in caught.value.message.splitlines()[1:]] == [
        f"r.yaml:3: model.visual_prompt: {said}",
        f"r.yaml:6: model.llm.quantization: {said}",
        f"command line: model.adapter: {said}",
        "command line: model.viws: unknown key; did you mean model.views?",
    ]
    for broken in ("model=3", "model.llm=null"):
        with pytest.raises(UsageError, match=r"command line: model(\.llm)?: (expected a section|a section without)"):
            load_run_recipe(run_dir, None, [broken], "evaluate")


def test_an_overlay_alone_is_checked_except_for_conflicts() -> None:
    assert resolve_recipe("default/evaluate", ["generation.min_new_tokens=200"]) == {
        "stage": "evaluate",
        "generation": {"min_new_tokens": 200},
    }
    assert problems("default/evaluate", "output=x", "generation.num_beams=a") == [
        "command line: output: was fixed when the run was trained; `evaluate` cannot change it",
        'command line: generation.num_beams: expected a whole number, got the text "a"',
    ]


def test_a_directory_without_a_recipe_is_no_run_directory(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run directory: it has no recipe\.yaml"):
        load_run_recipe(tmp_path, None, [], "evaluate")
    with pytest.raises(UsageError, match=r"no such run directory: .*none"):
        load_run_recipe(tmp_path / "none", None, [], "evaluate")
    with pytest.raises(UsageError, match=r"recipe default/generate is for `generate`, not `evaluate`"):
        load_run_recipe(run_dir, "default/generate", [], "evaluate")
    (run_dir / "recipe.yaml").write_text("stage: preprocess\n")
    with pytest.raises(UsageError, match=r"holds a `preprocess` run"):
        load_run_recipe(run_dir, None, [], "evaluate")


@pytest.mark.parametrize(("cleaning", "decoding"), [("r2gen-iu", (5, 40, 100)), ("r2gen-mimic", (3, 80, 120))])
def test_the_published_decoding_is_that_of_the_data_set(tmp_path: Path, cleaning: str, decoding: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for protocol in ("ours", "published"):  # of the run
        recipe = load_recipe("tiny/finetune", [f"data.cleaning={cleaning}", f"protocol={protocol}"], stage="finetune")
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        generation = load_run_recipe(run, None, ["protocol=published"], "evaluate").generation
        assert (generation.num_beams, generation.min_new_tokens, generation.max_new_tokens) == decoding
        assert (generation.repetition_penalty, generation.length_penalty) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.self_critical.rewards", {"CIDEr": 1.0}), ("generation.consensus_scores", {"BLEU_4": 1.0})],
)
def test_weights_of_scores_are_replaced_as_a_whole(key: str, value: dict[str, float]) -> None:
    recipe = load_recipe("iu_xray/finetune-small", [f"{key}={value}"], stage="finetune").model_dump()
    for part in key.split("."):
        recipe = recipe[part]
    assert recipe == value


def test_later_overrides_of_a_section_keep_its_other_keys() -> None:
    overrides = ["model.adapter.rank=4", "model.adapter={targets: [X], alpha: 8.0}", "model.adapter={alpha: 2.0}"]
    adapter = load_recipe("iu_xray/finetune", overrides, stage="finetune").model.adapter
    assert (adapter.rank, adapter.alpha, adapter.targets) == (4, 2.0, ["X"])


@pytest.mark.parametrize("weights", ["{}", "{BLEU_4: 0}", "{BLEU_1: -1}", "{BLEU_1: 2, BLEU_4: -1}"])
@pytest.mark.parametrize("key", ["train.score_weights", "train.self_critical.rewards", "generation.consensus_scores"])
def test_weights_that_choose_nothing_are_refused(key: str, weights: str) -> None:
    with pytest.raises(UsageError, match="needs a score with a weight above 0"):
        load_recipe("iu_xray/finetune-small", [f"{key}={weights}"], stage="finetune")


def test_score_weights_are_replaced_as_a_whole() -> None:
    train = load_recipe("iu_xray/finetune", ["train.score_weights={BLEU_1: 1.0}"], stage="finetune").train
    assert train.score_weights == {"BLEU_1": 1.0}
