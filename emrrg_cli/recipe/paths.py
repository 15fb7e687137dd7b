"""Checks that the paths and packages that a recipe names exist."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.recipe.common import DataSettings, Settings
from emrrg_cli.versions import installed_versions

R = TypeVar("R", bound=Settings)


# Settings that are paths, in any section of a recipe; a `name` is a path if a directory of that name exists.
_PATHS = ("root", "weights", "held_out")
_DATASET_FILES = ("manifest.json", "data/*.parquet")


def check_roots_exist(recipe: Settings, *, folders: bool = False, required: bool = True) -> None:
    """Checks that data sets exist, before torch is imported, which takes seconds.

    Args:
        folders: Whether folders of images are accepted too.
        required: Whether a recipe without a data set is refused.

    Raises:
        UsageError: A data set does not exist; the message names the directory.
    """
    data = recipe.model_dump()["data"]
    if data["root"] is None and not data.get("sets") and required:
        raise UsageError(
            "data.root is not set", hint="Name a dataset directory that `emrrg preprocess` wrote: data.root=DIR."
        )
    for root in (data["root"], *(one["root"] for one in data.get("sets", []))):
        if root is not None and not Path(root).exists() and folders:
            raise UsageError(f"{root}: no such folder", hint="Name a dataset directory or a folder of images.")
        if root is not None and not Path(root).is_dir() and not folders:
            raise UsageError(f"no such dataset directory: {root}", hint="Make one with `emrrg preprocess`.")
        if root is not None and not folders and not _has_dataset(root):
            raise UsageError(
                f"{root} is not a dataset directory: it has no data/*.parquet", hint="Make one with `emrrg preprocess`."
            )


def _has_dataset(root: str) -> bool:
    return any(any(Path(root).glob(pattern)) for pattern in _DATASET_FILES)


def check_data(data: Mapping[str, Any]) -> None:
    """Checks what the schema does not, so that runs of earlier versions can still be read.

    Args:
        data: The section `data` of a recipe.

    Raises:
        UsageError: `data.sets` names a directory twice, or one inside another, or a setting of the context has no
            effect.
    """
    names: dict[str, str] = {}
    for root in (one["root"] for one in data.get("sets") or []):
        real = os.path.realpath(root)
        if (first := names.get(real)) is not None:
            both = f"{root} twice" if first == root else f"one directory twice, as {first} and {root}"
            raise UsageError(f"data.sets names {both}", hint="Name each directory once.")
        names[real] = root
    films = {real: root for real, root in names.items() if not _has_dataset(root)}  # read with their subfolders
    for inner, root in films.items():
        if (outer := next((films[str(one)] for one in Path(inner).parents if str(one) in films), None)) is not None:
            raise UsageError(
                f"data.sets names {outer} and {root}, which is inside it",
                hint=f"{outer} has the films of both: name only one of them.",
            )
    for name in ("context_dropout", "context_words"):
        value = data.get(name)
        # A dropout of 0 changes nothing, so it is accepted.
        if value and not data.get("context") and value != DataSettings.model_fields[name].default:
            raise UsageError(f"data.{name}={value} has no effect without data.context", hint="Leave it out.")


def check_weights_exist(recipe: Settings) -> None:
    """Checks that weights to start from exist, before torch is imported.

    Raises:
        UsageError: A path does not exist; the message names it.
    """
    encoder = recipe.model_dump().get("model", {}).get("encoder") or {}
    if (path := encoder.get("weights")) is not None and not Path(path).exists():
        raise UsageError(
            f"{path}: no such file or directory; it must be an encoder",
            hint="model.encoder.weights names a run of `emrrg pretrain`, `align` or `finetune`, or a converted file.",
        )
    for part in ("llm", "text"):
        name = (recipe.model_dump().get("model", {}).get(part) or {}).get("name") or ""
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():  # not a hub name
            raise UsageError(f"{name}: no such directory", hint=f"model.{part}.name is a directory or a hub name.")


def check_trackers_installed(names: Sequence[str]) -> None:
    """Checks that trackers (`train.trackers`) are installed, before torch is imported.

    Raises:
        UsageError: A tracker is not installed; the message names the package.
    """
    for name, version in installed_versions(names).items():
        if version is None:
            raise UsageError(
                f"train.trackers names {name}, which is not installed",
                hint=f"pip install {name}, or remove it from train.trackers.",
            )


def require_trained(run_dir: Path) -> None:
    """Checks that a run has a trained model, before torch is imported.

    Raises:
        RunError: It has none; the message names the directory.
    """
    if not any((run_dir / name).is_dir() for name in ("model", "model.previous-emrrg")):
        raise RunError(f"{run_dir}: this run has no trained model yet", hint="It is written at the first validation.")


def with_absolute_paths(recipe: R) -> R:
    """Makes relative paths of a recipe absolute, so that it is valid in any working directory."""
    return type(recipe).model_validate(_absolute(recipe.model_dump()))


def _absolute(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _absolute(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_absolute(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    # Like transformers, a directory takes precedence over a hub name.
    is_path = key in _PATHS or (key == "name" and value != "scratch" and Path(value).is_dir())
    if not is_path:
        return value
    path = Path(value)
    return str(path.resolve() if ".." in path.parts else path.absolute())  # links are resolved only if necessary
