"""Shared code of the preprocess commands: options, the run, and the printed result."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from emrrg_cli.commands.options import Json
from emrrg_cli.console import out as console

if TYPE_CHECKING:
    from emrrg_cli.ingest.study import StudySource
    from emrrg_cli.recipe.preprocessing import PreprocessRecipe

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the raw data.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Dataset directory to write.", show_default=False)]
SourceName = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="Name of the data set; default: folder.")
]


# Headings of the help.
_CHOICE, _IMAGES, _RUN = "Selection", "Images", "Run"


@dataclass(frozen=True)
class Options:
    """Options of every source; `with_options` adds them to a command."""

    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the recipe, such as max_pixels=400000000; "
            "`emrrg recipe show default/preprocess --resolved` lists them.",
            show_default=False,
        ),
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|PATH",
            help="Recipe with the settings to start from; default: default/preprocess, for phantom phantom/preprocess.",
            show_default=False,
        ),
    ] = None
    section: Annotated[
        str | None,
        typer.Option(
            "--section",
            metavar="report|findings|impression|both",
            help="Section used as the report; default: report, the rule of the data set. Studies without it are "
            "skipped.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    views: Annotated[
        str | None,
        typer.Option(
            "--views",
            metavar="all|frontal|lateral",
            help="Views to keep; default: all. Views with unknown projection are kept and counted.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    min_words: Annotated[
        int | None,
        typer.Option(
            "--min-words",
            min=0,
            help="Skip studies whose report has fewer words; default: 0.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    dedupe: Annotated[
        str | None,
        typer.Option(
            "--dedupe",
            metavar="off|report|drop",
            help="Exact and near duplicates of images: report them, or keep only one copy (drop); default: off.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Use only the first N studies of each split; default: all. Files may be sorted: the test split of "
            "R2Gen's IU X-Ray begins with 100 normal studies.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Random seed of a random split, or of the films of phantom.", rich_help_panel=_CHOICE
        ),
    ] = 0
    allow_leakage: Annotated[
        bool,
        typer.Option("--allow-leakage", help="Allow patients that occur in several splits.", rich_help_panel=_CHOICE),
    ] = False
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="N|original",
            help="Shorter side in pixels; default: 512, for phantom 256. Smaller images are not enlarged.",
            show_default=False,
            rich_help_panel=_IMAGES,
        ),
    ] = None
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="jpeg|png",
            help="Format of the images; default: jpeg.",
            show_default=False,
            rich_help_panel=_IMAGES,
        ),
    ] = None
    quality: Annotated[
        int | None,
        typer.Option(
            "--quality", help="JPEG quality, 1 to 100; default: 95.", show_default=False, rich_help_panel=_IMAGES
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be written and the first problems, without writing anything.",
            rich_help_panel=_RUN,
        ),
    ] = False
    export_annotation: Annotated[
        Path | None,
        typer.Option(
            "--export-annotation",
            metavar="FILE",
            help="Also write an annotation file in R2Gen's format, and the images to images/ next to it.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Number of decoding processes; default: one per core.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="loky|threading|dask|NAME",
            help="joblib backend: loky (processes on this machine; default), threading, sequential or dask.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="ADDRESS",
            help="Address of a Dask scheduler, for --backend dask; default: one on this machine.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the dataset directory at OUT.", rich_help_panel=_RUN)
    ] = False
    summary: Annotated[
        bool,
        typer.Option(
            "--summary/--no-summary",
            help="Write the summary page of `emrrg data show OUT` at the end.",
            rich_help_panel=_RUN,
        ),
    ] = True
    as_json: Json = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameter `options` of a command by the fields of `Options`, because Typer reads the signature."""
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
    """Loads the recipe and applies the options of the command line.

    Args:
        options: Options of the command line.
        default: Recipe to use if none is named.
        given: Settings from options that only this command has; None leaves a setting unchanged.

    Raises:
        UsageError: The same errors as `load_recipe`.
    """
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.recipe.preprocessing import PreprocessRecipe

    flags = ("section", "views", "min_words", "dedupe", "size", "quality", "workers")
    given = {name: getattr(options, name) for name in flags} | {"format": options.image_format} | given
    extra = [f"{key}={value}" for key, value in given.items() if value is not None]
    return load_recipe(options.recipe or default, [*(options.overrides or []), *extra], stage=PreprocessRecipe)


def run_source(
    source: StudySource,
    out: Path,
    options: Options,
    settings: PreprocessRecipe,
    record: dict[str, Any],
    *,
    title: str | None = None,
) -> None:
    """Writes the dataset directory of a source and prints the result.

    Args:
        source: Studies to read.
        out: Dataset directory to write.
        options: Options of the command line.
        settings: Result of `load_settings`.
        record: `layout` and options that only this source has, for the manifest.
        title: Title of the printed table; None uses the source's name and the number of studies.

    Raises:
        UsageError, RunError, Interrupted: The same errors as `emrrg_cli.ingest.preprocess.preprocess`.
    """
    # Imported here to keep `emrrg --help` fast.
    from emrrg_cli.commands.data import write_page
    from emrrg_cli.commands.preprocess.outcome import print_manifest, print_plan
    from emrrg_cli.ingest.preprocess import dry_run, preprocess

    record = record | {"recipe": options.recipe, "limit": options.limit, "seed": options.seed}
    _check_outputs(source, out, options)
    if options.dry_run:
        allow = options.allow_leakage
        plan = dry_run(source, out, settings, overwrite=options.overwrite, options=record, allow_leakage=allow)
        if options.as_json:
            console.print_json(data=plan)
        else:
            print_plan(plan, out, title)
        return
    manifest = preprocess(
        source,
        out,
        settings,
        overwrite=options.overwrite,
        options=record,
        backend=options.backend,
        scheduler=options.scheduler,
        allow_leakage=options.allow_leakage,
        annotation=options.export_annotation,
    )
    if options.as_json:
        console.print_json(data=manifest)
        return
    print_manifest(manifest, title)
    console.print(f"Written to {out} in {manifest['seconds']:.1f} s.", markup=False, soft_wrap=True)
    if options.export_annotation is not None:
        console.print(f"Exported to {options.export_annotation}.", markup=False, soft_wrap=True)
    if options.summary:
        write_page(out)


def _check_outputs(source: StudySource, out: Path, options: Options) -> None:
    """Checks before the work begins that the dataset directory, the annotation file and the page can be written.

    Raises:
        UsageError: Something else is in the place of one of them.
        RunError: The place of one of them is read-only.
    """
    from emrrg_cli.commands.data import summary_folder
    from emrrg_cli.errors import UsageError
    from emrrg_cli.files.output_paths import check_writable
    from emrrg_cli.ingest.annotation_file import check_annotation
    from emrrg_cli.ingest.dataset_writer import is_finishing
    from emrrg_cli.reporting.summary_page import check_summary

    check_writable(out.resolve().parent)  # OUT may be a link; the work directory is beside its target
    if options.export_annotation is not None:
        replace = options.overwrite or is_finishing(out)  # the file may come from an unfinished run
        check_annotation(options.export_annotation, out=out, raw=source.root, overwrite=replace)
    if options.summary and not options.as_json and not options.dry_run:
        try:
            check_summary(summary_folder(out))
        except UsageError as error:
            raise UsageError(error.message, hint="Move it, or use --no-summary.") from None
