"""Files of strangers are read up to a bound: headers of any size, pipes, JSON without end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emrrg_cli.errors import EmrrgError, UsageError
from emrrg_cli.evaluation.merged_scores import read_merged
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.arm.pretrainer import _read as read_pretrainer
from emrrg_cli.models.encoder_files import encoder_source
from emrrg_cli.models.published.checkpoint import read_checkpoint
from emrrg_cli.models.published.directories import read_record
from emrrg_cli.models.weights import read_tensors

_HEADER = (9 * 2**20).to_bytes(8, "little") + b"{" + b" " * (9 * 2**20)

_TENSORS: list[Callable[[Path], Any]] = [encoder_source, read_tensors, read_checkpoint]


@pytest.mark.parametrize("read", _TENSORS)
@pytest.mark.parametrize("what", ["header", "pipe", "device"])
@pytest.mark.skipif(os.name != "posix", reason="special files")
def test_tensors_are_read_up_to_a_limit(tmp_path: Path, read: Callable[[Path], Any], what: str) -> None:
    file = tmp_path / "encoder.safetensors"
    match what:
        case "header":
            file.write_bytes(_HEADER)
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
    with pytest.raises(EmrrgError, match="claims 9,437,184 bytes" if what == "header" else r"encoder\.safetensors"):
        read(file)


@pytest.mark.skipif(os.name != "posix", reason="special files")
def test_a_pipe_beside_an_encoder_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    os.mkfifo(run / "other.safetensors")
    with pytest.raises(EmrrgError, match=r"other\.safetensors: not a regular file"):
        encoder_source(run)


_RECORDS: dict[str, Callable[[Path], Any]] = {
    "convert.json": lambda folder: read_record(folder),
    "pretrainer.json": lambda folder: read_pretrainer(folder, "auto"),
    "scores.json": lambda folder: read_merged(folder / "scores.json"),
    "model.safetensors.index.json": lambda folder: read_checkpoint(folder / "model.safetensors.index.json"),
}


@pytest.mark.parametrize("name", _RECORDS)
def test_deeply_nested_json_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(EmrrgError, match=name):
        _RECORDS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("patch_embed.weight", (20_000, 0, 16, 16), "patch_embed.weight is empty"),
        ("pos_embed", (1, 100_000_001, 0), "pos_embed is empty"),
        ("layers.0.mixer.A_log", (4, 0, 10**9), "layers.0.mixer.A_log is empty"),
        ("patch_embed.weight", (), "must have four axes"),
        ("pos_embed", (1, 17, 1), "have different widths"),
    ],
)
def test_an_encoder_cannot_claim_any_size(name: str, shape: tuple[int, ...], told: str, tmp_path: Path) -> None:
    tensors = ArmEncoder(32, 1, 64, 4).state_dict() | {name: torch.zeros(shape)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "encoder.safetensors")
    with pytest.raises(UsageError, match=told):
        encoder_source(tmp_path / "encoder.safetensors")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (torch.full((1, 17, 32), float("nan")), "pos_embed has values that are not finite"),
        (torch.ones((1, 17, 32), dtype=torch.int64), "pos_embed has no weights but torch.int64 values"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(values: torch.Tensor, told: str, tmp_path: Path) -> None:
    tensors = ArmEncoder(32, 1, 64, 4).state_dict() | {"pos_embed": values}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "encoder.safetensors")
    with pytest.raises(UsageError, match=told):
        encoder_source(tmp_path / "encoder.safetensors")
