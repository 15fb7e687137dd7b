"""Finds recipes: shipped ones by name (`iu_xray/finetune`), others by path (`my/recipe.yaml`)."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.records import read_bounded
from emrrg_cli.recipe.layers import Layer
from emrrg_cli.recipe.limits import MAX_BYTES
from emrrg_cli.recipe.yaml12 import parse_layer

_SUFFIXES = (".yaml", ".yml")


def recipes_dir() -> Path:
    """Returns the directory of the shipped recipes: inside an installed package, beside an editable one.

    Raises:
        RunError: The installation has no recipes.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "recipes", package.parent / "recipes"):
        if candidate.is_dir():
            return candidate
    raise RunError(f"no recipes found with the package in {package}", hint="Install emrrg again.")


def recipe_names(pattern: str | None = None) -> list[str]:
    """Returns the sorted names of the shipped recipes, such as `iu_xray/finetune`.

    Args:
        pattern: Shell wildcards (`*/finetune`), or a text that the name contains; None: all.
    """
    root = recipes_dir()
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml"))
    if pattern is None:
        return names
    if not any(mark in pattern for mark in "*?["):
        pattern = f"*{pattern}*"
    return [name for name in names if fnmatchcase(name, pattern)]


def is_path(ref: str) -> bool:
    """Whether a recipe reference is a path (it ends in .yaml) and not a shipped name."""
    return ref.endswith(_SUFFIXES)


def find_recipe(ref: str, *, relative_to: Path | None = None) -> Path:
    """Returns the file of a recipe.

    Args:
        ref: A shipped name, or a path that ends in `.yaml`.
        relative_to: Directory to which relative paths refer; None: the working directory.

    Raises:
        UsageError: The recipe does not exist; the hint has similar names.
    """
    names = recipe_names()
    if is_path(ref):
        try:
            path = (relative_to or Path()) / Path(ref).expanduser()
            found = path.is_file()
        except (RuntimeError, OSError, ValueError) as error:  # ~nouser, a name that is too long or contains a null
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"not a valid path of a recipe: {printable(ref[:200])}: {printable(reason)}") from error
        if found:
            return path
        bare = str(Path(ref).with_suffix(""))
        hint = f"A shipped recipe is named without .yaml: {bare}" if bare in names else None
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"recipe file {path} {problem}", hint=hint)
    if ref in names:
        return recipes_dir() / f"{ref}.yaml"
    if "=" in ref:
        raise UsageError(
            f"the recipe is missing: {ref} is in its place", hint="Name a recipe first; `emrrg recipe ls` lists them."
        )
    same_part = [name for name in names if ref in name.split("/")]
    nearest = get_close_matches(ref, names, n=3, cutoff=0.5) or same_part[:3]
    hint = f"Did you mean {' or '.join(nearest)}?" if nearest else "`emrrg recipe ls` lists them all."
    raise UsageError(f"no shipped recipe is named {ref} (a path must end in .yaml)", hint=hint)


def read_layers(path: Path) -> list[Layer]:
    """Returns the layers of a recipe file, weakest first: the recipes it `extends`, then the file itself.

    Raises:
        UsageError: A file is missing, unreadable or not valid YAML, or recipes extend each other in a circle.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    while True:
        real = path.resolve()
        if len(seen) == 20:
            raise UsageError(f"{display_name(path)}: more than 20 recipes extend each other")
        if real in seen:
            circle = " -> ".join(display_name(step) for step in [*seen, real])
            raise UsageError(f"recipes extend each other in a circle: {circle}")
        seen.append(real)
        layer = read_layer(path)
        parent = layer.values.pop("extends", None)
        layers.insert(0, layer)
        if parent is None:
            return layers
        where = layer.where(("extends",))
        if not isinstance(parent, str):
            raise UsageError(f"{where}: extends: expected one recipe name or path, got {parent!r}")
        try:
            path = find_recipe(parent, relative_to=path.parent)
        except UsageError as error:
            raise UsageError(f"{where}: extends: {error.message}", hint=error.hint) from error


def read_layer(path: Path) -> Layer:
    """Reads one recipe file, without the recipe it extends.

    Raises:
        UsageError: The file cannot be read or is not valid YAML.
    """
    return parse_layer(read_text(path), display_name(path))


def read_text(path: Path) -> str:
    """Reads the text of a recipe file.

    Raises:
        UsageError: The file cannot be read or is not UTF-8.
    """
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UsageError(f"cannot read recipe {display_name(path)}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {display_name(path)} is not UTF-8 text") from error


def display_name(path: Path) -> str:
    """Returns a path for error messages: relative if it is below the working directory, else absolute."""
    resolved = path.resolve()
    here = Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(resolved)
