"""`emrrg data show DIR`: summarises a dataset directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emrrg_cli.commands.options import Json

if TYPE_CHECKING:
    from emrrg_cli.datasets.summary_types import Summary

app = typer.Typer(help="Summarise dataset directories.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Summarise dataset directories."""


@app.command("show", no_args_is_help=True)
def show(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Dataset directory of `emrrg preprocess`.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            "--out",
            help="Folder for the page and the contact sheet; default: DIR-summary.",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, max=200, help="Number of studies on the page and the sheet.")
    ] = 12,
    as_json: Json = False,
) -> None:
    """Summarise a dataset directory and write a page with examples.

    Counts splits, views, labels, report lengths and sentences, and shows some studies on a page and a contact sheet.

    Example: emrrg data show data/iu_xray
    """
    from emrrg_cli.console import out
    from emrrg_cli.reporting.summary_sections import terminal

    def show_summary(summary: Summary) -> None:
        if as_json:
            out.print_json(data=summary.as_dict())
        else:
            out.print(terminal(summary))

    write_page(directory, output, examples, show_summary)


def write_page(
    directory: Path,
    output: Path | None = None,
    examples: int = 12,
    show_summary: Callable[[Summary], None] = lambda summary: None,
) -> None:
    """Writes the page and the contact sheet of a dataset directory, and prints where they are.

    Args:
        directory: The dataset directory.
        output: Folder to write to; None uses `summary_folder(directory)`.
        examples: Number of studies to show.
        show_summary: Called with the summary before the paths are printed.
    """
    from emrrg_cli.console import err
    from emrrg_cli.datasets.summary import summarise
    from emrrg_cli.reporting.summary_page import PAGE, SHEET, write_summary

    target = output or summary_folder(directory)
    summary = summarise(directory, examples=examples)
    write_summary(summary, target)
    show_summary(summary)
    err.print(f"Page: {target / PAGE}", markup=False, soft_wrap=True)
    if summary.examples:
        err.print(f"Contact sheet: {target / SHEET}", markup=False, soft_wrap=True)


def summary_folder(directory: Path) -> Path:
    """Returns the default folder for the summary of a dataset directory."""
    named = directory if directory.name not in ("", "..") else directory.resolve()
    return named.with_name(f"{named.name}-summary")
