"""`emrrg convert`: converts published checkpoints to our format, and back."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Layout(StrEnum):
    """The two formats of a conversion."""

    OURS = "ours"
    PUBLISHED = "published"


def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Published checkpoint (.pth, .safetensors), or our directory.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; with --to published, a file.")],
    to: Annotated[Layout, typer.Option("--to", help="Format to write.")] = Layout.OURS,
    base: Annotated[
        Path | None, typer.Option("--base", help="Stage 2 file with the encoder, for a stage 3 file without one.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe of a stage 3 file; default: chosen by the file name.")
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option("--llm", help="LLM of a stage 3 file: hub name or directory; default: the published LLM."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="NAME", help="Tensor that may be unknown, missing or misshapen; wildcards; repeatable."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="List how each tensor was used.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion.")] = False,
) -> None:
    """Convert a published checkpoint to our format, or back.

    The tensors determine stage and sizes. Unknown, missing or misshapen tensors are errors. No code from the file is
    run. Stages 1 and 2 become a directory for model.encoder.weights, stage 3 a run for `generate` and `evaluate`.

    Example: emrrg convert MambaXrayCLIP-B.pth clip-b
    """
    from emrrg_cli.console import err
    from emrrg_cli.errors import UsageError
    from emrrg_cli.files.output_paths import check_writable
    from emrrg_cli.silence_libraries import silence_libraries

    if to is Layout.PUBLISHED:
        for option, value in {"--base": base, "--recipe": recipe, "--llm": llm}.items():
            if value is not None:
                raise UsageError(f"{option} cannot be used with --to published")
    for given in (file, base):  # before torch is imported
        if given is not None and not given.exists():
            raise UsageError(f"{given}: no such file or directory")
    if to is not Layout.PUBLISHED and out.is_file():
        raise UsageError(f"{out} is a file, but the output is a directory", hint="Choose another name.")
    if out.exists() and not overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        what = "already exists" if out.is_file() else "already exists and is not empty"
        raise UsageError(f"{out} {what}", hint="Use --overwrite, or choose another name.")
    check_writable(out.absolute().parent)
    silence_libraries()
    from emrrg_cli.models.published.convert import convert_to_ours, convert_to_published

    common: dict[str, Any] = {"allow": allow or (), "verbose": verbose, "overwrite": overwrite}
    if to is Layout.PUBLISHED:
        outcome = convert_to_published(file, out, **common)
    else:
        outcome = convert_to_ours(file, out, base=base, recipe=recipe, llm=llm, **common)
    for line in outcome.lines:
        err.print(line, markup=False, soft_wrap=True)
    if to is Layout.PUBLISHED:
        return
    place = shlex.quote(str(out))
    following = {
        "pretrain": f"emrrg align RECIPE model.encoder.weights={place}",
        "align": f"emrrg finetune RECIPE model.encoder.weights={place}",
        "encoder": f"emrrg finetune RECIPE model.encoder.weights={place}",
        "finetune": f"emrrg generate IMAGES --model {place}",
    }
    err.print(f"Next:  {following[outcome.stage]}", markup=False, soft_wrap=True)
