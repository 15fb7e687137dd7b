"""`emrrg preprocess SOURCE ROOT OUT`: raw data, or synthetic studies, to a dataset directory."""

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
    _show(manifest, out, as_json)


Column = Annotated[str | None, typer.Option(metavar="NAME", show_default=False)]


@app.command("folder", no_args_is_help=True)
def folder(
    root: Root,
    out: Out,
    overrides: Overrides = None,
    recipe: RecipeOption = "default/preprocess",
    table: Annotated[
        Path | None,
        typer.Option("--table", metavar="FILE", help="CSV, TSV or JSON lines with paths, texts and more."),
    ] = None,
    image_column: Annotated[str, typer.Option(metavar="NAME", help="Paths below ROOT or ROOT/images.")] = "image",
    report_column: Column = None,
    findings_column: Column = None,
    impression_column: Column = None,
    split_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="train, validation or test.", show_default=False)
    ] = None,
    patient_column: Column = None,
    study_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rows of one study are its views.", show_default=False)
    ] = None,
    view_column: Column = None,
    labels_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="A JSON list, or names divided by | or ;.", show_default=False)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="PARTS", help="Parts drawn by patient; default 0.8,0.1,0.1.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the data set.")] = None,
    workers: Workers = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Any folder of images and DICOM files, with or without a table.

    Without a table, DICOM files are grouped into studies and every other image is one, without a report. With one, its
    rows name the images. Files that cannot be used are counted and explained; the rest goes on.

    Example: emrrg preprocess folder films/ data/mine --table films.csv --report-column text --patient-column patient
    """
    from emrrg_cli.data.preprocess import preprocess as run
    from emrrg_cli.data.sources.folder import Columns, FolderSource
    from emrrg_cli.data.sources.splits import DEFAULT, parse_fractions
    from emrrg_cli.errors import UsageError
    from emrrg_cli.recipe.load import load_recipe

    columns = Columns(
        image=image_column, report=report_column, findings=findings_column, impression=impression_column,
        split=split_column, patient=patient_column, study=study_column, view=view_column, labels=labels_column,
    )  # fmt: skip
    if table is None and columns != Columns():
        raise UsageError("columns are named but no table is given", hint="Name the file with --table.")
    if split is not None and split_column is not None:
        raise UsageError("--split and --split-column exclude each other")
    fractions = parse_fractions(split or DEFAULT)
    extra = [] if workers is None else [f"workers={workers}"]
    settings = load_recipe(recipe, [*(overrides or []), *extra], stage="preprocess")
    manifest = run(
        FolderSource(root, table=table, columns=columns, fractions=fractions, seed=seed, source=source, limit=limit),
        out,
        settings,
        overwrite=overwrite,
        options={
            "layout": "folder",
            "recipe": recipe,
            "source": source,
            "limit": limit,
            "table": None if table is None else str(table),
            "columns": columns.named() if table else {},
            "split": None if split_column else split or DEFAULT,
            "seed": seed,
        },
    )
    _show(manifest, out, as_json)


@app.command("phantom", no_args_is_help=True)
def phantom(
    out: Out,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Studies to make.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same studies.")] = 0,
    size: Annotated[
        int | None, typer.Option("--size", help="Side of the images; default: the recipe's.", show_default=False)
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="PARTS", help="Parts of train, validation, test, by the study's number.")
    ] = "0.8,0.1,0.1",
    recipe: RecipeOption = "phantom/preprocess",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; default one a core.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Synthetic chest radiographs with reports: no data, no licence, known labels.

    A program draws them from random parameters. They show no patient; results on them say nothing about clinical use.

    Example: emrrg preprocess phantom data/phantom --count 2000 --seed 1
    """
    from emrrg_cli.data.phantom.source import PhantomSource
    from emrrg_cli.data.preprocess import preprocess as run
    from emrrg_cli.data.sources.splits import parse_fractions
    from emrrg_cli.errors import UsageError
    from emrrg_cli.recipe.load import load_recipe

    given = {"size": size, "workers": workers}
    extra = [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = load_recipe(recipe, [*(overrides or []), *extra], stage="preprocess")
    if settings.size == "original":
        raise UsageError("a synthetic image has no original size", hint="Set size to a number of pixels.")
    manifest = run(
        PhantomSource(count, seed=seed, fractions=parse_fractions(split)),
        out,
        settings,
        overwrite=overwrite,
        options={"layout": "phantom", "recipe": recipe, "count": count, "seed": seed, "split": split},
    )
    _show(manifest, out, as_json, title=f"{count:,} synthetic studies, seed {seed}")


def _show(manifest: dict[str, Any], out: Path, as_json: bool, title: str | None = None) -> None:
    if as_json:
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
