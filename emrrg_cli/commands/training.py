"""`emrrg pretrain`, `emrrg align` and `emrrg finetune`: each trains one stage from a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from emrrg_cli.commands.options import (
    NumProcesses,
    Output,
    PrintRecipe,
    RecipeName,
    Resume,
    TrainingOverrides,
    Verbose,
    start_processes,
)
from emrrg_cli.stages import STAGES


def pretrain(
    context: typer.Context,
    recipe: RecipeName,
    overrides: TrainingOverrides = None,
    output: Output = None,
    resume: Resume = False,
    num_processes: NumProcesses = None,
    print_recipe: PrintRecipe = False,
) -> None:
    """Stage 1: pre-train the encoder on X-rays without reports.

    The vision Mamba encoder learns to predict the next cluster of image patches.

    Example: emrrg pretrain xray/pretrain-base data.root=data/all --output runs/pretrain
    """
    _train(context, recipe, overrides, output, resume, num_processes, print_recipe)


def align(
    context: typer.Context,
    recipe: RecipeName,
    overrides: TrainingOverrides = None,
    output: Output = None,
    resume: Resume = False,
    num_processes: NumProcesses = None,
    print_recipe: PrintRecipe = False,
    verbose: Verbose = False,
) -> None:
    """Stage 2: train the encoder to match X-rays and reports.

    The image encoder and the text encoder are trained with a contrastive loss.

    Example: emrrg align xray/align-base data.root=data/all model.encoder.weights=runs/pretrain --output runs/align
    """
    _train(context, recipe, overrides, output, resume, num_processes, print_recipe, verbose=verbose)


def finetune(
    context: typer.Context,
    recipe: RecipeName,
    overrides: TrainingOverrides = None,
    output: Output = None,
    resume: Resume = False,
    num_processes: NumProcesses = None,
    verbose: Verbose = False,
    print_recipe: PrintRecipe = False,
) -> None:
    """Stage 3: train the model to write reports.

    Examples:
      emrrg finetune iu_xray/finetune data.root=data/iu_xray model.encoder.weights=runs/align --output runs/iu
      emrrg finetune iu_xray/finetune data.root=data/iu_xray --output runs/iu --resume
    """
    _train(context, recipe, overrides, output, resume, num_processes, print_recipe, verbose=verbose)


def _train(
    context: typer.Context,
    recipe: str,
    overrides: list[str] | None,
    output: Path | None,
    resume: bool,
    num_processes: int | None,
    print_recipe: bool,
    *,
    verbose: bool = False,
) -> None:
    """Checks the recipe and the run directory, starts more processes if requested, and trains.

    Raises:
        UsageError: The directory is not empty, there is nothing to resume, the recipe has changed, or the number of
            processes does not divide the batch size.
    """
    from emrrg_cli.console import err, out
    from emrrg_cli.files.locks import locked
    from emrrg_cli.recipe.explain import explained
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.recipe.paths import check_data, check_roots_exist, check_trackers_installed, check_weights_exist
    from emrrg_cli.training.launch import inside_launcher, is_first_process, processes_expected
    from emrrg_cli.training.run_dir import check_run_dir, default_run_dir

    stage_name = str(context.command.name)
    stage = STAGES[stage_name]
    settings = load_recipe(recipe, overrides or [], stage=stage.load_recipe_class())
    if print_recipe:
        out.print(explained(settings.model_dump(), type(settings)), end="", markup=False, soft_wrap=True)
        return
    if not resume:  # a resumed run loads its own weights
        check_weights_exist(settings)
        check_data(settings.model_dump()["data"])
    check_roots_exist(settings, folders=stage_name == "pretrain")
    check_trackers_installed(settings.train.trackers)
    run_dir = output or (Path(settings.output) if settings.output else default_run_dir(recipe, resume=resume))
    if is_first_process():
        with locked(run_dir):  # released at once, because the training process locks it again
            check_run_dir(run_dir, settings, resume=resume)
    if not inside_launcher() and start_processes(context, num_processes, batch_size=settings.train.batch_size):
        return
    summary = stage.load_runner()(
        settings, run_dir, resume=resume, expected_processes=processes_expected(num_processes), verbose=verbose
    )
    if summary.is_main_process:
        err.print(summary.table(run_dir))
        err.print(stage.what_next(shlex.quote(str(run_dir))), markup=False, soft_wrap=True)
