"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from emrrg_cli.recipe.alignment import AlignRecipe
    from emrrg_cli.recipe.pretraining import PretrainRecipe
    from emrrg_cli.recipe.schema import FinetuneRecipe

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as train.lr=5e-5.", show_default=False),
]
NumProcesses = Annotated[
    int | None,
    typer.Option("--num-processes", help="Processes to start; default: one a GPU, one on a CPU.", show_default=False),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Name every tensor that is taken from another stage, dropped or made.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run directory; default runs/<recipe>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")]
PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print the resolved recipe and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def start_processes(context: typer.Context, requested: int | None, *, batch_size: int | None = None) -> bool:
    """Runs the same command in several processes where several are wanted; false when this one is enough.

    Args:
        batch_size: what the processes of a training share; None: nothing.

    Raises:
        UsageError: when a batch does not divide among the processes, of which none is started then.
    """
    from emrrg_cli.training.launch import launch, processes_wanted

    processes = processes_wanted(requested)
    if processes == 1:
        return False
    if batch_size is not None:
        from emrrg_cli.data.batches import check_batch

        check_batch(batch_size, processes)
    launch(context.obj, processes)  # what follows `emrrg`
    return True


def start_run(
    context: typer.Context,
    recipe: str,
    settings: AlignRecipe | FinetuneRecipe | PretrainRecipe,
    *,
    output: Path | None,
    resume: bool,
    num_processes: int | None,
    print_recipe: bool,
) -> Path | None:
    """What every training command does first: the directory to run in, or None where nothing is left to do here.

    That is so when the recipe was to be printed, and when other processes were started, which have done the work.

    Raises:
        UsageError: when the directory is taken, there is nothing to resume, the recipe has changed, or its batch does
            not divide among the processes.
    """
    from emrrg_cli.console import out
    from emrrg_cli.recipe.load import dump_recipe
    from emrrg_cli.training.launch import inside_launcher, is_first_process
    from emrrg_cli.training.run_dir import check_run_dir, default_run_dir

    if print_recipe:
        out.print(dump_recipe(settings), end="", markup=False, soft_wrap=True)
        return None
    run_dir = output or (Path(settings.output) if settings.output else default_run_dir(recipe, resume=resume))
    if is_first_process():
        check_run_dir(run_dir, settings, resume=resume)
    if not inside_launcher() and start_processes(context, num_processes, batch_size=settings.train.batch_size):
        return None
    return run_dir
