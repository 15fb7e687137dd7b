"""`emrrg pretrain`: trains the vision encoder on images alone, from a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from emrrg_cli.commands.options import NumProcesses, Output, Overrides, PrintRecipe, Resume


def pretrain(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Shipped recipe (`emrrg recipe ls pretrain`) or a path to one.")],
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    num_processes: NumProcesses = None,
    print_recipe: PrintRecipe = False,
) -> None:
    """Stage 1: train vision Mamba to continue X-rays, cluster by cluster; no reports needed."""
    from emrrg_cli.commands.options import start_run
    from emrrg_cli.console import err
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.training.launch import processes_expected

    settings = load_recipe(recipe, overrides or [], stage="pretrain")
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
    from emrrg_cli.training.pretrain import run_pretrain

    expected = processes_expected(num_processes)
    summary = run_pretrain(settings, run_dir, resume=resume, expected_processes=expected)
    if summary.is_main_process:
        err.print(summary.table(run_dir))
        err.print(
            f"Next:  emrrg align RECIPE model.encoder.weights={run_dir}\n"
            f"       emrrg finetune RECIPE model.encoder.weights={run_dir}",
            markup=False,
            soft_wrap=True,
        )
