"""`emrrg plan`: predicts memory, time and disk space of a training run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from emrrg_cli.commands.options import Json, RecipeName, TrainingOverrides

if TYPE_CHECKING:
    from rich.table import Table

    from emrrg_cli.planning import Plan


def plan(
    recipe: RecipeName,
    overrides: TrainingOverrides = None,
    studies: Annotated[
        int | None, typer.Option("--studies", min=1, help="Number of training studies; default: counted in data.root.")
    ] = None,
    views: Annotated[
        int | None, typer.Option("--views", min=1, help="Images per study; default: the mean in data.root, or 1.")
    ] = None,
    num_processes: Annotated[
        int, typer.Option("--num-processes", min=1, help="Number of processes that share a batch.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Predict memory, time and disk space of a training run.

    Runs a few training steps on this machine with random weights. No weights are downloaded or loaded.

    Example: emrrg plan iu_xray/finetune data.root=data/iu_xray train.micro_batch_size=2
    """
    from emrrg_cli.console import err, out
    from emrrg_cli.recipe.finetuning import FinetuneRecipe
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.recipe.paths import check_data, check_roots_exist, check_weights_exist

    settings = load_recipe(recipe, overrides or [], stage=FinetuneRecipe)
    check_roots_exist(settings, required=False)
    check_weights_exist(settings)
    check_data(settings.model_dump()["data"])

    from emrrg_cli.planning import plan as predict
    from emrrg_cli.silence_libraries import silence_libraries

    silence_libraries()
    with err.status("planning") as status:
        result = predict(
            settings,
            studies=studies,
            views=views,
            processes=num_processes,
            report=lambda text: status.update(f"planning: {text}"),
        )
    if as_json:
        out.print_json(data=result.as_dict())
        return
    out.print(_parameters(result), _memory(result))
    out.print(_time(result), markup=False, soft_wrap=True)
    for note in result.notes:
        out.print(f"        {note}", markup=False, soft_wrap=True)
    disk = sum(result.disk.values())
    out.print(f"disk    at most {_gib(disk)} for the run directory, {_gib(result.disk_free)} free", markup=False)
    if result.fits:
        out.print(f"fits    {_gib(result.peak)} of {_gib(result.available)}", markup=False)
        return
    out.print(f"does not fit: {_gib(result.peak)} needed, {_gib(result.available)} available. Try:", markup=False)
    for proposal in result.proposals:
        out.print(f"  {proposal}", markup=False, soft_wrap=True)


def _parameters(result: Plan) -> Table:
    from rich.table import Table

    table = Table("part", "parameters", "trained", title="parameters", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for part, count in result.parameters.items():
        if count:
            table.add_row(part, f"{count:,}", f"{result.trainable[part]:,}")
    table.add_section()
    table.add_row("total", f"{sum(result.parameters.values()):,}", f"{sum(result.trainable.values()):,}")
    return table


def _memory(result: Plan) -> Table:
    from rich.table import Table

    from emrrg_cli.console import counted

    title = f"memory: {result.device}, {result.precision}, {counted(result.micro_batch_size, 'study')} at a time"
    table = Table("part", "predicted", title=title, title_justify="left", min_width=len(title))
    table.columns[1].justify = "right"
    for part, size in result.memory.items():
        if size:
            table.add_row(part, _gib(size))
    table.add_section()
    table.add_row("peak", _gib(result.peak))
    return table


def _time(result: Plan) -> str:
    from emrrg_cli.console import counted

    text = f"time    {_seconds(result.seconds_per_step)} per step"
    if result.seconds_loading is not None:
        text += f" (computing {_seconds(result.seconds_computing)}, reading images {_seconds(result.seconds_loading)})"
    if result.steps_per_epoch is None or result.total_steps is None:
        return text + " (give --studies N or data.root=DIR to get the time per epoch)"
    epoch, whole = (result.seconds_per_step * steps for steps in (result.steps_per_epoch, result.total_steps))
    capped = result.total_steps < result.epochs * result.steps_per_epoch
    until = "train.max_steps" if capped else counted(result.epochs, "epoch")
    at_least, without = ("at least ", f", without {', '.join(result.not_in_time)}") if result.not_in_time else ("", "")
    return (
        f"{text}, {_hours(epoch)} per epoch of {counted(result.steps_per_epoch, 'step')}, "
        f"{at_least}{_hours(whole)} for all {counted(result.total_steps, 'step')} ({until}){without}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
