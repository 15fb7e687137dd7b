"""Reads a PyTorch checkpoint without running code in it, and writes one.

A `.pth` file is a pickle, and a pickle is a program. It is read by PyTorch's weights-only unpickler, which accepts only
tensors and plain containers. Published checkpoints also contain their training settings as objects, such as an argparse
namespace. These are not needed, so each class in the list below is replaced by a class of ours that stores nothing. The
original class is neither imported nor called.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.records import read_bounded
from emrrg_cli.models.foreign_files import check_archive
from emrrg_cli.models.weights import read_tensors

# Keys of the model's tensors, in a file that also contains other entries.
CONTAINERS = ("model", "state_dict", "module")
# Other entries that are kept, if they are numbers.
KEPT = ("epoch", "step")

_SETTINGS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib{inner}.{name}Path" for inner in ("", "._local") for name in ("", "Posix", "Windows")),
    *(f"pathlib{inner}.Pure{name}Path" for inner in ("", "._local") for name in ("", "Posix", "Windows")),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")),
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    # Numbers that numpy computed, such as a best score.
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray", "float64", "float32", "int64", "bool_")),
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Bool")),
)
_MAPPINGS = (
    "collections.defaultdict",
    *(f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")),
    *(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")),
    "yacs.config.CfgNode",
    "easydict.EasyDict",
)


class _StandIn:
    """Replaces an object that is not needed: accepts any arguments and stores nothing."""

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _MappingStandIn:
    """Replaces a class that is filled item by item, which the unpickler supports only for plain dictionaries."""

    def __new__(cls, *args: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


_ALLOWED: list[Any] = [(_StandIn, name) for name in _SETTINGS] + [(_MappingStandIn, name) for name in _MAPPINGS]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file.

    Args:
        tensors: The tensors of the model by name, in the order of the file.
        container: The key of these tensors in the file (`CONTAINERS`); None: they are at the top level.
        kept: `epoch` and `step`, if they are numbers.
        dropped: Names of all other entries.
    """

    tensors: dict[str, Tensor]
    container: str | None
    kept: dict[str, int | float]
    dropped: list[str]


_LARGEST_INDEX = 64 * 2**20  # bytes


def read_checkpoint(file: Path) -> Checkpoint:
    """Reads a `.pth` file (zip or the older format) or a safetensors file, on the CPU, without running code in it.

    Raises:
        UsageError: The path is not a file.
        RunError: The file is not a checkpoint, is truncated, or contains objects other than tensors, plain containers
            and training settings. The message names them.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    if file.name.endswith(".safetensors.index.json"):
        return _joined(file)
    if (part := re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name)) is not None:
        index = file.with_name(f"{file.name[: part.start()]}.safetensors.index.json")
        raise UsageError(f"{file} is one of several files of a model", hint=f"Name their index, {index.name}.")
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from error
    if head[:2] in (b"PK", b"\x80\x02"):
        return _sorted_out(file, _unpickled(file))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
        return Checkpoint(read_tensors(file), None, {}, [])
    if head.startswith(b"version https://git-lfs"):
        raise RunError(f"{file}: this is a pointer of Git LFS, not the file", hint="Fetch the file: git lfs pull.")
    if head[:1] == b"\x80" and (names := _globals_in(file)):
        raise _refused(file, names)
    what = "empty" if not head else "neither a PyTorch checkpoint nor a safetensors file"
    raise RunError(f"{file}: this file is {what}", hint="Download it again, and compare its size.")


def _joined(index: Path) -> Checkpoint:
    # A model in several safetensors files, beside the index that names them.
    try:
        names = sorted(set(json.loads(read_bounded(index, _LARGEST_INDEX))["weight_map"].values()))
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError("it names files outside its directory")
    except (RecursionError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{index}: this index of a model in several files cannot be read: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_tensors(index.with_name(name))
    return Checkpoint(tensors, None, {}, [])


def _unpickled(file: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip and _is_program(file):  # checked first: its code is compressed, which `check_archive` refuses
            raise RunError(f"{file}: refused: this is a TorchScript program, not a checkpoint")
        check_archive(file)
    except RunError:
        raise
    except Exception as error:  # a damaged list of members raises errors of many types
        raise _damaged(file, getattr(error, "strerror", None) or str(error)) from error
    with file.open("rb") as stream:
        if stream.read(2) == b"PK" and not is_zip:
            raise _damaged(file, "its end is missing")
    if is_zip and (name := _broken_member(file)):
        raise _damaged(file, f"{name} in it is not what was written (its checksum)")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")
            # Memory-mapped, so that the state of an optimizer, twice the size of the model, is never read.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a broken pickle raises errors of many types
        reason = str(error)
        if named := re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", reason):
            raise _refused(file, [named[1]]) from error
        if isinstance(error, pickle.UnpicklingError) and (names := _globals_in(file)) and "operand" in reason:
            raise _refused(file, names) from error
        raise _damaged(file, next(iter(reason.splitlines()), type(error).__name__)) from error


def _is_program(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _broken_member(file: Path) -> str | None:
    # A memory-mapped file is not checked when it is read.
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _damaged(file, str(error) or type(error).__name__) from error


def _refused(file: Path, names: Sequence[str]) -> RunError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return RunError(
        f"{file}: refused, and nothing in it was run: reading it would call {', '.join(names[:3])}{more}, "
        "but a checkpoint may contain only tensors, plain containers and training settings",
        hint="Ask its author to save only the tensors: torch.save({'model': model.state_dict()}, FILE).",
    )


def _damaged(file: Path, reason: str) -> RunError:
    return RunError(
        f"{file}: this checkpoint is damaged or cut off: {reason}", hint="Download it again, and compare its size."
    )


def _globals_in(file: Path) -> list[str]:
    # The globals that a pickle names, without running it, up to the first part that cannot be parsed.
    found: list[str] = []
    texts: list[str] = []
    try:
        with file.open("rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    found.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # a file that is not a pickle raises errors of many types
        return found
    return found


def _sorted_out(file: Path, content: Any) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise RunError(f"{file}: this file contains a {type(content).__name__}, not the tensors of a model by name")
    container = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
    model: Mapping[Any, Any] = content if container is None else content[container]
    rest = {} if container is None else {str(key): value for key, value in content.items() if key != container}
    tensors = {}
    for name, value in model.items():
        if not isinstance(value, Tensor):
            raise RunError(
                f"{file}: {name} is a {type(value).__name__}, not a tensor",
                hint=f"The tensors of a model must be under {', '.join(CONTAINERS)}, or at the top level of the file.",
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise RunError(f"{file}: {name} is sparse or quantised; this is not a published checkpoint")
        tensors[str(name)] = value.detach()
    numbers = {key: rest[key] for key in KEPT if type(rest.get(key)) in (int, float)}
    return Checkpoint(tensors, container, numbers, [key for key in rest if key not in numbers])


def write_checkpoint(file: Path, checkpoint: Checkpoint) -> None:
    """Writes the tensors into `file`: as safetensors if it has this suffix, else with `torch.save` and `kept`.

    Raises:
        OSError, RuntimeError, SafetensorError: It cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file, {"format": "pt"})
        return
    if checkpoint.container is None:
        torch.save(tensors, file)
    else:
        torch.save({checkpoint.container: tensors, **checkpoint.kept}, file)
