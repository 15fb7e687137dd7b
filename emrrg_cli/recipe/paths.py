"""Paths inside recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import Settings

R = TypeVar("R", bound=Settings)


# Settings that are paths, wherever in a recipe they stand; a `name` is one where there is a directory of that name.
_PATHS = ("root", "weights", "held_out")


def check_roots_exist(recipe: Settings) -> None:
    """Finds a data set that is not there before torch is imported, which takes seconds.

    Raises:
        UsageError: It names the directory.
    """
    data = recipe.model_dump()["data"]
    for root in (data["root"], *(one["root"] for one in data.get("sets", []))):
        if root is not None and not Path(root).is_dir():
            raise UsageError(f"no such dataset directory: {root}", hint="Make one with `emrrg preprocess`.")


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
