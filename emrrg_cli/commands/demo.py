"""`emrrg demo`: all steps in one command, on synthetic films. A demo that was stopped continues."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emrrg_cli.console import err
from emrrg_cli.errors import EmrrgError, Interrupted, UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.records import read_record

if TYPE_CHECKING:
    from rich.table import Table

    from emrrg_cli.demo import DemoResult

_CONTINUE = "The same command continues the demo."


def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for films, model, reports and page.")] = Path(
        "emrrg-demo"
    ),
    count: Annotated[
        int, typer.Option("--count", min=100, help="Number of synthetic films; a tenth of them is for testing.")
    ] = 2400,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed for the films.")] = 0,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the films.", show_default=False)
    ] = None,
) -> None:
    """Draw films, train a tiny model, score it and make a page.

    Needs no data, no GPU and no network. It takes about five minutes on two CPU cores.
    After Ctrl-C, the same command continues the demo.

    Example: emrrg demo my-demo --count 1000
    """
    steps = Steps(output, {"count": count, "seed": seed, "epochs": epochs}, context.obj.run)
    try:
        _run_steps(steps, output, count, seed, epochs)
    except KeyboardInterrupt:
        raise Interrupted("The demo was stopped.", hint=_CONTINUE) from None


def _run_steps(steps: Steps, output: Path, count: int, seed: int, epochs: int | None) -> None:
    data, run_dir, scores, reports = (output / name for name in ("data", "run", "scores", "reports"))
    # A second view would double the time of training.
    films = ("--count", f"{count}", "--seed", f"{seed}", "--size", "160", "--plain")
    steps.run("preprocess", "phantom", f"{data}", *films)

    from emrrg_cli import demo as work
    from emrrg_cli.console import out
    from emrrg_cli.datasets.directory import open_dataset
    from emrrg_cli.reporting.tables import DISCLAIMER, reports_table, score_table

    resume = (run_dir / "recipe.yaml").is_file()
    if not resume:  # stopped before the run was recorded
        shutil.rmtree(run_dir, ignore_errors=True)
    changes = [f"data.root={data}", *([] if epochs is None else [f"train.epochs={epochs}"])]
    train = ("finetune", "phantom/finetune", *changes, "--output", f"{run_dir}")
    steps.run(*train, again=["--resume"] if resume else [])
    evaluation = ("evaluate", "--model", f"{run_dir}", "--data", f"{data}", "--split", "test", "--output", f"{scores}")
    steps.run(*evaluation, again=["--overwrite"])
    if not (output / "films").is_dir():
        work.write_films(open_dataset(data)["test"], output / "films", 12)
    generation = ("generate", f"{output / 'films'}", "--model", f"{run_dir}", "--output", f"{reports}")
    steps.run(*generation, again=["--overwrite"])

    result = work.read_result(data, scores)
    language = json.loads((scores / "scores.json").read_text())["scores"]
    work.write_demo_page(output / "page.html", data, result, language, steps.commands)
    rows = zip(result.study_ids, result.hypotheses, strict=True)
    out.print(reports_table([{"study_id": study, "report": report} for study, report in rows], limit=6))
    out.print(score_table(language, f"{len(result.study_ids)} unseen synthetic films"))
    out.print(_findings(result))
    out.print("\nThe demo ran these commands:", *steps.commands, sep="\n  ", markup=False, soft_wrap=True)
    out.print(f"\nPage: {output / 'page.html'}\nSynthetic films. {DISCLAIMER}", markup=False, soft_wrap=True)


class Steps:
    """The commands of a demo, each run once: a demo that was stopped continues with the next one.

    The file `demo.json` in the folder records the options and the finished commands.

    Attributes:
        commands: The commands so far, as they are typed in a shell.

    Raises:
        UsageError: The folder holds something else, or a demo with other options.
    """

    def __init__(
        self, folder: Path, options: dict[str, int | None], run_command: Callable[[Sequence[str]], int]
    ) -> None:
        self.commands: list[str] = []
        self._record, self._options, self._run_command = folder / "demo.json", options, run_command
        self._done: list[str] = []
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        another = "Name another folder: emrrg demo FOLDER."
        if not self._record.is_file():
            raise UsageError(f"{folder} already exists and is not empty", hint=another)
        record = read_record(self._record, "the record of a demo", another) or {}
        if record.get("options") != options:
            raise UsageError(f"{folder} holds a demo with other options: {record.get('options')}", hint=another)
        self._done = list(record.get("done", ()))

    def run(self, *arguments: str, again: Sequence[str] = ()) -> None:
        """Runs one command of the toolkit in this process, after showing it; a finished command is skipped.

        Args:
            arguments: What follows `emrrg`.
            again: Options to add if an earlier demo was stopped during this command.

        Raises:
            EmrrgError: The command failed. It has printed the reason; the error has its exit code.
            Interrupted: The demo was stopped and can continue.
        """
        command = shlex.join(["emrrg", *arguments])
        self.commands.append(command)
        if command in self._done:
            return
        err.print(f"\n[bold]$[/] {command}", soft_wrap=True)
        self._save()
        try:
            code = self._run_command([*arguments, *again])
        except Interrupted as stop:
            raise Interrupted(stop.message, hint=_CONTINUE, exit_code=stop.exit_code) from None
        except KeyboardInterrupt:
            raise Interrupted("The demo was stopped.", hint=_CONTINUE) from None
        if code:
            failed = EmrrgError("the demo ended with the command above")
            failed.exit_code = code
            raise failed
        self._done.append(command)
        self._save()

    def _save(self) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self._record, json.dumps({"options": self._options, "done": self._done}, indent=2) + "\n")


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
