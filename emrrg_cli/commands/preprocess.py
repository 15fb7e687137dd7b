"""`emrrg preprocess SOURCE ROOT OUT`: raw data to a dataset directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emrrg_cli.commands.options import Json, Overrides
from emrrg_cli.console import out as console

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="Turn raw data into a dataset directory that the other commands read.", no_args_is_help=True)

# Shared by every source.
Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the raw data.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Dataset directory to write.", show_default=False)]
RecipeOption = Annotated[str, typer.Option("--recipe", metavar="NAME|PATH", help="Image size, format and shards.")]
SourceOption = Annotated[
    str | None,
    typer.Option("--source", metavar="NAME", help="Name of the data set; iu_xray is recognised by its ids."),
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes that decode; default one a core.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first studies of each split.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the dataset directory at OUT.")]


@app.callback()
def preprocess() -> None:
    """Turn raw data into a dataset directory that the other commands read."""


@app.command("r2gen", no_args_is_help=True)
def r2gen(
    root: Root,
    out: Out,
    overrides: Overrides = None,
    recipe: RecipeOption = "default/preprocess",
    source: SourceOption = None,
    workers: Workers = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """R2Gen's layout: annotation.json (train, val, test), images beside it or in images/.

    ROOT is the folder or the JSON file itself. Studies that cannot be used are counted and explained; the rest goes on.

    Example: emrrg preprocess r2gen iu_xray/ data/iu_xray size=512
    """
    # Here, not above: `emrrg --help` stays fast.
    from emrrg_cli.data.preprocess import preprocess as run
    from emrrg_cli.data.sources.r2gen import R2GenSource
    from emrrg_cli.recipe.load import load_recipe

    extra = [] if workers is None else [f"workers={workers}"]
    settings = load_recipe(recipe, [*(overrides or []), *extra], stage="preprocess")
    manifest = run(
        R2GenSource(root, source=source, limit=limit),
        out,
        settings,
        overwrite=overwrite,
        options={"layout": "r2gen", "recipe": recipe, "source": source, "limit": limit},
    )
    if as_json:
        console.print_json(data=manifest)
        return
    console.print(_summary(manifest))
    if manifest["skipped"]:
        console.print(_skipped(manifest))
    console.print(f"Written to {out} in {manifest['seconds']:.1f} s.", markup=False, soft_wrap=True)


# Names go in as Text: they may hold what rich reads as markup.
def _summary(manifest: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{manifest['source']}: {manifest['studies_read']:,} studies read")
    table = Table(title=title, title_justify="left")
    for name in ("split", "studies", "images"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, count in manifest["splits"].items():
        table.add_row(split, f"{count['studies']:,}", f"{count['images']:,}")
    table.add_section()
    table.add_row("written", f"{manifest['studies_written']:,}", f"{manifest['images']:,}")
    return table


def _skipped(manifest: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{manifest['studies_skipped']:,} studies skipped", title_justify="left")
    table.add_column("reason")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for reason, entry in manifest["skipped"].items():
        first = Text(", ".join(entry["examples"][0].values()))
        table.add_row(reason, f"{entry['count']:,} {entry['unit']}", first)
    return table
