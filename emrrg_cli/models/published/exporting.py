"""Converts our directories back to the published layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files import records
from emrrg_cli.models.arm.encoder import CLUSTER
from emrrg_cli.models.encoder_files import EncoderConfig
from emrrg_cli.models.published.bert import usual_heads
from emrrg_cli.models.published.checkpoint import Checkpoint
from emrrg_cli.models.published.directories import (
    ALIGNMENT_CONFIG,
    BRIDGE_FILE,
    LEFT_OUT,
    USUAL_TEXT,
    read_directory_tensors,
    read_record,
)
from emrrg_cli.models.published.importing import PARALLEL
from emrrg_cli.models.published.layout import (
    Piece,
    alignment_pieces,
    block_causal_mask,
    bridge_pieces,
    decoder_pieces,
    encoder_pieces,
    to_published,
)
from emrrg_cli.models.published.stages import ENCODER, TEXT, Stage
from emrrg_cli.models.weights import read_tensors


def export_checkpoint(directory: Path, allow: Sequence[str] = ()) -> tuple[Stage, Checkpoint, list[str]]:
    """Returns a directory as a published checkpoint: the one that it was converted from, or a new one for a run.

    Args:
        directory: A directory that `emrrg convert` wrote, or a run of `pretrain`, `align` or `finetune`.
        allow: Parts that the published layout does not have and that may be left out, with wildcards as in a shell.

    Returns:
        The stage, the checkpoint, and the names of the parts that were left out.

    Raises:
        UsageError: There is no model in it, or it has parts that the layout does not have and that are not in `allow`.
        RunError: A file cannot be read or has missing tensors.
    """
    stage, ours = read_directory_tensors(directory)
    record = read_record(directory)
    dropped = _without_a_place(directory, stage, ours)
    if refused := [name for name in dropped if not any(fnmatchcase(name, pattern) for pattern in allow)]:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UsageError(
            f"{directory}: the published layout has no place for {', '.join(refused[:3])}{more}",
            hint="--allow NAME (or wildcards) leaves them out; the written model is then incomplete.",
        )
    names: dict[str, list[Any]] = {} if record is None else record["tensors"]
    parallel = PARALLEL if names and all(name.startswith(PARALLEL) for name in names) else ""
    bare = bool(names) and not any(name.startswith(parallel + ENCODER) for name in names)
    try:
        pieces = _pieces(stage, ours, "" if stage == "encoder" and bare else ENCODER)
        published = to_published(pieces, ours)
    except (KeyError, ValueError, RuntimeError) as error:  # a missing tensor, or another shape
        raise RunError(f"{directory}: its tensors are not those of a complete model: {error}") from error
    if record is None:
        if stage == "pretrain":
            clusters = EncoderConfig.of(_encoder_of(ours)).grid ** 2 // CLUSTER**2
            published["mask"] = block_causal_mask(clusters - 1)
        return stage, Checkpoint(published, "model", {}, []), dropped
    found = {parallel + name: tensor for name, tensor in published.items()}
    if (file := directory / LEFT_OUT).is_file():
        found |= read_tensors(file)
    if missing := [name for name in names if name not in found]:
        raise RunError(f"{directory}: {missing[0]} of {record['file']} is missing")
    # Stacked tensors have the widest of their dtypes; the conversion back to the original dtypes is exact.
    tensors = {name: found[name].to(getattr(torch, dtype)).reshape(shape) for name, (dtype, *shape) in names.items()}
    return stage, Checkpoint(tensors, record["container"], record["kept"], []), dropped


def _encoder_of(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): t for name, t in ours.items() if name.startswith("encoder.")}


def _pieces(stage: Stage, ours: Mapping[str, Tensor], prefix: str) -> list[Piece]:
    config = EncoderConfig.of(_encoder_of(ours))
    if stage == "pretrain":
        blocks = {name.split(".")[1] for name in ours if name.startswith("blocks.")}
        pieces = [piece.prefixed("", "encoder.") for piece in encoder_pieces(config)]
        return pieces + decoder_pieces(config, ours["ar_token"].shape[-1], len(blocks))
    pieces = [piece.prefixed(prefix, "encoder.") for piece in encoder_pieces(config)]
    if stage == "finetune":
        pieces += bridge_pieces(config.d_model, ours["bridge.proj.weight"].shape[0])
    if stage == "align":
        if "text_proj.weight" in ours:
            dim, width = ours["text_proj.weight"].shape
            pieces += alignment_pieces(config.d_model, width, dim)
        text = {name: tuple(tensor.shape) for name, tensor in ours.items() if name.startswith(TEXT)}
        pieces += [Piece({name: shape}, (name,), "same", shape=shape) for name, shape in text.items()]
    return pieces


def _without_a_place(directory: Path, stage: Stage, ours: Mapping[str, Tensor]) -> list[str]:
    """Returns the parts that no published checkpoint has: hybrid layers, adapters, a trained LLM, and settings of the
    text tower that differ from the published ones."""
    if stage == "align":
        return _unusual_tower(directory)
    if stage != "finetune":
        return []
    parts = [name for name in ours if not name.startswith(("encoder.", "bridge."))]
    # `directory` is a run or its `model/`. An `llm/` outside of `model/` is a copy of an LLM that was never trained.
    trained = directory if (directory / BRIDGE_FILE).is_file() else directory / "model"
    return parts + [name for name in ("adapters/encoder", "adapters/llm", "llm") if (trained / name).is_dir()]


def _unusual_tower(directory: Path) -> list[str]:
    trained = directory if (directory / ALIGNMENT_CONFIG).is_file() else directory / "model"
    hint = "Convert or train it again."
    settings = records.read_record(trained / ALIGNMENT_CONFIG, "the settings of an alignment", hint) or {}
    tower = records.read_record(trained / "text_encoder" / "config.json", "the configuration of BERT", hint) or {}
    usual = {**USUAL_TEXT, "num_attention_heads": usual_heads(tower.get("hidden_size", 0))}
    found = {**settings, **tower}
    return [f"{name}={found[name]}" for name, value in usual.items() if found.get(name, value) != value]
