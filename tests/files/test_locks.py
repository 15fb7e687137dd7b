"""One process writes to an output at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError
from emrrg_cli.files.locks import locked

# Holds the lock of a place until its stdin ends.
HOLDING = """
import sys
from collections.abc import Iterator
from pathlib import Path
from emrrg_cli.files.locks import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@contextlib.contextmanager
def _holder(output: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("name", ["out", "link", "deep/er/out"])
def test_a_second_process_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    held = "out" if name == "link" else name
    with _holder(tmp_path / held) as holder:
        with pytest.raises(RunError, match=f"another process is writing to .*{name} .process {holder.pid} on "):
            locked(tmp_path / name).__enter__()
        with locked(tmp_path / "other"):
            pass


def test_a_lock_ends_with_its_process_and_leaves_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _holder(out) as holder:
        holder.kill()
        holder.wait()
        assert _names(tmp_path) == [".out.lock"]  # left behind by the kill
        for _ in range(2):
            with locked(out), pytest.raises(RunError, match="another process"):
                locked(out).__enter__()
            assert _names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Loading processes may outlive a killed run by some seconds; `--resume` must not wait for them."""
    fork = "    import os, time\n    if os.fork():\n        time.sleep(600)\n    print("
    command = [sys.executable, "-c", HOLDING.replace("    print(", fork), str(tmp_path / "out")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"  # the child says so
        os.kill(holder.pid, signal.SIGKILL)
        os.waitpid(holder.pid, 0)
        with locked(tmp_path / "out"):
            pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_a_directory_in_a_read_only_one_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with locked(out):
        assert _names(out) == [".lock"]
    assert _names(out) == []
