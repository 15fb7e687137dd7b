"""`emrrg preprocess r2gen ROOT OUT`."""

from __future__ import annotations

from typing import Annotated

import typer

from emrrg_cli.commands.preprocess.common import Options, Out, Root, load_settings, run_source


def r2gen(
    root: Root,
    out: Out,
    options: Options,
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="NAME", help="Name of the data set; iu_xray is detected by its study ids."),
    ] = None,
) -> None:
    """R2Gen's layout: annotation.json and images.

    ROOT is the folder or the JSON file, which has the splits train, val and test. Images are in the same folder or in
    images/. Unusable studies are skipped and listed with reasons.

    Example: emrrg preprocess r2gen iu_xray/ data/iu_xray size=512
    """
    from emrrg_cli.ingest.sources.r2gen import R2GenSource

    settings = load_settings(options)
    studies = R2GenSource(root, source=source, limit=options.limit)
    run_source(studies, out, options, settings, {"layout": "r2gen", "source": source})
