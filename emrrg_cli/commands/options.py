"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

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


@dataclass(frozen=True)
class Invocation:
    """How the program was called; `context.obj` of every command.

    Attributes:
        arguments: What follows `emrrg`.
        run: Runs another command of the program in this process and returns its exit code.
    """

    arguments: tuple[str, ...]
    run: Callable[[Sequence[str]], int]


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
        from emrrg_cli.datasets.epochs import check_batch

        check_batch(batch_size, processes)
    launch(context.obj.arguments, processes)
    return True
