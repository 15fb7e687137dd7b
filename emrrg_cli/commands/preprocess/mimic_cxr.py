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
            help="Folder or zip file with the reports, or mimic_cxr_sectioned.csv; default: found in ROOT.",
            show_default=False,
        ),
    ] = None,
    annotation: Annotated[
        Path | None,
        typer.Option(
            "--annotation",
            metavar="JSON",
            help="R2Gen annotation file with the texts and split to use.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        Literal["chexpert", "negbio"], typer.Option("--labels", help="Labeler whose labels are used.")
    ] = "chexpert",
) -> None:
    """MIMIC-CXR: MIMIC-CXR-JPG and its reports.

    MIMIC-CXR-JPG is in ROOT, reports are in mimic-cxr-reports (folder or zip) or mimic_cxr_sectioned.csv. Uses the
    official split, views from the metadata, and labels. The report is the findings section, or the last paragraph of a
    text without headings, unless --section selects another section.

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
