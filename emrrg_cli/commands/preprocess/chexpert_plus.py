"""`emrrg preprocess chexpert_plus ROOT OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emrrg_cli.commands.preprocess.common import Options, Out, Root, load_settings, run_source


def chexpert_plus(
    root: Root,
    out: Out,
    options: Options,
    annotation: Annotated[
        Path | None,
        typer.Option(
            "--annotation",
            metavar="JSON",
            help="Annotation file in R2Gen's format with the studies, texts and split to use.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="Fractions of train, validation and test, by patient; default 0.7,0.1,0.2.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """CheXpert Plus: its table, images and labels.

    ROOT has df_chexpert_plus_240401.csv, PNGs/ (or PNG/, DICOM/) and chexbert_labels/. Rows of the same study are its
    views. The report is section_findings, unless --section selects another section. The published annotation has its
    own split of 40,463, 5,780 and 11,562 studies; without it, patients are split at random.

    Example: emrrg preprocess chexpert_plus cheXpert_plus/ data/chexpert_plus --annotation annotation.json
    """
    from emrrg_cli.datasets.splits import parse_fractions
    from emrrg_cli.errors import UsageError
    from emrrg_cli.ingest.sources.chexpert_plus import FRACTIONS, ChexpertPlusSource

    if annotation is not None and split is not None:
        raise UsageError("--annotation and --split cannot be used together")
    settings = load_settings(options)
    fractions = FRACTIONS if split is None else parse_fractions(split)
    studies = ChexpertPlusSource(
        root,
        section=settings.section,
        annotation=annotation,
        fractions=fractions,
        seed=options.seed,
        limit=options.limit,
    )
    record = {
        "layout": "chexpert_plus",
        "annotation": None if annotation is None else str(annotation),
        "split": None if annotation else ",".join(f"{part:g}" for part in fractions),
    }
    run_source(studies, out, options, settings, record)
