"""Arguments that several commands share, and checks of what was given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError

FILES_PANEL = "Prediction files"
# Options that only prediction files have.
FILE_OPTIONS = ("references", "id_column", "hypothesis_column", "reference_column")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to settings: generation.num_beams=1.", show_default=False),
]
TrainingOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as train.lr=5e-5.", show_default=False),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe (`emrrg recipe ls`) or path of a .yaml file.")
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        "--num-processes",
        min=1,
        help="Number of processes; default: one per GPU, one without a GPU.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show how each tensor of the earlier stage is used.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run directory; default: runs/<recipe>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint of the run.")]
PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print the resolved recipe and stop.")]
IdColumn = Annotated[
    str | None,
    typer.Option("--id-column", help="Column or key with the study ids.", rich_help_panel=FILES_PANEL),
]
HypothesisColumn = Annotated[
    str | None,
    typer.Option("--hypothesis-column", help="Column or key with the generated reports.", rich_help_panel=FILES_PANEL),
]
ReferenceColumn = Annotated[
    str | None,
    typer.Option("--reference-column", help="Column or key with the references.", rich_help_panel=FILES_PANEL),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass(frozen=True)
class Invocation:
    """The command line of the program; it is `context.obj` in every command.

    Attributes:
        arguments: Arguments after `emrrg`.
        run: Runs another command of the program in this process and returns its exit code; errors are raised.
    """

    arguments: tuple[str, ...]
    run: Callable[[Sequence[str]], int]


def refuse_given(context: typer.Context, names: Collection[str], beside: str) -> None:
    """Refuses arguments and options that have no effect beside another option, or without it.

    Args:
        context: Context of the command.
        names: Names of the parameters.
        beside: `with` or `without` and the other option.

    Raises:
        UsageError: One of them is on the command line.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP"):
            name = parameter.opts[0]
            if not name.startswith("-"):  # an argument: what was typed
                given = context.params[name]
                name = printable(str(given[0] if isinstance(given, list) else given))
            raise UsageError(f"{name} has no effect {beside}", hint="Leave it out.")


def check_device(name: str) -> None:
    """Checks the name of a device, and on Linux whether a GPU driver exists, before torch is imported.

    Raises:
        UsageError: The name is unknown, or it is a GPU and no driver was found.
    """
    import re
    import sys

    if re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", name) is None:
        raise UsageError(f"unknown device {name!r}", hint="Use auto, cpu, cuda, cuda:1 or mps.")
    drivers = ("nvidia*", "kfd", "dxg", "nvhost*", "nvmap")  # NVIDIA, AMD, WSL, Jetson
    if name.startswith("cuda") and sys.platform == "linux" and not any(any(Path("/dev").glob(d)) for d in drivers):
        raise UsageError(f"there is no device {name!r} here")


def start_processes(context: typer.Context, requested: int | None, *, batch_size: int | None = None) -> bool:
    """Runs the command again in several processes if several are requested; returns False if one is enough.

    Args:
        context: Context of the command.
        requested: Number of processes; None uses one per GPU.
        batch_size: Number of examples per optimizer step over all processes; None for commands that do not train.

    Raises:
        UsageError: The number of processes does not divide the batch size. No process is started.
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
