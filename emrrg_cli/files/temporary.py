"""Names temporary files, and removes temporary files of dead processes.

Temporary names are `NAME.tmp-HOST-PID-RANDOM`, beside the final name and so on the same file system. The next write to
the same name removes files that dead processes of this host left behind.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """A new temporary name beside `path`. Creates nothing."""
    return path.with_name(f"{path.name}.tmp-{host_name()}-{os.getpid()}-{secrets.token_hex(4)}")


def host_name() -> str:
    """The name of this computer, safe as a part of a file name."""
    return socket.gethostname().replace("/", "_") or "localhost"


def is_leftover(entry: Path) -> bool:
    """Whether a directory entry is a lock or a temporary file of this program, and therefore no content."""
    return entry.name == ".lock" or re.search(r"\.tmp-.+-\d+-[0-9a-f]{8}$", entry.name) is not None


def remove_leftovers(path: Path) -> None:
    """Remove temporary files and directories for `path` whose process ran on this host and has ended."""
    start = f"{path.name}.tmp-{host_name()}-"
    for entry in path.parent.iterdir():
        pid, dash, _ = entry.name.removeprefix(start).partition("-")
        if not (entry.name.startswith(start) and dash and pid.isdecimal()) or _is_alive(int(pid)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid() or os.name != "posix":  # on Windows, os.kill(pid, 0) terminates the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, OSError):
        return True
    return True
