"""Paths inside recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import Settings

R = TypeVar("R", bound=Settings)


# Settings that are paths, wherever in a recipe they stand; a `name` is one where there is a directory of that name.
_PATHS = ("root", "weights", "held_out")


def check_roots_exist(recipe: Settings, *, folders: bool = False) -> None:
    """Finds a data set that is not there before torch is imported, which takes seconds.

    Args:
        folders: folders of images will do as well.

    Raises:
        UsageError: It names the directory.
    """
    data = recipe.model_dump()["data"]
    for root in (data["root"], *(one["root"] for one in data.get("sets", []))):
        if root is not None and not Path(root).exists() and folders:
            raise UsageError(f"{root}: no such folder", hint="Name a dataset directory or a folder of images.")
        if root is not None and not Path(root).is_dir() and not folders:
            raise UsageError(f"no such dataset directory: {root}", hint="Make one with `emrrg preprocess`.")


def check_weights_exist(recipe: Settings) -> None:
    """Finds weights to start from that are not there before torch is imported.

    Raises:
        UsageError: It names the path.
    """
    encoder = recipe.model_dump().get("model", {}).get("encoder") or {}
    if (path := encoder.get("weights")) is not None and not Path(path).exists():
        raise UsageError(
            f"{path}: no such file or directory; an encoder is to be there",
            hint="model.encoder.weights names a run of `emrrg pretrain`, `align` or `finetune`, or a converted file.",
        )


def with_absolute_paths(recipe: R) -> R:
    """The recipe as it means the same from any working directory: paths in it that are relative made absolute."""
    return type(recipe).model_validate(_absolute(recipe.model_dump()))


def _absolute(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _absolute(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_absolute(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    # Transformers, too, takes a directory for a hub name if there is one.
    is_path = key in _PATHS or (key == "name" and value != "scratch" and Path(value).is_dir())
    if not is_path:
        return value
    path = Path(value)
    return str(path.resolve() if ".." in path.parts else path.absolute())  # links stay where they need not be followed
