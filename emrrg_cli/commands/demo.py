"""`emrrg demo`: everything in one command, with nothing but this program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from emrrg_cli.demo import DemoResult


def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(help="Folder for films, model, reports and page.")] = Path("emrrg-demo"),
    count: Annotated[
        int, typer.Option("--count", min=100, help="Synthetic films to draw; a tenth are for testing.")
    ] = 2400,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other films.")] = 0,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the films.", show_default=False)
    ] = None,
) -> None:
    """Draw synthetic films, train a tiny model for two minutes, write and score reports, and make a page of them."""
    import json

    from emrrg_cli import demo as work
    from emrrg_cli.console import out
    from emrrg_cli.datasets.directory import open_dataset
    from emrrg_cli.errors import UsageError
    from emrrg_cli.reporting.tables import DISCLAIMER, reports_table, score_table

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} already exists and is not empty", hint="Name another folder: emrrg demo FOLDER.")
    data, run_dir, scores = output / "data", output / "run", output / "scores"
    commands: list[str] = []

    def run(*arguments: str) -> None:
        work.run(context.obj.run, arguments, commands)

    run("preprocess", "phantom", f"{data}", "--count", f"{count}", "--seed", f"{seed}", "--size", "160")
    changes = [f"data.root={data}", *([] if epochs is None else [f"train.epochs={epochs}"])]
    run("finetune", "phantom/finetune", *changes, "--output", f"{run_dir}")
    run("evaluate", "--model", f"{run_dir}", "--data", f"{data}", "--split", "test", "--output", f"{scores}")
    work.write_films(open_dataset(data)["test"], output / "films", 12)
    run("generate", f"{output / 'films'}", "--model", f"{run_dir}", "--output", f"{output / 'reports'}")

    result = work.read_result(data, scores)
    language = json.loads((scores / "scores.json").read_text())["scores"]
    work.write_demo_page(output / "page.html", data, result, language, commands)
    rows = zip(result.study_ids, result.hypotheses, strict=True)
    out.print(reports_table([{"study_id": study, "report": report} for study, report in rows], limit=6))
    out.print(score_table(language, f"{len(result.study_ids)} unseen synthetic films"))
    out.print(_findings(result))
    out.print("\nThe commands that were run, to go on from:", *commands, sep="\n  ", markup=False, soft_wrap=True)
    out.print(f"\nPage: {output / 'page.html'}\nSynthetic films. {DISCLAIMER}", markup=False, soft_wrap=True)


def _findings(result: DemoResult) -> Table:
    from rich.table import Table

    table = Table(title="F1 of findings", title_justify="left")
    for name in ("finding", "model", "shuffled images", "usual report"):
        table.add_column(name, justify="left" if name == "finding" else "right")
    for name, values in result.f1.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
        if name == "macro":
            table.add_section()
    return table
