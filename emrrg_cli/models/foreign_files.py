"""Checks model files from other sources before torch, safetensors or transformers read them.

The checks never wait for a pipe or a device. Reading an accepted file takes bounded time and memory.
"""

from __future__ import annotations

import errno
import json
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emrrg_cli.files.records import open_regular, read_bounded

_LARGEST_HEADER = 8 * 2**20  # bytes: some 80,000 tensors
_LARGEST_TEXT = 256 * 2**20  # bytes: the tokenizer of a large vocabulary has 35 MB
_TEXTS = (".json", ".jsonl", ".txt", ".jinja", ".model", ".tiktoken")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_local_experts", "num_experts")
_MOST_LAYERS = 2000


def check_header(file: Path) -> None:
    """Checks that a safetensors file is a regular file and that its header is small enough to be read quickly.

    Raises:
        OSError: `strerror` gives the reason.
    """
    with open_regular(file) as opened:
        if (size := int.from_bytes(opened.read(8), "little")) > _LARGEST_HEADER:
            raise OSError(errno.EFBIG, f"its header claims {size:,} bytes", str(file))


def check_archive(file: Path) -> None:
    """Checks that a file of `torch.save` is a regular file without compressed parts.

    torch stores tensors uncompressed, but also reads compressed ones: a file of 4 MB could fill 4 GB of memory.

    Raises:
        OSError: `strerror` gives the reason.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:  # a damaged list of members raises errors of many types
        raise OSError(errno.EINVAL, f"its list of members is damaged: {error}", str(file)) from error
    compressed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise OSError(errno.EINVAL, f"{compressed[0]} in it is compressed, which torch.save never does", str(file))


def check_model_directory(source: str | Path) -> None:
    """Checks the files of an LLM, text encoder or tokenizer in a directory. A hub name is not checked.

    Raises:
        OSError, ValueError: A file is not regular, too large or compressed, names files outside the directory, or has
            thousands of layers. The message names the file.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.is_dir() or not file.exists():
            continue
        if not file.is_file():
            raise ValueError(f"{file.name} is not a regular file")
        if file.suffix in _TEXTS and file.stat().st_size > _LARGEST_TEXT:
            raise ValueError(f"{file.name} is larger than {_LARGEST_TEXT >> 20} MB")
        if file.suffix == ".safetensors":
            check_header(file)
        if file.suffix in (".bin", ".pt", ".pth"):
            check_archive(file)
        if file.name == "config.json":
            _check_sizes(_json(file))
        if file.name == "adapter_config.json":
            raise ValueError("it contains adapters of PEFT, not a complete model: merge them into the model first")
        if file.name.endswith(".index.json"):
            _check_names(file.name, _json(file))


def _json(file: Path) -> Any:
    try:
        return json.loads(read_bounded(file, _LARGEST_TEXT))
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error


def _check_sizes(config: Any) -> None:
    # Models with a vision tower have their sizes one level deeper.
    parts = [config, *config.values()] if isinstance(config, Mapping) else []
    for part in parts:
        for name in _LAYERS if isinstance(part, Mapping) else ():
            if isinstance(part.get(name), int | float) and part[name] > _MOST_LAYERS:
                raise ValueError(f"config.json: {name} is {part[name]:,}, more than {_MOST_LAYERS:,}")
        for name in part if isinstance(part, Mapping) else ():
            # transformers downloads and runs code of the hub for `owner/name`, also where the caller names another.
            if "attn_implementation" in str(name) and "/" in str(part[name]):
                raise ValueError(f"config.json: {name} names code to download, which emrrg does not run")


def _check_names(name: str, index: Any) -> None:
    names = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(names, Mapping) or any(str(file) != Path(str(file)).name for file in names.values()):
        raise ValueError(f"{name} names files outside its directory, or none")
