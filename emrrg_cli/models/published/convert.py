"""`emrrg convert`: converts a published checkpoint to one of our directories, and back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from emrrg_cli.checksums import CHECKSUMS, write_checksums
from emrrg_cli.console import counted
from emrrg_cli.errors import UsageError
from emrrg_cli.files.atomic import atomic_directory
from emrrg_cli.files.write_errors import writing
from emrrg_cli.models.encoder_files import EncoderConfig
from emrrg_cli.models.published.checkpoint import write_checkpoint
from emrrg_cli.models.published.directories import LEFT_OUT, RECORD, write_alignment, write_pretrainer, write_record
from emrrg_cli.models.published.exporting import export_checkpoint
from emrrg_cli.models.published.importing import Imported, import_checkpoint
from emrrg_cli.models.published.run import base_encoder, default_recipe, run_recipe, write_run
from emrrg_cli.models.published.stages import LABELS, Stage
from emrrg_cli.recipe.load import RUN_RECIPE


@dataclass(frozen=True)
class Outcome:
    """Result of a conversion: the stage, and lines for the user."""

    stage: Stage
    lines: list[str]


def convert_to_ours(
    file: Path,
    out: Path,
    *,
    allow: Sequence[str] = (),
    base: Path | None = None,
    recipe: str | None = None,
    llm: str | None = None,
    verbose: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Writes a published checkpoint as one of our directories.

    Stage 1 becomes a directory for `emrrg_cli.load_pretrainer`, stage 2 an encoder with projections and a text tower,
    stage 3 a run directory. The dtypes of the file are kept.

    Args:
        file: `.pth` or safetensors.
        out: The directory: new or empty, or with `overwrite` one of an earlier conversion.
        allow: Tensors that may be unknown, missing or of a wrong shape, with wildcards as in a shell.
        base: For a stage 3 file without an encoder: the stage 2 file or directory that has it.
        recipe: For stage 3: recipe of the run; None: chosen by the name of the file.
        llm: For stage 3: hub name or directory of the LLM; None: the published one of the bridge's width.
        verbose: List every tensor.

    Raises:
        UsageError: A path or an option is wrong.
        RunError: A file cannot be read or is not a complete checkpoint.
    """
    _check_places(file, out, base, overwrite=overwrite)
    imported = import_checkpoint(file, allow)
    given = {"--base": base, "--recipe": recipe, "--llm": llm}
    if imported.stage != "finetune" and (wrong := [name for name, value in given.items() if value is not None]):
        raise UsageError(f"{wrong[0]} is for stage 3, and {file} is {LABELS[imported.stage]}")
    lines = imported.lines(verbose=verbose)
    writers: dict[Stage, Callable[[Path, Imported], None]] = {
        "pretrain": write_pretrainer,
        "align": write_alignment,
        "encoder": write_alignment,
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in imported.ours.values())
    if imported.stage in writers:
        with writing(out, size), atomic_directory(out) as directory:
            writers[imported.stage](directory, imported)
            write_record(directory, imported)
            write_checksums(directory)
        return Outcome(imported.stage, lines)
    config, encoder = _encoder_for(imported, file, base)
    if base is not None:
        lines.append(f"the encoder comes from {base}")
    chosen = recipe or default_recipe(file)
    settings = run_recipe(imported, config, chosen, llm)
    lines.append(f"recipe {chosen}, LLM {settings.model.llm.name}, no hybrid layers, no adapters")
    with writing(out, size), atomic_directory(out) as directory:
        lines += write_run(directory, imported, config, encoder, settings)
        write_record(directory, imported)
        write_checksums(directory)
    return Outcome(imported.stage, lines)


def _check_places(file: Path, out: Path, base: Path | None, *, overwrite: bool) -> None:
    if file.is_dir():
        raise UsageError(
            f"{file} is a directory, not a checkpoint file",
            hint="Name a checkpoint file (.pth, .safetensors). To convert a directory of emrrg, use --to published.",
        )
    _check_directory(out, overwrite=overwrite)
    for source in (file, base):
        if source is not None and source.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{source} is in {out}, which would be replaced", hint="Choose another name.")


def _encoder_for(imported: Imported, file: Path, base: Path | None) -> tuple[EncoderConfig, dict[str, Tensor]]:
    # The encoder of a stage 3 file, or of the stage 2 file that it was trained from.
    if imported.config is not None:
        if base is not None:
            raise UsageError(f"{file} contains its own encoder", hint="Remove --base.")
        return imported.config, imported.part("encoder.")
    if base is None:
        hint = "Name the stage 2 file that it was trained from: --base FILE."
        raise UsageError(f"{file} has no encoder, because its backbone was frozen (as for IU X-Ray)", hint=hint)
    return base_encoder(base, imported.ours["bridge.proj.weight"].shape[1])


# The content of a converted directory.
_WRITTEN = (
    RECORD, LEFT_OUT, CHECKSUMS, "encoder.*", "pretrainer.*", "alignment.*", "text_encoder", RUN_RECIPE, "model",
    "tokenizer",
)  # fmt: skip


def _check_directory(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file, but the output is a directory", hint="Choose another name.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} already exists and is not empty", hint="Give --overwrite, or another name.")
    if not (out / RECORD).is_file():
        raise UsageError(
            f"{out} was not written by `emrrg convert`, so it is not overwritten", hint="Choose another name."
        )
    for entry in sorted(out.iterdir()):
        if not any(entry.match(pattern) for pattern in _WRITTEN):
            raise UsageError(
                f"{entry} was not written by `emrrg convert`, so {out} is not overwritten",
                hint="Move it away, or choose another name.",
            )


def convert_to_published(
    directory: Path, out: Path, *, allow: Sequence[str] = (), verbose: bool = False, overwrite: bool = False
) -> Outcome:
    """Writes one of our directories as a published checkpoint.

    All tensors of a converted checkpoint are restored exactly, with its epoch and step. Of a run of `pretrain`, `align`
    or `finetune`, the parts that the published layout has are written.

    Args:
        directory: A directory that `emrrg convert` wrote, or a run.
        out: The file; safetensors if it has this suffix, else in the format of `torch.save`.
        allow: Parts that may be left out, with wildcards as in a shell.
        verbose: List every tensor.

    Raises:
        UsageError: A path is wrong, or the model has parts that the published layout does not have.
        RunError: A file cannot be read.
    """
    if not directory.is_dir():
        what = "is a file, not a directory of emrrg" if directory.exists() else "no such directory"
        hint = "Name a run, or a directory that `emrrg convert` wrote."
        raise UsageError(f"{directory}: {what}", hint=hint)
    if out.is_dir():
        raise UsageError(f"{out} is a directory, but the output is a file", hint="Choose a name such as OUT.pth.")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} already exists", hint="Give --overwrite, or another name.")
    stage, checkpoint, dropped = export_checkpoint(directory, allow)
    temporary = out.with_name(f"{out.stem}.tmp-{secrets.token_hex(4)}{out.suffix}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.tensors.values())
    with writing(out, size):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_checkpoint(temporary, checkpoint)
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    lines = [
        f"{directory}: {LABELS[stage]}: {counted(len(checkpoint.tensors), 'tensor')} written, {len(dropped)} left out"
    ]
    if verbose:
        lines += [f"  written   {name}  {list(tensor.shape)}" for name, tensor in checkpoint.tensors.items()]
        lines += [f"  left out  {name}" for name in dropped]
    return Outcome(stage, lines)
