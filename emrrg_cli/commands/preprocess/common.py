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
    from emrrg_cli.ingest.study import StudySource
    from emrrg_cli.recipe.preprocessing import PreprocessRecipe

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the raw data.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Dataset directory to write.", show_default=False)]
SourceName = Annotated[str | None, typer.Option("--source", metavar="NAME", help="Name of the data set.")]


# Headings of the help.
_CHOICE, _IMAGES, _RUN = "What is written", "Images", "The run"


@dataclass(frozen=True)
class Options:
    """Options that every source has; `with_options` gives them to a command."""

    overrides: Overrides = None
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME|PATH", help="Settings to start from.", show_default=False),
    ] = None
    section: Annotated[
        str | None,
        typer.Option(
            "--section",
            metavar="report|findings|impression|both",
            help="Text that becomes the report; report: by the rule of the data set. Studies without it are left out.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    views: Annotated[
        str | None,
        typer.Option(
            "--views",
            metavar="all|frontal|lateral",
            help="Views that are kept; one whose projection is not known is kept and counted.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    min_words: Annotated[
        int | None,
        typer.Option(
            "--min-words", min=0, help="Leave out reports of fewer words.", show_default=False, rich_help_panel=_CHOICE
        ),
    ] = None
    dedupe: Annotated[
        str | None,
        typer.Option(
            "--dedupe",
            metavar="off|report|drop",
            help="Duplicate images, exact or near: report them, or keep one copy of each.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Only the first studies of each split.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed for the split.", rich_help_panel=_CHOICE)] = 0
    allow_leakage: Annotated[
        bool,
        typer.Option("--allow-leakage", help="Accept patients in more than one split.", rich_help_panel=_CHOICE),
    ] = False
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="N|original",
            help="Shorter side in pixels; smaller images are kept.",
            show_default=False,
            rich_help_panel=_IMAGES,
        ),
    ] = None
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="jpeg|png", help="Format of the images.", show_default=False, rich_help_panel=_IMAGES
        ),
    ] = None
    quality: Annotated[
        int | None,
        typer.Option("--quality", help="JPEG quality, 1 to 100.", show_default=False, rich_help_panel=_IMAGES),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Report what would be done and the first problems; write nothing.", rich_help_panel=_RUN
        ),
    ] = False
    export_annotation: Annotated[
        Path | None,
        typer.Option(
            "--export-annotation",
            metavar="FILE",
            help="Also write R2Gen's annotation file, and the images beside it in images/.",
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
            help="joblib backend: loky (processes on this machine), threading, sequential or dask.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="ADDRESS",
            help="Address of a Dask scheduler.",
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
            "--summary/--no-summary", help="Write the page of `emrrg data show OUT` afterwards.", rich_help_panel=_RUN
        ),
    ] = True
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
    """Writes the dataset directory of a source and prints what came of it.

    Args:
        source: Studies to read.
        out: Dataset directory to make.
        options: Of the command line.
        settings: From `load_settings`.
        record: `layout` and options that only this source has, for the manifest.
        title: Of the printed table; None: the source's name and the number of studies.

    Raises:
        UsageError, RunError, Interrupted: As `emrrg_cli.ingest.preprocess.preprocess`.
    """
    # Here, not above: `emrrg --help` stays fast.
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
    """Makes sure that what is written beside OUT can be written, before the work begins.

    Raises:
        UsageError: It cannot.
    """
    from emrrg_cli.commands.data import summary_folder
    from emrrg_cli.errors import UsageError
    from emrrg_cli.ingest.annotation_file import check_annotation
    from emrrg_cli.ingest.dataset_writer import is_finishing
    from emrrg_cli.reporting.summary_page import check_summary

    if options.export_annotation is not None:
        replace = options.overwrite or is_finishing(out)  # an unfinished run's own
        check_annotation(options.export_annotation, out=out, raw=source.root, overwrite=replace)
    if options.summary and not options.as_json and not options.dry_run:
        try:
            check_summary(summary_folder(out))
        except UsageError as error:
            raise UsageError(error.message, hint="Move it away, or pass --no-summary.") from None
