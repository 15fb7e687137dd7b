"""`emrrg preprocess phantom OUT`."""

from __future__ import annotations

from typing import Annotated

import typer

from emrrg_cli.commands.preprocess.common import Options, Out, load_settings, run_source


def phantom(
    out: Out,
    options: Options,
    count: Annotated[int, typer.Option("--count", min=1, help="Number of studies.")] = 1000,
    split: Annotated[
        str, typer.Option(metavar="PARTS", help="Fractions of train, validation and test, by the study's number.")
    ] = "0.8,0.1,0.1",
    plain: Annotated[
        bool, typer.Option("--plain", help="Draw simpler frontal films, without structures that resemble findings.")
    ] = False,
) -> None:
    """Synthetic chest radiographs with reports and known labels.

    They need no data and no licence. Films are drawn from random parameters; the same seed gives the same studies. Half
    of the studies with a PA film also have a lateral film. No film shows a patient, and results on them say nothing
    about clinical use.

    Example: emrrg preprocess phantom data/phantom --count 2000 --seed 1
    """
    from emrrg_cli.datasets.splits import parse_fractions
    from emrrg_cli.errors import UsageError
    from emrrg_cli.ingest.sources.phantom import PhantomSource
    from emrrg_cli.phantom.parameters import DRAWING

    settings = load_settings(options, "phantom/preprocess")
    if settings.size == "original":
        raise UsageError("a synthetic image has no original size", hint="Set size to a number of pixels.")
    studies = PhantomSource(
        count, seed=options.seed, fractions=parse_fractions(split), limit=options.limit, plain=plain
    )
    record = {"layout": "phantom", "drawing": DRAWING, "count": count, "split": split}
    if plain:
        record["plain"] = True
    run_source(studies, out, options, settings, record, title=f"{count:,} synthetic studies, seed {options.seed}")
