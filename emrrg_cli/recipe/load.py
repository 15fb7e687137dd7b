"""Loads a recipe by name or path with `key=value` overrides as checked settings, and writes settings as YAML.

A recipe is a stack of layers, weakest first: schema defaults, the preset of the default protocol, the recipe it
extends, itself, the command line. If a layer sets `protocol`, that preset is inserted just below the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

from pydantic import ValidationError

from emrrg_cli.console import err, printable
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import Settings
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.recipe.layers import KeyPath, Layer, merge, with_presets
from emrrg_cli.recipe.library import find_recipe, read_layer, read_layers
from emrrg_cli.recipe.overrides import parse_overrides
from emrrg_cli.recipe.preprocessing import PreprocessRecipe
from emrrg_cli.recipe.problems import MAX_PROBLEMS, Problem, find_problems, place_of
from emrrg_cli.recipe.protocols import protocols_for
from emrrg_cli.recipe.suggest import annotation_at
from emrrg_cli.recipe.yaml12 import dump
from emrrg_cli.stages import STAGES

S = TypeVar("S", bound=Settings)

# The recipe class of every command that has its own recipes.
RECIPES: dict[str, type[Settings]] = {
    "preprocess": PreprocessRecipe,
    **{name: stage.load_recipe_class() for name, stage in STAGES.items()},
}
# Recipes whose settings replace settings of a trained run.
OVERLAYS = ("evaluate", "generate")
# Settings that the run has already fixed, so that no overlay can change them,
_SETTLED = ("output", "train", "model")
# except the location of the LLM, and how the model is computed.
_UNSETTLED = (("model", "llm", "name"), ("model", "llm", "dtype"), ("model", "scan"), ("model", "findings_threshold"))

RUN_RECIPE = "recipe.yaml"


@overload
def load_recipe(ref: str, overrides: Sequence[str] = (), *, stage: type[S]) -> S: ...
@overload
def load_recipe(ref: str, overrides: Sequence[str] = (), *, stage: str | None = None) -> Settings: ...
def load_recipe(ref: str, overrides: Sequence[str] = (), *, stage: type[Settings] | str | None = None) -> Settings:
    """Loads and checks a recipe.

    Args:
        ref: Name of a shipped recipe (`iu_xray/finetune`), or a path that ends in `.yaml`.
        overrides: `key=value` strings, stronger than the recipe.
        stage: The stage that the caller runs, by name or as its recipe class; None: any.

    Raises:
        UsageError: The recipe does not exist or is for another stage, an override is malformed, or settings are
            unknown, of the wrong type or in conflict; all such settings are listed together with their places.
    """
    return _checked(ref, _read(ref, overrides), stage)


def load_saved_recipe(run_dir: Path, stage: str | None = None) -> Settings:
    """Loads the recipe that a run has saved. Settings of another version that were off (null or false) are ignored.

    Raises:
        UsageError: As `load_recipe`.
    """
    file = run_dir / RUN_RECIPE
    return _checked(str(file), [_without_removed(layer, str(file)) for layer in read_layers(file)], stage)


def _checked(ref: str, layers: Sequence[Layer], stage: type[Settings] | str | None) -> Settings:
    found = _stage_of(ref, layers)
    if isinstance(stage, type):
        stage = next(name for name, recipe in RECIPES.items() if recipe is stage)
    if stage is not None and found != stage:
        hint = f"`emrrg recipe ls {stage}` lists recipes for this command."
        raise UsageError(f"recipe {ref} is for `{found}`, not `{stage}`", hint=hint)
    if found in OVERLAYS:
        raise UsageError(f"recipe {ref} is for `{found}`, which applies it to the recipe of a trained run")
    return _validated(ref, RECIPES[found], _with_presets(found, layers))


def load_run_recipe(
    run_dir: Path, recipe_ref: str | None, overrides: Sequence[str], stage: Literal["evaluate", "generate"]
) -> FinetuneRecipe:
    """Loads the recipe of a trained run with the settings of an `evaluate` or `generate` recipe on top.

    A `protocol` in the overlay sets text, decoding and scoring, but does not change the trained model.

    Args:
        run_dir: Run directory of `finetune`.
        recipe_ref: The overlay; None: the shipped default of the stage.
        overrides: `key=value` strings, stronger than the overlay.
        stage: The stage that the caller runs.

    Raises:
        UsageError: `run_dir` is not a run directory, or as in `load_recipe`.
    """
    file = run_dir / RUN_RECIPE
    if not file.is_file():
        hint = "Name the directory that `emrrg finetune` wrote."
        if not run_dir.exists():
            raise UsageError(f"no such run directory: {run_dir}", hint=hint)
        raise UsageError(f"{run_dir} is not a run directory: it has no {RUN_RECIPE}", hint=hint)
    run = _without_removed(read_layer(file), str(file))
    run_stage = _stage_of(str(file), [run])
    if run_stage != "finetune":
        raise UsageError(f"{run_dir} holds a `{run_stage}` run; `{stage}` needs a `finetune` run")
    ref = recipe_ref or f"default/{stage}"
    overlay = _read(ref, overrides)
    if (found := _stage_of(ref, overlay)) != stage:
        hint = f"`default/{stage}` is one to start from."
        raise UsageError(f"recipe {ref} is for `{found}`, not `{stage}`", hint=hint)
    layers, problems = _overlay(stage, overlay, run)
    recipe = _validated(ref, FinetuneRecipe, [run, *layers], problems)
    return cast(FinetuneRecipe, recipe)


def resolve_recipe(ref: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the checked settings of a recipe as a document: all settings, or for an overlay recipe only its own.

    Raises:
        UsageError: As in `load_recipe`.
    """
    layers = _read(ref, overrides)
    stage = _stage_of(ref, layers)
    if stage not in OVERLAYS:
        return _validated(ref, RECIPES[stage], _with_presets(stage, layers)).model_dump()
    layers, problems = _overlay(stage, layers)
    # An overlay may conflict with defaults that the run changes, so conflicts are checked only with the run.
    problems += [problem for problem in _problems(FinetuneRecipe, layers)[1] if not problem.conflict]
    _refuse(ref, problems)
    return {"stage": stage} | {key: value for key, value in merge(layers).items() if key != "stage"}


