"""`emrrg preprocess combined ANNOTATION OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.commands.preprocess.common import Options, Out, load_settings, run_source


def combined(
    annotation: Annotated[
        Path, typer.Argument(metavar="ANNOTATION", help="Annotation file of several data sets.", show_default=False)
    ],
    out: Out,
    options: Options,
    root: Annotated[
        list[str] | None,
        typer.Option(
            "--root", metavar="NAME=DIR", help="Folder of a data set; repeat for each one.", show_default=False
        ),
    ] = None,
    moved: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="OLD=NEW",
            help="Replace the beginning OLD of paths in the annotation with the folder NEW; repeatable.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Several data sets in one annotation file of R2Gen's format.

    The published file of stage 2 is one. Every image must be in one of the root folders. The name of the root becomes
    the study's source. Use the name iu_xray for IU X-Ray, so that its reports are cleaned by its own rule.

    Example: emrrg preprocess combined clip_annotation.json data/stage2 --root iu_xray=iu/ --root mimic_cxr=mimic/
    --map /data/iu_xray/images=iu/images --map /data/mimic_cxr=mimic/files
    """
    from emrrg_cli.ingest.sources.combined import CombinedSource, parse_pairs

    settings = load_settings(options)
    roots, pairs = parse_pairs("--root", root or []), parse_pairs("--map", moved or [])
    studies = CombinedSource(
        annotation,
        {name: Path(folder) for name, folder in roots.items()},
        moved={old: Path(new) for old, new in pairs.items()},
        limit=options.limit,
    )
    record = {"layout": "combined", "annotation": str(annotation), "roots": roots, "map": pairs}
    run_source(studies, out, options, settings, record)
