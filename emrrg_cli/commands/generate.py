"""`emrrg generate`: writes reports for images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.commands.options import Json


def generate(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH|KEY=VALUE",
            help="Images and folders of images; changes such as generation.num_beams=1.",
        ),
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="Run directory of `emrrg finetune`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for reports.jsonl and reports.csv.")] = Path(
        "reports"
    ),
    recipe: Annotated[str | None, typer.Option("--recipe", help="Generation recipe laid over the run's own.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier reports in --output.")] = False,
    as_json: Json = False,
) -> None:
    """Write a report for every image in files and folders.

    The reports are research output and are not for diagnosis.

    Example: emrrg generate films/ study.png --model runs/iu --output reports/ generation.num_beams=1
    """
    from emrrg_cli.console import err, out
    from emrrg_cli.recipe.load import load_run_recipe

    images, overrides = split_arguments(paths)
    settings = load_run_recipe(model, recipe, overrides, "generate")

    from emrrg_cli.console import printable
    from emrrg_cli.decoding.generate_folder import run_generation
    from emrrg_cli.imaging.image_paths import find_images
    from emrrg_cli.reporting.tables import DISCLAIMER, reports_table

    files = find_images(images)
    result = run_generation(files, model, settings, output, device=device, overwrite=overwrite)
    if as_json:
        out.print_json(data=result.as_dict())
        err.print(DISCLAIMER)
    elif result.rows:
        out.print(reports_table(result.rows))
    for path, reason in result.skipped[:10]:
        err.print(f"skipped {printable(path)}: {printable(reason)}", markup=False, soft_wrap=True)
    if len(result.skipped) > 10:
        err.print(f"... and {len(result.skipped) - 10} more, listed in {result.skipped_file}", markup=False)
    noted = [(row["path"], "; ".join(row["notes"])) for row in result.rows if row["notes"]]
    for path, note in noted[:10]:
        err.print(f"note on {printable(path)}: {note}", markup=False, soft_wrap=True)
    if len(noted) > 10:
        err.print(f"... and notes on {len(noted) - 10} more, in {output / 'reports.jsonl'}", markup=False)
    rate = len(result.rows) / result.seconds if result.seconds else 0.0
    err.print(
        f"{len(result.rows)} reports, {len(result.skipped)} files skipped, {rate:.2f} reports a second, in {output}",
        markup=False,
        soft_wrap=True,
    )
    if not result.rows:
        raise typer.Exit(1)


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Paths and `key=value` changes apart; an argument that exists as a path is one, whatever its name."""
    import re

    paths: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_override = re.match(r"[a-z_]+(\.[a-zA-Z_]+)*=", argument) and not Path(argument).exists()
        (overrides if is_override else paths).append(argument)
    if not paths:
        from emrrg_cli.errors import UsageError

        raise UsageError("no images: name at least one image or folder")
    return paths, overrides
