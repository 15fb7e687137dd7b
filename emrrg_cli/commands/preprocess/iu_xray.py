"""`emrrg preprocess iu_xray ROOT OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from emrrg_cli.commands.preprocess.common import Options, Out, Root, load_settings, run_source


def iu_xray(
    root: Root,
    out: Out,
    options: Options,
    layout: Annotated[
        Literal["openi", "flat", "r2gen"] | None,
        typer.Option("--layout", help="Layout of ROOT; default: detected.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Folder of images; subfolders are searched.", show_default=False),
    ] = None,
    annotation: Annotated[
        Path | None,
        typer.Option(
            "--annotation",
            metavar="JSON",
            help="R2Gen annotation file with the studies and split to use.",
            show_default=False,
        ),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(
            "--reports",
            metavar="PATH",
            help="For the r2gen layout: NLMCXR_reports.tgz or the flat release, to add indication, comparison, "
            "impression and MeSH; with indiana_projections.csv in the same folder also views.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS", help="Fractions of train, validation and test; default 0.8,0.1,0.1.", show_default=False
        ),
    ] = None,
) -> None:
    """IU X-Ray (Open-i): XML or flat release, or R2Gen's layout.

    openi: NLMCXR_reports.tgz (packed) or its folder ecgen-radiology; unpacked images in NLMCXR_png. flat:
    indiana_reports.csv and indiana_projections.csv; images in images_normalized or images. r2gen: annotation.json and
    images/CXR.../0.png. The report is the findings section, unless --section selects another.

    Example: emrrg preprocess iu_xray openi/ data/iu_xray --annotation annotation.json
    """
    from emrrg_cli.datasets.splits import DEFAULT, parse_fractions
    from emrrg_cli.ingest.sources.iu_layouts import detect_layout
    from emrrg_cli.ingest.sources.iu_xray import R2GenWithReports, iu_xray_source

    settings = load_settings(options)
    layout = layout or detect_layout(root)
    studies = iu_xray_source(
        root,
        section=settings.section,
        layout=layout,
        images=images,
        annotation=annotation,
        fractions=None if split is None else parse_fractions(split),
        seed=options.seed,
        limit=options.limit,
    )
    described = studies if reports is None else R2GenWithReports(studies, reports)
    record = {
        "layout": layout,
        "images": None if images is None else str(images),
        "annotation": None if annotation is None else str(annotation),
        "reports": None if reports is None else str(reports),
        "split": None if annotation or layout == "r2gen" else split or DEFAULT,
    }
    run_source(described, out, options, settings, record)