def dump_recipe(recipe: Settings) -> str:
    """Returns the YAML text of a recipe with every setting. `load_recipe` reads an equal recipe from it."""
    return dump(recipe.model_dump())


def _read(ref: str, overrides: Sequence[str]) -> list[Layer]:
    layers = read_layers(find_recipe(ref))
    return [*layers, parse_overrides(overrides)] if overrides else layers


def _without_removed(layer: Layer, file: str) -> Layer:
    """Removes settings that this version no longer has and that were off, with a line in the terminal.

    A run saves all settings of its version. Without a setting that was off, it is the same run.
    """
    schema = RECIPES.get(str(layer.values.get("stage")))
    removed: list[str] = []

    def kept(values: Mapping[str, Any], section: KeyPath = ()) -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            path = (*section, key)
            if schema is not None and annotation_at(schema, path) is None and _is_off(value):
                removed.append(".".join(path))
            else:
                found[key] = kept(value, path) if isinstance(value, dict) else value
        return found

    values = kept(layer.values)
    if removed:
        text = f"{file} is of another version; settings that were off there are ignored: {', '.join(removed)}"
        err.print(printable(text), markup=False, soft_wrap=True)
    return Layer(layer.name, values, layer.lines)


def _is_off(value: Any) -> bool:
    return all(map(_is_off, value.values())) if isinstance(value, dict) else value is None or value is False


def _stage_of(ref: str, layers: Sequence[Layer]) -> str:
    known = [*RECIPES, *OVERLAYS]
    where, _ = place_of(("stage",), layers)
    if not where:
        raise UsageError(f"{ref}: stage: must be given; one of {', '.join(known)}")
    stage = merge(layers)["stage"]
    if stage not in known:
        close = get_close_matches(str(stage), known, n=1)
        suggestion = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{where}: stage: expected one of {', '.join(known)}, got {stage}{suggestion}")
    return str(stage)


def _with_presets(stage: str, layers: Sequence[Layer]) -> list[Layer]:
    if stage != "finetune":
        return list(layers)
    return with_presets(layers, protocols_for(_cleaning(layers)), default="ours", without=frozenset())


def _cleaning(layers: Sequence[Layer]) -> str | None:
    data = merge(layers).get("data")
    return data.get("cleaning") if isinstance(data, dict) else None


def _overlay(stage: str, layers: Sequence[Layer], run: Layer | None = None) -> tuple[list[Layer], list[Problem]]:
    """Returns layers for a run's recipe, without the settings that the run has fixed, which become problems."""
    fit, problems = [], []
    message = f"was fixed when the run was trained; `{stage}` cannot change it"
    for index, layer in enumerate(layers):
        values, settled = _divide(layer.values)
        for path in settled:
            problems.append(Problem(layer.where(path), path, message, (index, layer.lines.get(path, 0))))
        values.pop("stage", None)
        fit.append(Layer(layer.name, values, layer.lines))
    presets = protocols_for(_cleaning(fit if run is None else [run, *fit]))
    return with_presets(fit, presets, default=None, without=frozenset({"model"})), problems


def _divide(values: Mapping[str, Any], section: KeyPath = ()) -> tuple[dict[str, Any], list[KeyPath]]:
    """Returns the settings that may replace those of a run, and the keys of those that may not."""
    free: dict[str, Any] = {}
    settled: list[KeyPath] = []
    for key, value in values.items():
        path = (*section, key)
        unsettled = path[0] not in _SETTLED or any(other[: len(path)] == path for other in _UNSETTLED)
        if unsettled and path[0] in _SETTLED and isinstance(value, dict):
            free[key], inner = _divide(value, path)
            settled += inner
        elif unsettled or annotation_at(FinetuneRecipe, path) is None:
            free[key] = value  # the schema refuses unknown keys, and values in place of sections
        else:
            settled.append(path)
    return free, settled


def _validated(ref: str, schema: type[Settings], layers: Sequence[Layer], problems: Sequence[Problem] = ()) -> Settings:
    recipe, found = _problems(schema, layers)
    _refuse(ref, [*problems, *found])
    assert recipe is not None
    return recipe


def _problems(schema: type[Settings], layers: Sequence[Layer]) -> tuple[Settings | None, list[Problem]]:
    values = merge(layers)
    values.setdefault("stage", "finetune")  # an overlay alone
    try:
        return schema.model_validate(values), []
    except ValidationError as error:
        return None, find_problems(error, schema, values, layers)


def _refuse(ref: str, problems: Sequence[Problem]) -> None:
    if not problems:
        return
    lines = [str(problem) for problem in problems]
    if len(lines) > 1:
        count = f"{len(lines)} or more" if len(lines) >= MAX_PROBLEMS else str(len(lines))
        lines.insert(0, f"{count} problems in recipe {ref}:")
    unknown = any(problem.message == "unknown key" for problem in problems)
    hint = (
        "`emrrg recipe show NAME --resolved` prints every key there is, with its value and meaning."
        if unknown
        else None
    )
    raise UsageError("\n  ".join(lines), hint=hint)
