"""`emrrg generate`: writes reports for images."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emrrg_cli.commands.options import Json, NumProcesses, check_device, refuse_given

if TYPE_CHECKING:
    from emrrg_cli.decoding.generate_folder import Machine, Written
    from emrrg_cli.decoding.studies import StudyFiles


def generate(
    invocation: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH|KEY=VALUE",
            help="Images, folders of images, glob patterns, dataset directories, and changes to settings, such as "
            "generation.num_beams=1.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="Run directory of `emrrg finetune`; default: the model that comes with emrrg.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for reports.jsonl and reports.csv.")] = Path(
        "reports"
    ),
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Generation recipe whose settings replace those of the run.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    study_by: Annotated[
        str,
        typer.Option(
            "--study-by",
            metavar="auto|folder|file",
            help="How images are grouped into studies: auto (by DICOM study, or by subfolder of at most 8 images), "
            "folder (by subfolder), or file (each image is a study).",
        ),
    ] = "auto",
    split: Annotated[
        str | None,
        typer.Option("--split", help="Split of a dataset directory; default: test.", show_default=False),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", metavar="FILE", help="CSV, TSV or JSON lines file that lists the images, instead of PATH."
        ),
    ] = None,
    image_column: Annotated[
        str, typer.Option("--image-column", help="Column of --table with the image paths.")
    ] = "image",
    study_column: Annotated[
        str | None,
        typer.Option("--study-column", help="Column of --table with the study id; default: each row is a study."),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            metavar="FIELD=TEXT",
            help="Clinical context, for a model trained with data.context, such as indication=cough; repeatable.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", metavar="I/N", help="Write only part I of N (I starts at 0); auto: set by Slurm or Kubernetes."
        ),
    ] = None,
    num_processes: NumProcesses = None,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="DIR", help="Only join the finished shards in this folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier reports in --output.")] = False,
    page: Annotated[
        int,
        typer.Option(
            "--page", metavar="N", min=0, help="Maximum number of studies on page.html, 500 per file; 0: no page."
        ),
    ] = 2000,
    grounding: Annotated[
        bool, typer.Option("--grounding/--no-grounding", help="Show on the page where in the image the model looked.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write a report for every study in files and folders.

    The reports are research output and are not for diagnosis. A stopped command continues when it is run again:
    studies that already have a report from the same model and options are skipped, unless their files have changed.

    Without --model, the small model that comes with emrrg writes the reports. It was trained only on synthetic films.

    A model that was trained with data.context uses --context, then the columns indication, comparison, technique, age
    and sex of --table, then the DICOM headers (age, sex, reason for the study).

    Each line of reports.jsonl is a study: its files, the report, findings (labels that rules read from the report),
    sentences and word_confidence (the model's probabilities, 0 to 1), film_distance (above 1: unlike the training
    films), notes and seconds. reports.csv has the most important columns, for spreadsheets: the file begins with a
    byte order mark, and an apostrophe precedes texts that would be formulas.

    Example: emrrg generate films/ study.png --model runs/iu --output reports/ generation.num_beams=1
    """
    from emrrg_cli.console import counted, err, printable

    for beside, names in _without_effect(merge, table, shard):
        refuse_given(invocation, names, beside)
    if merge is not None:
        from emrrg_cli.decoding.outputs import merge_shards

        err.print(
            f"{counted(merge_shards(merge, overwrite=overwrite), 'report')} in {merge / 'reports.jsonl'}",
            markup=False,
            soft_wrap=True,
        )
        return

    from emrrg_cli.default_model import find_default_model, read_limits
    from emrrg_cli.recipe.load import load_run_recipe
    from emrrg_cli.recipe.paths import require_trained

    check_device(device)
    images, overrides = split_arguments(paths or [], needed=table is None)
    unnamed = model is None
    hint = f"Name the run directory: `emrrg generate {shlex.join(images) or 'IMAGES'} --model RUN`."
    model = model or find_default_model(hint)
    settings = load_run_recipe(model, recipe, overrides, "generate")

    from emrrg_cli.decoding.shards import Shard
    from emrrg_cli.files.output_paths import check_writable

    part = None if shard is None else Shard.parse(shard)
    require_trained(model)
    check_writable(output)
    if table is not None:
        studies = _table_studies(table, images, image_column, study_column)
    else:
        studies = _find_studies(images, study_by, split, output)
    given = parse_context(context or [])

    from emrrg_cli.decoding.cards import PageOptions
    from emrrg_cli.decoding.contexts import with_contexts
    from emrrg_cli.decoding.generate_folder import run_generation

    studies = with_contexts(studies, given, settings.data)
    machine = _machine(device, num_processes)
    if unnamed:
        err.print("No --model is given: the model that comes with emrrg writes the reports.")
    if limits := read_limits(model):
        err.print(f"Note: {printable(limits)}.", markup=False, soft_wrap=True)
    shown = PageOptions(page, grounding, printable(shlex.join(["emrrg", *invocation.obj.arguments])))
    result = run_generation(
        studies, model, settings, output, machine=machine, overwrite=overwrite, shard=part, page=shown
    )
    _print(result, output, limits, as_json=as_json)
    nothing_to_do = part is not None and not part.part(studies)  # more shards than studies
    if not result.of_call and not nothing_to_do:
        raise typer.Exit(1)


