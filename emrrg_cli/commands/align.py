"""`emrrg align`: trains X-ray and report encoders against each other from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.commands.options import NumProcesses, Overrides, Verbose


def align(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Shipped recipe (`emrrg recipe ls align`) or a path to one.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run directory; default runs/<recipe>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    num_processes: NumProcesses = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the resolved recipe and stop.")] = False,
    verbose: Verbose = False,
) -> None:
    """Stage 2: train vision Mamba and a text tower to tell which report goes with which X-ray."""
    from emrrg_cli.commands.options import start_processes
    from emrrg_cli.console import err, out
    from emrrg_cli.recipe.load import dump_recipe, load_recipe
    from emrrg_cli.training.launch import inside_launcher, is_first_process, processes_expected
    from emrrg_cli.training.run_dir import check_run_dir, default_run_dir

    settings = load_recipe(recipe, overrides or [], stage="align")
    if print_recipe:
        out.print(dump_recipe(settings), end="", markup=False, soft_wrap=True)
        return
    run_dir = output or (Path(settings.output) if settings.output else default_run_dir(recipe, resume=resume))
    if is_first_process():
        check_run_dir(run_dir, settings, resume=resume)
    if not inside_launcher() and start_processes(context, num_processes):
        return
    from emrrg_cli.training.align import run_align

    summary = run_align(
        settings, run_dir, resume=resume, expected_processes=processes_expected(num_processes), verbose=verbose
    )
    if summary.is_main_process:
        err.print(summary.table(run_dir))
        err.print(f"Next:  emrrg finetune RECIPE model.encoder.weights={run_dir}", markup=False)
