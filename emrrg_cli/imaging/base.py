"""Shared code of the image readers: the error, opening a file, and the messages of C libraries."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from emrrg_cli.errors import RunError

MAX_PIXELS = 100_000_000


DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")  # never DICOM


NOT_AN_IMAGE = "not an image"


TRUNCATED = "truncated image"


_stderr_lock = threading.Lock()


class ImageError(RunError):
    """An image that cannot be read.

    Attributes:
        where: The path as it was given, or `<bytes>` or `<image>`.
        reason: One of a few fixed phrases, which can be counted.
        detail: Details about this file; may be empty.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        self.where, self.reason, self.detail = where, reason, detail
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str, str]]:
        # Raised in worker processes: an exception's default pickling would call `__init__` with the message alone.
        return type(self), (self.where, self.reason, self.detail)


def too_many_pixels(where: str, width: int, height: int, limit: int) -> ImageError:
    """Returns the error for an image with too many pixels."""
    return ImageError(where, "too many pixels", f"{width:,} x {height:,} = {width * height:,}, limit {limit:,}")


def short_message(error: Exception) -> str:
    """Returns the first informative line of an error, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The errors of pydicom have a heading and one line for each decoder.
    chosen = lines[1] if len(lines) > 1 and lines[0].endswith(":") else (lines or [""])[0]
    return chosen[:200] or type(error).__name__


def decoding_error(where: str, error: Exception) -> ImageError:
    """Returns the error for an exception of a decoder: truncated image if it says so, else broken image."""
    detail = short_message(error)
    return ImageError(where, TRUNCATED if "truncated" in detail.lower() else "broken image", detail)


@contextlib.contextmanager
def open_stream(path: Path, where: str) -> Iterator[tuple[IO[bytes], int]]:
    """Opens a regular file; yields the stream and its size in bytes.

    Raises:
        ImageError: missing image, image path is a folder, not a regular file, no permission to read, cannot be opened.
    """
    try:
        # Checked first: opening a pipe, or reading some system files, would never return.
        status = path.stat()
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            readable = os.access(path, os.R_OK | os.X_OK)
            raise ImageError(where, "image path is a folder" if readable else "no permission to read")
        if not stat.S_ISREG(mode) or (not status.st_size and path.resolve().is_relative_to("/proc")):
            raise ImageError(where, "not a regular file")
        stream = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(where, "missing image") from None
    except PermissionError:
        raise ImageError(where, "no permission to read") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(where, "cannot be opened", getattr(error, "strerror", None) or str(error)) from None
    with stream:
        try:
            yield stream, os.fstat(stream.fileno()).st_size
        except OSError as error:  # a network share that is not always reachable
            raise ImageError(where, "cannot be opened", error.strerror or str(error)) from None


def is_dicom(stream: IO[bytes]) -> bool:
    """Whether a stream begins with DICOM's preamble; afterwards the stream is at its start."""
    head = stream.read(132)
    stream.seek(0)
    return head[128:] == b"DICM"


@contextlib.contextmanager
def caught_stderr() -> Iterator[list[str]]:
    """Catches messages of C libraries about broken data; after the block, they are in the list."""
    messages: list[str] = []
    with _stderr_lock:
        try:
            saved = os.dup(2)
        except OSError:  # no stderr at all
            yield messages
            return
        with _scratch_file() as caught:
            try:
                os.dup2(caught.fileno(), 2)
                yield messages
            finally:
                os.dup2(saved, 2)
                os.close(saved)
                caught.seek(0)
                messages += caught.read(10_000).decode("utf-8", "replace").splitlines()


def _scratch_file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError:  # images must be readable on a full disk
        return Path(os.devnull).open("w+b")


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of a JPEG or PNG file, and its path relative to the root of the raw data."""

    name: str
    data: bytes