def _without_effect(merge: Path | None, table: Path | None, shard: str | None) -> Iterator[tuple[str, set[str]]]:
    if merge is not None:
        yield "with --merge", set(signature(generate).parameters) - {"merge", "overwrite"}
    if table is None:
        yield "without --table", {"image_column", "study_column"}
    else:
        yield "with --table", {"study_by", "split"}
    if shard is not None:
        yield "with --shard, which makes no page", {"page", "grounding"}


def parse_context(options: list[str]) -> dict[str, str]:
    """Parses `FIELD=TEXT` options into a dictionary.

    Raises:
        UsageError: An option has no `=` or no text, or a field is given twice.
    """
    from emrrg_cli.errors import UsageError

    found: dict[str, str] = {}
    for option in options:
        name, sign, text = option.partition("=")
        if not sign or not name or not text.strip():
            raise UsageError(f"--context {option!r} is not FIELD=TEXT", hint='Example: --context indication="cough".')
        if name in found:
            raise UsageError(f"--context {name} is given twice")
        found[name] = text
    return found


def _machine(device: str, requested: int | None) -> Machine:
    from emrrg_cli.decoding.generate_folder import Machine
    from emrrg_cli.errors import UsageError
    from emrrg_cli.training.launch import processes_wanted

    if device in ("auto", "cuda"):
        return Machine(device, processes_wanted(requested))
    processes = 1 if requested is None else requested
    if processes < 1:
        raise UsageError(f"--num-processes must be 1 or more, got {processes}")
    if processes > 1 and device != "cpu":
        raise UsageError(f"--device {device} needs --num-processes 1", hint="Or use --device auto or cpu.")
    return Machine(device, processes)


def _find_studies(paths: list[str], study_by: str, split: str | None, output: Path) -> list[StudyFiles]:
    from emrrg_cli.datasets.manifest import is_dataset_dir
    from emrrg_cli.decoding.studies import find_studies
    from emrrg_cli.errors import UsageError

    if study_by not in ("auto", "folder", "file"):
        raise UsageError(f"unknown --study-by {study_by!r}", hint="Known: auto, folder, file.")
    stored: dict[str, str] = {}  # each once, in its first spelling
    for path in filter(is_dataset_dir, paths):
        stored.setdefault(os.path.realpath(path), path)
    others = [path for path in paths if os.path.realpath(path) not in stored]
    if split is not None and not stored:
        raise UsageError("--split needs a dataset directory, but none was given")
    if study_by != "auto" and not others:
        raise UsageError("--study-by has no effect on dataset directories, which define their studies")
    found = find_studies(others, study_by, output) if others else []  # type: ignore[arg-type]
    if stored:
        from emrrg_cli.decoding.stored_studies import stored_studies  # imports torch

        for root in stored.values():
            found += stored_studies(root, split)
    counts = Counter(study.name for study in found)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise UsageError(
            f"two studies are called {twice}", hint="Run them separately, with different folders (--output)."
        )
    return found


