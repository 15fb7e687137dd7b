"""`emrrg demo`: writes reports for synthetic films and scores them. A stopped demo can be continued."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from emrrg_cli.console import err, printable
from emrrg_cli.errors import EmrrgError, Interrupted, UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.output_paths import check_writable
from emrrg_cli.files.records import read_record

if TYPE_CHECKING:
    from rich.table import Table

    from emrrg_cli.demo import DemoResult

SEED = 2026  # seed of the films; the default model was trained on films of another seed
_CONTINUE = "The same command continues the demo."
_INTRO = (
    "emrrg drew these synthetic films with known findings. The model that comes with emrrg, which was not trained on "
    "them, wrote the reports. The page says nothing about real radiographs."
)
_INTRO_TRAINED = (
    "emrrg drew these synthetic films with known findings. A tiny model, trained on other synthetic films for a few "
    "minutes, wrote the reports. The page shows that all parts work together. It says nothing about real radiographs."
)


def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the films, reports and page.")] = Path(
        "emrrg-demo"
    ),
    train: Annotated[
        bool, typer.Option("--train", help="Train a tiny model first, which takes about six minutes.")
    ] = False,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            min=10,
            help="Number of synthetic films; default: 60, or 2400 with --train, of which a tenth is the test split.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Random seed for the films. The default model was trained on films of another seed."
        ),
    ] = SEED,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Number of training epochs, with --train.", show_default=False),
    ] = None,
) -> None:
    """Write reports for synthetic films, score them and make a page.

    The demo needs no data, GPU or network. The model that comes with emrrg writes the reports in less than a minute
    on two CPU cores. With --train, the demo trains a tiny model instead.

    After Ctrl-C, the same command continues the demo.

    Example: emrrg demo my-demo --count 200
    """
    if train and count is not None and count < 100:
        raise UsageError(f"--train needs at least 100 films, but --count is {count}")
    if epochs is not None and not train:
        raise UsageError("--epochs can only be used with --train")
    output = output.absolute() if str(output).startswith("-") else output  # not an option of the next commands
    count = count or (2400 if train else 60)
    start = None if train else _default_model()
    steps = Steps(output, {"count": count, "seed": seed, "epochs": epochs, "train": train}, context.obj.run)
    try:
        run_dir = (
            _train(steps, output, count, seed, epochs) if start is None else _draw(steps, output, count, seed, start)
        )
        _write_reports(steps, output, run_dir, trained=train)
    except KeyboardInterrupt:
        raise Interrupted("The demo was stopped.", hint=_CONTINUE) from None


def _default_model() -> Path:
    from emrrg_cli.default_model import find_default_model

    return find_default_model("`emrrg demo --train` trains a small model in about six minutes.")


def _draw(steps: Steps, output: Path, count: int, seed: int, run_dir: Path) -> Path:
    """Draws films in the image size of a run's model; returns the run directory."""
    from emrrg_cli.recipe.load import load_run_recipe

    size = load_run_recipe(run_dir, None, [], "generate").model.encoder.image_size
    films = ("--count", f"{count}", "--seed", f"{seed}", "--size", f"{size}", "--split", "0,0,1")
    steps.run("preprocess", "phantom", f"{output / 'data'}", *films)
    return run_dir


def _train(steps: Steps, output: Path, count: int, seed: int, epochs: int | None) -> Path:
    """Draws films, trains a tiny model on them and scores it; returns the run directory."""
    data, run_dir, scores = (output / name for name in ("data", "run", "scores"))
    # A second view per study would double the training time.
    films = ("--count", f"{count}", "--seed", f"{seed}", "--size", "160", "--plain")
    steps.run("preprocess", "phantom", f"{data}", *films)
    resume = (run_dir / "recipe.yaml").is_file()
    if not resume:  # the demo was stopped before training began
        shutil.rmtree(run_dir, ignore_errors=True)
    changes = [f"data.root={data}", *([] if epochs is None else [f"train.epochs={epochs}"])]
    train = ("finetune", "phantom/finetune", *changes, "--output", f"{run_dir}")
    steps.run(*train, again=["--resume"] if resume else [])
    evaluation = ("evaluate", "--model", f"{run_dir}", "--data", f"{data}", "--split", "test", "--output", f"{scores}")
    steps.run(*evaluation, again=["--overwrite"])
    return run_dir


