"""Checks an output path before something is written: links, special files, permissions, removed directories."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.write_errors import name_write_errors


def real_path(path: Path) -> Path:
    """Resolve all links in a path. Use it for reading, and for places that the user names."""
    return Path(os.path.realpath(path))


def writable_path(path: Path) -> Path:
    """Resolve all links in a path, and check that the program may write there.

    Raises:
        RunError: A link leads out of its directory, or what is there is neither a regular file nor a directory.
    """
    real = real_path(path)
    hint = "Remove it, or choose another --output."
    if path.is_symlink() and real.parent != real_path(path.parent):
        raise RunError(f"{path} is a link to {printable(str(real))}: nothing is written through such links", hint=hint)
    with name_write_errors(path), contextlib.suppress(FileNotFoundError):
        if not (stat.S_ISREG(mode := real.stat().st_mode) or stat.S_ISDIR(mode)):
            raise RunError(f"{path} is not a regular file, so it is not replaced", hint=hint)
    return real


def check_writable(directory: Path) -> None:
    """Check, before hours of work, that a directory can be created (if needed) and written to. Creates nothing.

    Raises:
        UsageError: It, or a directory above it, is a file.
        RunError: It, or the directory to create it in, is read-only.
    """
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"{directory} cannot be written: {nearest} is a file", hint="Choose another output.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write {directory}: {nearest} is read-only for you", hint="Choose another output.")


def refuse_links(directory: Path, patterns: Sequence[str] | None = None) -> None:
    """Check, before anything is written to an output directory, that no link in it leads out of it.

    Args:
        patterns: Glob patterns of the entries to check, if the user may keep other files beside them. None: all
            entries, at any depth.

    Raises:
        RunError: A link in it points elsewhere, or something in it is neither a file nor a directory (a device, ...).
    """
    root = real_path(directory)
    everything = (Path(folder) / name for folder, *inside in os.walk(root) for names in inside for name in names)
    chosen = (entry for pattern in patterns or () for entry in root.glob(pattern))
    for entry in everything if patterns is None else chosen:
        if entry.is_symlink():
            if not real_path(entry).is_relative_to(root):
                raise RunError(
                    f"{printable(str(entry))} is a link to {printable(os.readlink(entry))}: "  # noqa: PTH115
                    "nothing is written into a directory with such links",
                    hint="Put the file itself in its place, or choose another --output.",
                )
        elif not (stat.S_ISREG(mode := entry.lstat().st_mode) or stat.S_ISDIR(mode)):
            raise RunError(
                f"{printable(str(entry))} is not a regular file: nothing is written into its directory",
                hint="Remove it, or choose another --output.",
            )


def directory_guard(directory: Path) -> Callable[[], None]:
    """Make a function that checks that an output directory still exists and is the same one. Call it before each write.

    Without it, the first write after somebody removed the directory would make a new one without the earlier files.

    Returns:
        A function that raises RunError when the directory was removed, or when another one is in its place.
    """
    status = directory.stat()

    def check() -> None:
        try:
            now = directory.stat()
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
            raise RunError(
                f"{directory} was {'removed' if now is None else 'replaced'} while the program wrote to it",
                hint="What was in it is lost. Start again, with another --output if something cleans this place up.",
            )

    return check
