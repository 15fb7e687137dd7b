"""`emrrg preprocess folder ROOT OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from emrrg_cli.commands.preprocess.common import Options, Out, Root, SourceName, load_settings, run_source


def _column(content: str) -> Any:
    return typer.Option(metavar="NAME", help=f"Column with {content}.", show_default=False)


def folder(
    root: Root,
    out: Out,
    options: Options,
    table: Annotated[
        Path | None,
        typer.Option("--table", metavar="FILE", help="CSV, TSV or JSON lines file with image paths, texts and more."),
    ] = None,
    image_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column with image paths below ROOT or ROOT/images.")
    ] = "image",
    report_column: Annotated[str | None, _column("the report")] = None,
    findings_column: Annotated[str | None, _column("the findings section")] = None,
    impression_column: Annotated[str | None, _column("the impression section")] = None,
    split_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column with train, validation or test.", show_default=False)
    ] = None,
    patient_column: Annotated[str | None, _column("the patient id")] = None,
    study_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Column with the study id; rows of one study are its views.", show_default=False
        ),
    ] = None,
    view_column: Annotated[str | None, _column("the view: PA, AP, lateral")] = None,
    labels_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Column with labels: a JSON list, or names separated by | or ;.", show_default=False
        ),
    ] = None,
    indication_column: Annotated[str | None, _column("the indication, for data.context")] = None,
    comparison_column: Annotated[str | None, _column("the comparison studies")] = None,
    technique_column: Annotated[str | None, _column("the technique")] = None,
    age_column: Annotated[str | None, _column("the age of the patient: 45, 045Y")] = None,
    sex_column: Annotated[str | None, _column("the sex of the patient: F, M")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="Fractions of train, validation and test, by patient; default 0.8,0.1,0.1.",
            show_default=False,
        ),
    ] = None,
    source: SourceName = None,
) -> None:
    """A folder of images and DICOM files; a table is optional.

    Without a table, DICOM files are grouped into studies, and every other image becomes a study without a report. With
    a table, its rows name the images. Unusable files are skipped and listed with reasons.

    Example: emrrg preprocess folder films/ data/mine --table films.csv --report-column text --patient-column patient
    """
    from emrrg_cli.datasets.splits import DEFAULT, parse_fractions
    from emrrg_cli.errors import UsageError
    from emrrg_cli.ingest.sources.folder import Columns, FolderSource

    columns = Columns(
        image=image_column, report=report_column, findings=findings_column, impression=impression_column,
        split=split_column, patient=patient_column, study=study_column, view=view_column, labels=labels_column,
        indication=indication_column, comparison=comparison_column, technique=technique_column, age=age_column,
        sex=sex_column,
    )  # fmt: skip
    if table is None and columns != Columns():
        raise UsageError("column options need a table, but no table is given", hint="Give the table with --table FILE.")
    if split is not None and split_column is not None:
        raise UsageError("--split and --split-column cannot be used together")
    fractions = parse_fractions(split or DEFAULT)
    settings = load_settings(options)
    studies = FolderSource(
        root,
        table=table,
        columns=columns,
        fractions=fractions,
        seed=options.seed,
        source=source,
        limit=options.limit,
    )
    record = {
        "layout": "folder",
        "source": source,
        "table": None if table is None else str(table),
        "columns": columns.named() if table else {},
        "split": None if split_column else split or DEFAULT,
    }
    run_source(studies, out, options, settings, record)
