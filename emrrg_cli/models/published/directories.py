"""Writes and reads the directories of converted checkpoints, one kind for each stage.

In addition to the files that the commands read, every directory has `convert.json`, which records the conversion. If
some published tensors have no counterpart in our layout, they are in `left_out.safetensors`. From these files, the
tensors of the original checkpoint can be restored exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_write_text, whole_directory
from emrrg_cli.files.records import read_bounded
from emrrg_cli.models.arm.pretrainer import ArmPretrainer, default_taps
from emrrg_cli.models.encoder_files import ENCODER_FILE, FORMAT, PRETRAINER_FILE, EncoderConfig, write_encoder_config
from emrrg_cli.models.published.bert import bert_config
from emrrg_cli.models.published.importing import Imported
from emrrg_cli.models.published.stages import TEXT, Stage
from emrrg_cli.models.weights import read_tensors

RECORD = "convert.json"
LEFT_OUT = "left_out.safetensors"
ALIGNMENT_FILE, ALIGNMENT_CONFIG = "alignment.safetensors", "alignment.json"
# Settings of the text tower that a published checkpoint does not contain.
USUAL_TEXT: dict[str, Any] = {"pooling": "last", "max_text_tokens": 128}
BRIDGE_FILE = "bridge.safetensors"
_LARGEST_RECORD = 64 * 2**20  # bytes
_HEADS = ("vision_proj.", "text_proj.", "logit_scale")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes tensors in their dtypes. They are copied, because tensors of a checkpoint may share memory."""
    save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, file)


def write_record(directory: Path, imported: Imported) -> None:
    """Writes `convert.json` and `left_out.safetensors`."""
    checkpoint = imported.checkpoint
    record = {
        "format": FORMAT,
        "kind": "convert",
        "file": imported.file.name,
        "stage": imported.stage,
        "config": None if imported.config is None else asdict(imported.config),
        "container": checkpoint.container,
        "kept": checkpoint.kept,
        "dropped": checkpoint.dropped,
        "left_out": imported.left_out,
        "made": imported.made,
        "tensors": {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in checkpoint.tensors.items()},
    }
    atomic_write_text(directory / RECORD, json.dumps(record, indent=1) + "\n")
    if imported.left_out:
        save_tensors({name: checkpoint.tensors[name] for name in imported.left_out}, directory / LEFT_OUT)


def read_record(directory: Path) -> dict[str, Any] | None:
    """Returns the record that `write_record` wrote; None if the directory is not a converted checkpoint.

    Raises:
        RunError: It cannot be read.
    """
    file = directory / RECORD
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(read_bounded(file, _LARGEST_RECORD))
        if record["format"] != FORMAT or record["kind"] != "convert":
            raise ValueError("this version cannot read this format")
        if not isinstance(record["tensors"], dict) or not {"container", "kept"} <= record.keys():
            raise ValueError("it is incomplete")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {error}") from error
    return record


# -- stages 1 and 2 ----------------------------------------------------------------------------------------------


def write_pretrainer(directory: Path, imported: Imported) -> None:
    """Writes a stage 1 checkpoint in the format that `emrrg_cli.load_pretrainer` reads.

    Raises:
        RunError: There is no model with these sizes.
    """
    assert imported.config is not None
    width = imported.ours["ar_token"].shape[-1]
    depth = len({name.split(".")[1] for name in imported.ours if name.startswith("blocks.")})
    config = imported.config
    sizes = {
        "d_model": config.d_model,
        "depth": config.depth,
        "d_state": config.d_state,
        "image_size": config.image_size,
        "decoder_width": width,
        "decoder_depth": depth,
    }
    try:
        taps = default_taps(config.depth, depth)
        with torch.device("meta"):
            ArmPretrainer(config.d_model, config.depth, config.image_size, config.d_state, width, depth, taps)
    except ValueError as error:
        raise RunError(f"{imported.file}: {error}") from error
    save_tensors(imported.ours, directory / PRETRAINER_FILE)
    text = json.dumps({"format": FORMAT, "kind": "pretrainer", **sizes, "taps": list(taps)}, indent=2)
    atomic_write_text(directory / "pretrainer.json", text + "\n")


def write_alignment(directory: Path, imported: Imported) -> None:
    """Writes a stage 2 checkpoint, or an encoder alone: encoder, projections, text tower (a BERT directory)."""
    assert imported.config is not None
    write_encoder(directory, imported.part("encoder."), imported.config)
    if heads := {name: tensor for name, tensor in imported.ours.items() if name.startswith(_HEADS)}:
        save_tensors(heads, directory / ALIGNMENT_FILE)
        dim = heads["vision_proj.weight"].shape[0]
        config = {"format": FORMAT, "kind": "alignment", "dim": dim, **USUAL_TEXT}
        atomic_write_text(directory / ALIGNMENT_CONFIG, json.dumps(config, indent=2) + "\n")
    if text := imported.part(TEXT):
        (directory / "text_encoder").mkdir()
        bert = bert_config(text)
        if bert is not None:
            bert.save_pretrained(directory / "text_encoder")
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in text.items()}
        save_file(copies, directory / "text_encoder" / "model.safetensors", {"format": "pt"})


def write_encoder(directory: Path, tensors: Mapping[str, Tensor], config: EncoderConfig) -> None:
    """Writes `encoder.safetensors` and `encoder.json`."""
    save_tensors(tensors, directory / ENCODER_FILE)
    write_encoder_config(directory, config)


# -- reading -----------------------------------------------------------------------------------------------------


def read_directory_tensors(directory: Path) -> tuple[Stage, dict[str, Tensor]]:
    """Returns the stage of a directory, and its tensors by our names.

    Args:
        directory: A directory that `emrrg convert` wrote, or a run of `pretrain`, `align` or `finetune`. The encoder of
            a run is the trained one in `model/`, if there is one, else the frozen one at the top level.

    Raises:
        UsageError: There is no model in it.
        RunError: A file cannot be read.
    """
    model = whole_directory(directory / "model")
    places = [place for place in (model, directory) if place.is_dir()]

    def find(name: str) -> Path | None:
        return next((place / name for place in places if (place / name).is_file()), None)

    if (file := find(PRETRAINER_FILE)) is not None:
        return "pretrain", read_tensors(file)
    encoder = find(ENCODER_FILE)
    tensors = {} if encoder is None else {f"encoder.{name}": t for name, t in read_tensors(encoder).items()}
    if (file := find(BRIDGE_FILE)) is not None:
        return "finetune", tensors | read_tensors(file)
    if not tensors:
        hint = "Name a run, or a directory that `emrrg convert` wrote."
        raise UsageError(f"{directory}: there is no model in this directory", hint=hint)
    head = find(ALIGNMENT_FILE)
    text = next((place / "text_encoder" for place in places if (place / "text_encoder").is_dir()), None)
    if head is None and text is None:
        return "encoder", tensors
    if head is not None:
        tensors |= read_tensors(head)
    for file in sorted(text.glob("*.safetensors")) if text is not None else ():
        tensors |= {TEXT + name: tensor for name, tensor in read_tensors(file).items()}
    return "align", tensors
