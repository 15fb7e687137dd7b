"""`emrrg evaluate`: writes reports for a split and scores them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.commands.options import Json, NumProcesses, Overrides


def evaluate(
    context: typer.Context,
    model: Annotated[Path, typer.Option("--model", "-m", help="Run directory of `emrrg finetune`.")],
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Dataset directory; default: the run's.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the dataset directory.")] = "test",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where scores and predictions go; default: in the run.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Evaluation recipe laid over the run's own.")] = None,
    num_processes: NumProcesses = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evaluation in --output.")] = False,
    as_json: Json = False,
) -> None:
    """Write reports for a split and score them.

    Scores are BLEU-1 to BLEU-4, ROUGE-L, METEOR (needs Java) and CIDEr.

    Example: emrrg evaluate --model runs/iu --data data/iu_xray generation.num_beams=1
    """
    from emrrg_cli.commands.options import start_processes
    from emrrg_cli.console import err, out
    from emrrg_cli.recipe.load import load_run_recipe
    from emrrg_cli.training.launch import inside_launcher, processes_expected

    settings = load_run_recipe(model, recipe, overrides or [], "evaluate")
    if data is not None:
        settings.data.root = str(data)
    if not inside_launcher() and start_processes(context, num_processes):
        return
    from emrrg_cli.evaluation.run import describe_protocol, run_evaluation
    from emrrg_cli.reporting.tables import DISCLAIMER, score_table

    result = run_evaluation(
        settings,
        model,
        split,
        output,
        overwrite=overwrite,
        expected_processes=processes_expected(num_processes),
    )
    if result is None:  # not the main process
        return
    if as_json:
        out.print_json(data=result)
        err.print(DISCLAIMER)
        return
    out.print(score_table(result["scores"], f"{split} split of {settings.data.root}, {result['studies']} studies"))
    out.print(describe_protocol(settings), markup=False, soft_wrap=True)
    if result["scores"]["METEOR"] is None:
        err.print("METEOR was left out: it needs Java (`emrrg doctor` says what was looked for).")
    err.print(
        f"{result['studies']} reports in {result['seconds']:.1f} s, {result['reports_per_second']:.2f} a second. "
        f"Scores and predictions: {result['output']}",
        markup=False,
        soft_wrap=True,
    )
    err.print(DISCLAIMER)