def _write_reports(steps: Steps, output: Path, run_dir: Path, *, trained: bool) -> None:
    """Writes reports for the test split, scores them against the known findings, and makes the page."""
    data, reports = output / "data", output / "reports"
    model = ("--model", f"{run_dir}") if trained else ()
    steps.run("generate", f"{data}", *model, "--output", f"{reports}", again=["--overwrite"])

    from emrrg_cli import demo as work
    from emrrg_cli.console import out
    from emrrg_cli.evaluation.language import score
    from emrrg_cli.files.records import read_jsonl
    from emrrg_cli.reporting.tables import DISCLAIMER, score_table

    rows = read_jsonl(reports / "reports.jsonl")
    result = work.read_result(data, {row["study"]: row["report"] for row in rows})
    language = score(result.references, result.hypotheses, meteor=False)
    intro = _INTRO_TRAINED if trained else _INTRO
    page = work.write_demo_page(output, rows, result, language, intro, steps.commands, run_dir)
    films = f"{len(result.study_ids)} unseen synthetic films"
    out.print(score_table({name: value for name, value in language.items() if value is not None}, films))
    out.print(_findings(result, films))
    out.print("\nThe demo ran these commands:", *steps.commands, sep="\n  ", markup=False, soft_wrap=True)
    out.print(f"\nPage: {page}\nSynthetic films. {DISCLAIMER}", markup=False, soft_wrap=True)


class Steps:
    """Runs the commands of a demo, each one once; a demo that was stopped continues with the next command.

    The file `demo.json` in the folder records the options and the finished commands.

    Attributes:
        commands: The commands so far, as one would type them in a shell.

    Raises:
        UsageError: The folder contains other files, or a demo with other options.
    """

    def __init__(
        self, folder: Path, options: dict[str, int | None], run_command: Callable[[Sequence[str]], int]
    ) -> None:
        self.commands: list[str] = []
        self._record, self._options, self._run_command = folder / "demo.json", options, run_command
        self._done: list[str] = []
        check_writable(folder)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        another = "Choose another folder: emrrg demo FOLDER."
        if not self._record.is_file():
            raise UsageError(f"{folder} already exists and is not empty", hint=another)
        record = read_record(self._record, "the record of a demo", another) or {}
        if record.get("options") != options:
            raise UsageError(f"{folder} holds a demo with other options: {record.get('options')}", hint=another)
        self._done = list(record.get("done", ()))

    def run(self, *arguments: str, again: Sequence[str] = ()) -> None:
        """Prints one `emrrg` command and runs it in this process; skips a finished command.

        Args:
            arguments: Arguments after `emrrg`.
            again: Options to add if an earlier demo was stopped during this command.

        Raises:
            EmrrgError: The command failed and has printed the reason; the error has the same exit code.
            Interrupted: The demo was stopped and can continue.
        """
        command = shlex.join(["emrrg", *arguments])
        self.commands.append(command)
        if command in self._done:
            return
        err.print(f"\n[bold]$[/] {escape(printable(command))}", soft_wrap=True)
        self._save()
        try:
            code = self._run_command([*arguments, *again])
        except Interrupted as stop:
            raise Interrupted(stop.message, hint=_CONTINUE, exit_code=stop.exit_code) from None
        except KeyboardInterrupt:
            raise Interrupted("The demo was stopped.", hint=_CONTINUE) from None
        if code:
            failed = EmrrgError("the demo stopped because the command above failed")
            failed.exit_code = code
            raise failed
        self._done.append(command)
        self._save()

    def _save(self) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self._record, json.dumps({"options": self._options, "done": self._done}, indent=2) + "\n")


def _findings(result: DemoResult, films: str) -> Table:
    from rich.table import Table

    table = Table(title=f"F1 of findings, {films}", title_justify="left")
    for name in ("finding", "model", "shuffled films", "usual report"):
        table.add_column(name, justify="left" if name == "finding" else "right")
    for name, values in result.f1.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
        if name == "macro":
            table.add_section()
    return table
