"""Error messages for failed writes: the file, and on a full disk the space it needs and the space left."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from emrrg_cli.errors import RunError


@contextlib.contextmanager
def name_write_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a system error into one that names the file that could not be written, and on a full disk the space."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {reason(error)}", hint=space_hint(error, path, needed)) from error


def reason(error: OSError) -> str:
    """The system's message of an error, without the words that pyarrow puts around it."""
    return os.strerror(error.errno) if error.errno else str(error)


def space_hint(error: OSError, path: Path, needed: int | None = None) -> str | None:
    """The space that a file needs and the space that is left, if an error says that the disk is full."""
    if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return None
    return _free_space(next(above for above in path.absolute().parents if above.exists()), needed)


@contextlib.contextmanager
def writing(place: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the errors that torch and safetensors raise while they write tensors into one that names the place.

    Args:
        place: The file or directory that is written in the block.
        needed: Expected size in bytes, if known. A disk without that much space is refused before the block runs.

    Raises:
        RunError: The write failed. The message names the place, and the space unless the error has another cause.
    """
    from safetensors import SafetensorError

    nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
    if needed is not None and needed > shutil.disk_usage(nearest).free:
        raise RunError(f"cannot write {place}: the disk is full", hint=_free_space(nearest, needed))
    try:
        with name_write_errors(place, needed):
            yield
    except (RuntimeError, SafetensorError) as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        if "inline_container" in words:  # torch.save only notices that its file is too short
            words = "the file is cut off, most often because the disk is full"
        raise RunError(f"cannot write {place}: {words}", hint=_free_space(nearest, needed)) from error


def _free_space(place: Path, needed: int | None) -> str:
    """A hint with the space that is needed (if known) and the space that is free."""
    required = "" if needed is None else f"It needs about {_size(needed, math.ceil)}; "
    return f"{required}{_size(shutil.disk_usage(place).free, math.floor)} are free there."


def _size(count: int, rounded: Callable[[float], int]) -> str:
    """A number of bytes in MiB, or in KiB if it is less than 1 MiB."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{rounded(count / 2**10)} KiB"