def _table_studies(table: Path, paths: list[str], image_column: str, study_column: str | None) -> list[StudyFiles]:
    from emrrg_cli.decoding.studies import table_studies
    from emrrg_cli.errors import UsageError

    if paths:
        raise UsageError(f"--table and {paths[0]} cannot be used together", hint="Use only one of them.")
    return table_studies(table, image_column, study_column)


def _print(result: Written, output: Path, limits: str, *, as_json: bool) -> None:
    from emrrg_cli.console import counted, err, out, printable
    from emrrg_cli.reporting.tables import DISCLAIMER, reports_table

    if as_json:
        _print_json(result)
        err.print(DISCLAIMER)
    elif result.reports:
        out.print(reports_table(result.rows()))
    for path, reason in result.first_skipped:
        err.print(f"skipped {printable(path)}: {printable(reason)}", markup=False, soft_wrap=True)
    if more := result.skipped - len(result.first_skipped):
        err.print(f"... and {more} more; all are listed in {result.skipped_file}", markup=False)
    for path, notes in result.first_noted:
        err.print(f"note on {printable(path)}: {notes}", markup=False, soft_wrap=True)
    if more := result.noted - len(result.first_noted):
        err.print(f"... and notes on {more} more; all are in {output / 'reports.jsonl'}", markup=False)
    if result.unlike:
        kind = "is for a film" if result.unlike == 1 else "are for films"
        unlike = f"{counted(result.unlike, 'new report')} {kind} unlike the training films"
        advice = f": {printable(limits)}, so do not read them as findings" if limits else ""
        err.print(unlike + advice, markup=False, soft_wrap=True)
    if result.earlier:
        err.print(f"{counted(result.earlier, 'report')} from an earlier run kept", markup=False)
    if result.changed:
        again = f"{counted(result.changed, 'report')} of an earlier run left out: the files of the studies have changed"
        err.print(again, markup=False, soft_wrap=True)
    rate = result.written / result.seconds if result.seconds else 0.0
    written, skipped = counted(result.written, "report"), counted(result.skipped, "file")
    err.print(f"{written}, {skipped} skipped, {rate:.2f} reports per second, in {output}", markup=False, soft_wrap=True)


def _print_json(result: Written) -> None:
    """Prints one JSON object row by row, because the records may not fit into memory."""
    import json
    import sys

    from emrrg_cli.reporting.tables import DISCLAIMER

    def text(value: object) -> str:
        return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n    ")

    write = sys.stdout.write
    write(f'{{\n  "note": {text(DISCLAIMER)}')
    for name, rows in (("reports", result.rows()), ("skipped", result.skipped_rows())):
        write(f',\n  "{name}": [')
        separator = "\n    "
        for row in rows:
            write(separator + text(row))
            separator = ",\n    "
        write("]" if separator == "\n    " else "\n  ]")
    write(f',\n  "seconds": {round(result.seconds, 3)}\n}}\n')


def split_arguments(arguments: list[str], *, needed: bool = True) -> tuple[list[str], list[str]]:
    """Separates paths from `key=value` changes; an argument that exists as a path is always a path.

    Args:
        arguments: Arguments of the command.
        needed: Whether at least one path is required.

    Raises:
        UsageError: A path is required, but there is none.
    """
    import re

    paths: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_override = re.match(r"[a-z_]+(\.[a-zA-Z_]+)*=", argument) and not Path(argument).exists()
        (overrides if is_override else paths).append(argument)
    if "" in arguments:
        from emrrg_cli.errors import UsageError

        raise UsageError("one of the arguments is empty", hint="A shell variable in the command may not be set.")
    if needed and not paths:
        from emrrg_cli.errors import UsageError

        raise UsageError("no images: give at least one image or folder")
    return paths, overrides
