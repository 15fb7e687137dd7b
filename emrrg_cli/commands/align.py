"""`emrrg align`: trains X-ray and report encoders against each other from a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from emrrg_cli.commands.options import NumProcesses, Output, Overrides, PrintRecipe, Resume, Verbose


def align(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Shipped recipe (`emrrg recipe ls align`) or a path to one.")],
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    num_processes: NumProcesses = None,
    print_recipe: PrintRecipe = False,
    verbose: Verbose = False,
) -> None:
    """Stage 2: train vision Mamba and a text tower to tell which report goes with which X-ray."""
    from emrrg_cli.commands.options import start_run
    from emrrg_cli.console import err
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.training.launch import processes_expected

    settings = load_recipe(recipe, overrides or [], stage="align")
    run_dir = start_run(
        context,
        recipe,
        settings,
        output=output,
        resume=resume,
        num_processes=num_processes,
        print_recipe=print_recipe,
    )
    if run_dir is None:
        return
    from emrrg_cli.training.align import run_align

    summary = run_align(
        settings, run_dir, resume=resume, expected_processes=processes_expected(num_processes), verbose=verbose
    )
    if summary.is_main_process:
        err.print(summary.table(run_dir))
        err.print(f"Next:  emrrg finetune RECIPE model.encoder.weights={run_dir}", markup=False, soft_wrap=True)
