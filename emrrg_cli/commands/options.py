"""Arguments that several commands share."""

from __future__ import annotations

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
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def start_processes(context: typer.Context, requested: int | None) -> bool:
    """Runs the same command in several processes where several are wanted; false when this one is enough."""
    from emrrg_cli.training.launch import launch, processes_wanted

    processes = processes_wanted(requested)
    if processes == 1:
        return False
    launch(context.obj, processes)  # what follows `emrrg`
    return True
