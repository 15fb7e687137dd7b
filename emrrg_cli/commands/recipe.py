"""`emrrg recipe ls|show|cp|validate`: lists, prints, copies and checks recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.commands.options import Json, TrainingOverrides
from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a shipped recipe or path of a .yaml file.", show_default=False)
]


@app.callback()
def recipe() -> None:
    """List, show, copy and check recipes."""


@app.command("ls")
def ls(
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="PATTERN", help="Part of a name, or wildcards: 'iu_xray/*'.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes and their purpose.

    Example: emrrg recipe ls finetune
    """
    from emrrg_cli.recipe.library import find_recipe, read_layers, recipe_names

    names = recipe_names(pattern)
    if not names:
        raise UsageError(f"no shipped recipe matches {pattern}", hint="`emrrg recipe ls` lists all recipes.")
    entries = []
    for name in names:
        path = find_recipe(name)
        stage = [layer.values["stage"] for layer in read_layers(path) if "stage" in layer.values][-1]
        command, purpose = _comments(path)
        entries.append({"name": name, "stage": stage, "purpose": purpose, "command": command, "path": str(path)})
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    width = max(map(len, names))
    for entry in entries:
        typer.echo(f"{entry['name']:<{width}}  {entry['purpose']}")
    typer.echo("`emrrg recipe show NAME` prints a recipe; its first line is the command that runs it.", err=True)


@app.command("show", no_args_is_help=True)
def show(
    name: Name,
    overrides: TrainingOverrides = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every setting with its value and meaning, as YAML.")
    ] = False,
) -> None:
    """Print a recipe, or all of its settings with --resolved.

    With key=value, all settings are printed with these changes.

    Example: emrrg recipe show iu_xray/finetune train.epochs=5
    """
    if resolved or overrides:
        from emrrg_cli.recipe.explain import explained
        from emrrg_cli.recipe.finetuning import FinetuneRecipe
        from emrrg_cli.recipe.load import RECIPES, resolve_recipe

        settings = resolve_recipe(name, overrides or [])
        typer.echo(explained(settings, RECIPES.get(settings["stage"], FinetuneRecipe)), nl=False)
        return
    from emrrg_cli.recipe.library import find_recipe, read_text

    typer.echo(read_text(find_recipe(name)), nl=False)


@app.command("cp", no_args_is_help=True)
def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.", show_default=False)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DEST", help="The .yaml file to write, or an existing directory.", show_default=False),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace the file.")] = False,
) -> None:
    """Copy a shipped recipe to a file that you can edit.

    Example: emrrg recipe cp iu_xray/finetune mine.yaml
    """
    from emrrg_cli.files.atomic import atomic_write_text
    from emrrg_cli.recipe.library import find_recipe, is_path, read_text

    if is_path(name):
        raise UsageError(f"{name} is a path; `cp` copies shipped recipes by name", hint="Copy the file itself.")
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if not is_path(target.name):
        raise UsageError(f"{target} must end in .yaml, or be an existing directory")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} already exists", hint="Choose another name, or replace it with --overwrite.")
    atomic_write_text(target, read_text(source))
    typer.echo(printable(f"{target}: a copy of {name}"))


@app.command("validate", no_args_is_help=True)
def validate(name: Name, overrides: TrainingOverrides = None) -> None:
    """Check a recipe and list all of its problems.

    The exit code is 2 if there are problems.

    Example: emrrg recipe validate mine.yaml train.lr=5e-5
    """
    from emrrg_cli.recipe.load import resolve_recipe
    from emrrg_cli.recipe.paths import check_data

    document = resolve_recipe(name, overrides or [])
    check_data(document.get("data", {}))
    protocol = f", protocol {document['protocol']}" if "protocol" in document else ""
    typer.echo(printable(f"{name}: ok (stage {document['stage']}{protocol})"))


def _comments(path: Path) -> tuple[str, str]:
    """Returns the command that runs a shipped recipe, and its purpose: the first and third line of the file."""
    from emrrg_cli.recipe.library import read_text

    lines = [line.lstrip("# ") for line in read_text(path).splitlines()[:3]]
    return lines[0], lines[2]
