"""Finds, reads and writes the files of an encoder. Its sizes come from its tensors."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_write_text, read_directory
from emrrg_cli.models.arm.encoder import PATCH_SIZE, ArmEncoder
from emrrg_cli.models.foreign_files import check_header
from emrrg_cli.models.weights import not_finite

FORMAT = 1
ENCODER_FILE = "encoder.safetensors"
PRETRAINER_FILE = "pretrainer.safetensors"
_PREFIX = "encoder."
_OTHER = "not part of the encoder"
_HINT = "Name a safetensors file, a run directory, or a directory that `emrrg convert` wrote."


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of an encoder, from its tensors.

    Args:
        d_model: Width `d`.
        depth: Number of blocks.
        d_state: `n`, the SSM state size.
        image_size: Side of the square input in pixels.
        directions: Number of scan directions: 1 in stage 1, 4 in stages 2 and 3.
        class_token: Whether there is one; its row is in the middle of the position embedding.
    """

    d_model: int
    depth: int
    d_state: int
    image_size: int
    directions: int = 4
    class_token: bool = True

    @property
    def grid(self) -> int:
        """Number of patches per side."""
        return self.image_size // PATCH_SIZE

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> EncoderConfig:
        """Returns the sizes of the encoder with these tensors.

        Raises:
            RunError: They are not the tensors of an encoder. The message does not name the file.
        """
        needed = ("patch_embed.weight", "pos_embed", "layers.0.mixer.A_log")
        if missing := [name for name in needed if name not in tensors]:
            raise RunError(f"not an encoder: {missing[0]} is missing")
        # A tensor without values may claim any size, and a file with few values a model that fills all memory.
        if empty := next((name for name, tensor in tensors.items() if not tensor.numel()), None):
            raise RunError(f"not an encoder: {printable(empty)} is empty")
        weight, pos_embed, A_log = (tensors[name] for name in needed)
        if weight.dim() != 4 or pos_embed.dim() != 3 or A_log.dim() != 3:
            raise RunError("not an encoder: patch_embed.weight must have four axes, pos_embed and A_log three")
        if not pos_embed.shape[2] == A_log.shape[1] == weight.shape[0]:
            raise RunError("not an encoder: patch_embed.weight, pos_embed and A_log have different widths")
        class_token = "cls_token" in tensors
        patches = pos_embed.shape[1] - class_token
        grid = math.isqrt(patches)
        if grid * grid != patches:
            raise RunError(f"not an encoder: pos_embed has {patches} patches, which is not a square number")
        directions, _, d_state = A_log.shape
        numbers = {int(number) for number in re.findall(r"^layers\.(\d+)\.", "\n".join(tensors), re.MULTILINE)}
        return cls(weight.shape[0], depth_of(numbers), d_state, grid * PATCH_SIZE, directions, class_token)


def depth_of(numbers: Collection[int]) -> int:
    """Returns the number of blocks from the block numbers in tensor names; numbers that are far too large are ignored.

    A number below twice the count may be the last block if some blocks are missing. Larger numbers are ignored, because
    otherwise a malicious name could demand any number of blocks.
    """
    return 1 + max((number for number in numbers if number < 2 * len(numbers)), default=0)


@dataclass(frozen=True)
class EncoderSource:
    """An encoder that was read from a file.

    Args:
        config: Its sizes.
        tensors: Its tensors by the names of `ArmEncoder`.
        file: The file.
        names: The name in the file for each name in `tensors`.
        others: Other tensors in the file or beside it, with the reason why they are not used.
        notes: Messages for the user.
    """

    config: EncoderConfig
    tensors: dict[str, Tensor]
    file: Path
    names: dict[str, str]
    others: dict[str, str]
    notes: list[str]


