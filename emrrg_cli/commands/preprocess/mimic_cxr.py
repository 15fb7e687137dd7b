"""`emrrg preprocess mimic_cxr ROOT OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from emrrg_cli.commands.preprocess.common import Options, Out, Root, load_settings, run_source


def mimic_cxr(
    root: Root,
    out: Out,
    options: Options,
    reports: Annotated[
        Path | None,
        typer.Option(
            "--reports",
            metavar="PATH",
            help="Folder or zip of the notes; default: mimic-cxr-reports or its zip in ROOT.",
            show_default=False,
        ),
    ] = None,
    annotation: Annotated[
        Path | None,
        typer.Option("--annotation", metavar="JSON", help="R2Gen's file: its texts and split.", show_default=False),
    ] = None,
    labels: Annotated[Literal["chexpert", "negbio"], typer.Option("--labels", help="Whose labels.")] = "chexpert",
) -> None:
    """MIMIC-CXR: MIMIC-CXR-JPG in ROOT, notes of mimic-cxr-reports (folder or zip, read as it is).

    Official split, views of the metadata, labels. The report is the findings section, or the last paragraph of a note
    without headings; --section impression or both takes others.

    Example: emrrg preprocess mimic_cxr mimic-cxr-jpg/ data/mimic_cxr --reports mimic-cxr-reports.zip
    """
    from emrrg_cli.ingest.sources.mimic_cxr import MimicCxrSource

    settings = load_settings(options)
    studies = MimicCxrSource(
        root,
        section=settings.section,
        reports=reports,
        annotation=annotation,
        labeler=labels,
        limit=options.limit,
    )
    record = {
        "layout": "mimic_cxr",
        "reports": None if reports is None else str(reports),
        "annotation": None if annotation is None else str(annotation),
        "labels": labels,
    }
    run_source(studies, out, options, settings, record)
