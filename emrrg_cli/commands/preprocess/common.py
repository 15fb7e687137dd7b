"""What the commands of all sources share: their options, the run, and what is printed after it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from emrrg_cli.commands.options import Json, Overrides
from emrrg_cli.console import out as console

if TYPE_CHECKING:
    from rich.table import Table

    from emrrg_cli.data.study import StudySource
    from emrrg_cli.recipe.schema import PreprocessRecipe

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the raw data.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Dataset directory to write.", show_default=False)]
SourceName = Annotated[str | None, typer.Option("--source", metavar="NAME", help="Name of the data set.")]


@dataclass(frozen=True)
class Options:
    """Options that every source has; `with_options` gives them to a command."""

    overrides: Overrides = None
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME|PATH", help="Image size, format and shards.", show_default=False),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Only the first studies of each split.", show_default=False),
    ] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of a split that is drawn.")] = 0
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; default one a core.", show_default=False)
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset directory at OUT.")] = False
    as_json: Json = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the parameters of `Options` in place of its parameter `options`: Typer reads the signature."""
    hints = get_type_hints(Options, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Options)
    ]
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + shared

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = Options(**{field.name: given.pop(field.name) for field in fields(Options)})
        command(**given, options=options)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def load_settings(options: Options, default: str = "default/preprocess", **given: Any) -> PreprocessRecipe:
    """The recipe with what the command line changes.

    Args:
        options: Of the command line.
        default: The recipe where none is named.
        given: Settings by options that only this command has; None: not given.

    Raises:
        UsageError: As `load_recipe`.
    """
    from emrrg_cli.recipe.load import load_recipe

    given |= {"workers": options.workers}
    extra = [f"{key}={value}" for key, value in given.items() if value is not None]
    return load_recipe(options.recipe or default, [*(options.overrides or []), *extra], stage="preprocess")


def run_source(
    source: StudySource,
    out: Path,
    options: Options,
    settings: PreprocessRecipe,
    record: dict[str, Any],
    *,
    title: str | None = None,
) -> None:
    """Writes the dataset directory of a source and prints what came of it.

    Args:
        source: Studies to read.
        out: Dataset directory to make.
        options: Of the command line.
        settings: From `load_settings`.
        record: `layout` and options that only this source has, for the manifest.
        title: Of the printed table; None: the source's name and the number of studies.

    Raises:
        UsageError, RunError, Interrupted: As `emrrg_cli.data.preprocess.preprocess`.
    """
    # Here, not above: `emrrg --help` stays fast.
    from emrrg_cli.data.preprocess import preprocess

    common = {"recipe": options.recipe, "limit": options.limit, "seed": options.seed}
    manifest = preprocess(source, out, settings, overwrite=options.overwrite, options=record | common)
    if options.as_json:
        console.print_json(data=manifest)
        return
    console.print(_summary(manifest, title or f"{manifest['source']}: {manifest['studies_read']:,} studies read"))
    if manifest["skipped"]:
        console.print(_reasons(manifest["skipped"], f"{manifest['studies_skipped']:,} studies skipped"))
    if manifest["notes"]:
        console.print(_reasons(manifest["notes"], "written, but look at"))
    for remark in manifest["remarks"]:
        console.print(remark, markup=False, soft_wrap=True)
    console.print(f"Written to {out} in {manifest['seconds']:.1f} s.", markup=False, soft_wrap=True)


# Names go in as Text: they may hold what rich reads as markup.
def _summary(manifest: dict[str, Any], title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for name in ("split", "studies", "images"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, count in manifest["splits"].items():
        table.add_row(split, f"{count['studies']:,}", f"{count['images']:,}")
    table.add_section()
    table.add_row("written", f"{manifest['studies_written']:,}", f"{manifest['images']:,}")
    return table


def _reasons(entries: dict[str, Any], title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    table.add_column("reason")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for reason, entry in entries.items():
        first = Text(", ".join(dict.fromkeys(entry["examples"][0].values())))  # an id is often the path
        table.add_row(reason, f"{entry['count']:,} {entry['unit']}", first)
    return table