def encoder_source(path: Path | str) -> EncoderSource:
    """Finds and reads an encoder.

    Args:
        path: A run directory of `pretrain`, `align` or `finetune`, a directory that `emrrg convert` wrote, the `model/`
            of a run, or a safetensors file with the tensors of an encoder, with or without the prefix `encoder.`.

    Raises:
        UsageError: The path does not exist or has no encoder, or the file must be converted first.
        RunError: A file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return read_directory(path / "model", lambda model: _read_directory(path, model))
    if not path.is_file():
        raise UsageError(f"{path}: no such file or directory, expected an encoder", hint=_HINT)
    return _read_file(path)


def _read_directory(path: Path, model: Path) -> EncoderSource:
    # `model/` of a run has the trained parts, its top level the frozen ones. A file with only an encoder comes first.
    places = [folder / name for name in (ENCODER_FILE, PRETRAINER_FILE) for folder in (model, path)]
    file = next((place for place in places if place.is_file()), None)
    if file is None and (path / "recipe.yaml").is_file():
        raise UsageError(
            f"{path}: this run has not exported an encoder yet", hint="Wait for its first validation or its end."
        )
    if file is None:
        raise UsageError(f"{path}: there is no encoder in this directory", hint=_HINT)
    source = _read_file(file)
    source.others.update(_tensors_beside(path, file))
    if (adapters := model / "adapters" / "encoder").is_dir():
        source.notes.append(f"{adapters}: these adapters are not used; the encoder is the frozen one without them")
    return source


def _read_file(file: Path) -> EncoderSource:
    names = _names_in(file)
    if any(name.startswith("visual_encoder.") or ".patch_embed.proj." in f".{name}" for name in names):
        raise UsageError(
            f"{file}: this file has the published layout",
            hint=f"Convert it first: emrrg convert {shlex.quote(str(file))} DIRECTORY",
        )
    prefix = _PREFIX if f"{_PREFIX}patch_embed.weight" in names else ""
    own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(stored) for name, stored in own.items()}
    try:
        config = EncoderConfig.of(tensors)
    except RunError as error:
        raise UsageError(f"{file}: {error.message}", hint="Name a file with the tensors of an encoder.") from error
    problems = {
        name: f"no weights but {one.dtype} values" for name, one in tensors.items() if not one.is_floating_point()
    }
    if (name := not_finite(tensors)) is not None:
        problems[name] = "values that are not finite"
    for name, what in problems.items():
        raise UsageError(f"{file}: {printable(name)} has {what}", hint="Name an encoder whose training succeeded.")
    others = {name: _OTHER for name in names if not name.startswith(prefix)}
    return EncoderSource(config, tensors, file, own, others, [])


def _names_in(file: Path) -> list[str]:
    if not file.is_file():  # opening a pipe would wait for a writer
        raise RunError(f"{file}: not a regular file")
    try:
        with file.open("rb") as stream:
            start = stream.read(2)
        if start in (b"PK", b"\x80\x02"):  # a zip archive or a pickle: PyTorch's own formats
            hint = f"Convert a published checkpoint first: emrrg convert {shlex.quote(str(file))} DIRECTORY"
            raise UsageError(f"{file}: not a safetensors file but a PyTorch checkpoint", hint=hint)
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: not a readable safetensors file: {error}") from error


def _tensors_beside(directory: Path, file: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for other in sorted(directory.rglob("*.safetensors")):
        place = other.relative_to(directory)
        if other != file and place.parts[0] != "checkpoints":
            found |= {f"{place.as_posix()}:{name}": _OTHER for name in _names_in(other)}
    return found


def save_encoder(directory: Path, encoder: ArmEncoder) -> None:
    """Writes `encoder.safetensors` and `encoder.json` into an existing directory."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, directory / ENCODER_FILE)
    write_encoder_config(directory, EncoderConfig.of(state))


def write_encoder_config(directory: Path, config: EncoderConfig) -> None:
    """Writes `encoder.json` with the sizes, for users and other programs; emrrg reads them from the tensors."""
    sizes = {name: value for name, value in asdict(config).items() if name not in ("directions", "class_token")}
    text = json.dumps({"format": FORMAT, "kind": "encoder", **sizes}, indent=2)
    atomic_write_text(directory / "encoder.json", text + "\n")
