"""`emrrg compare`: compares runs and prediction files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.commands.options import FILE_OPTIONS, HypothesisColumn, IdColumn, Json, ReferenceColumn, refuse_given
from emrrg_cli.errors import UsageError


def compare(
    context: typer.Context,
    reports: Annotated[
        list[Path],
        typer.Argument(metavar="A B ...", help="Run directories, evaluation directories or prediction files."),
    ],
    split: Annotated[str, typer.Option("--split", help="Split whose evaluation is compared.")] = "test",
    references: Annotated[
        Path | None, typer.Option("--references", help="File of references, for prediction files without references.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for compare.md, compare.csv and compare.json.")
    ] = None,
    id_column: IdColumn = None,
    hypothesis_column: HypothesisColumn = None,
    reference_column: ReferenceColumn = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison in --output.")] = False,
    meteor: Annotated[bool, typer.Option("--meteor", help="Compute METEOR too; needs Java.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the scores of runs, seeds and prediction files.

    Scores have 95 % intervals, and each entry is tested against the first.

    Runs that differ only in seeds, their own or those of earlier stages (align-1, align-2), are shown as mean and
    standard deviation, and tested over studies and seeds. Settings that differ between runs become columns,
    as in an ablation table.

    Example: emrrg compare runs/lora_x runs/lora_z theirs.jsonl
    """
    import json
    from contextlib import nullcontext

    from emrrg_cli.console import err, out
    from emrrg_cli.evaluation.compare import compare as run
    from emrrg_cli.evaluation.compare import find_contender
    from emrrg_cli.evaluation.predictions import PREDICTIONS, Columns
    from emrrg_cli.files.atomic import atomic_write_text
    from emrrg_cli.files.locks import locked
    from emrrg_cli.files.output_paths import check_writable, refuse_links
    from emrrg_cli.reporting.comparison_tables import comparison_csv, comparison_markdown, comparison_table
    from emrrg_cli.reporting.tables import DISCLAIMER

    if output is not None:
        check_writable(output)
        refuse_links(output, ("compare.*",))
    folders = [path.is_dir() for path in reports]
    if not any(folder and not (path / PREDICTIONS).is_file() for folder, path in zip(folders, reports, strict=True)):
        refuse_given(context, ("split",), "without a run directory")
    if all(folders):
        refuse_given(context, FILE_OPTIONS, "without a prediction file")
    columns = Columns(id_column, hypothesis_column, reference_column)
    with nullcontext() if output is None else locked(output):
        if output is not None and (output / "compare.json").exists() and not overwrite:
            raise UsageError(f"{output} already holds a comparison", hint="Give --overwrite, or another --output.")
        found = [find_contender(path, split, references, columns) for path in reports]
        result = {"note": DISCLAIMER, **run(found, meteor=meteor)}
        if output is not None:
            atomic_write_text(output / "compare.md", comparison_markdown(result))
            atomic_write_text(output / "compare.csv", comparison_csv(result))
            atomic_write_text(output / "compare.json", json.dumps(result, indent=2) + "\n")
    if as_json:
        out.print_json(data=result)
    else:
        out.print(comparison_table(result, out.width))
        for remark in result["remarks"]:
            err.print(remark, markup=False, soft_wrap=True)
        if output is not None:
            err.print(f"Tables: {output}", markup=False, soft_wrap=True)
    err.print(DISCLAIMER)
