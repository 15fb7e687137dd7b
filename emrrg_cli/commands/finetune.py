"""`emrrg finetune`: trains a report generator from a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from emrrg_cli.commands.options import NumProcesses, Output, Overrides, PrintRecipe, Resume, Verbose


def finetune(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Shipped recipe (`emrrg recipe ls`) or a path to one.")],
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    num_processes: NumProcesses = None,
    verbose: Verbose = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Stage 3: train vision Mamba, bridge and LLM to write reports."""
    from emrrg_cli.commands.options import start_run
    from emrrg_cli.console import err
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.training.launch import processes_expected

    settings = load_recipe(recipe, overrides or [], stage="finetune")
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
    from emrrg_cli.training.finetune import run_finetune

    expected = processes_expected(num_processes)
    summary = run_finetune(settings, run_dir, resume=resume, expected_processes=expected, verbose=verbose)
    if summary.is_main_process:
        err.print(summary.table(run_dir))
        err.print(
            f"Next:  emrrg evaluate --model {run_dir}\n       emrrg generate IMAGES --model {run_dir}", markup=False
        )
