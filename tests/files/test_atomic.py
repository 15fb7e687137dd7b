"""Files and directories are whole or not there, also when the process dies between two steps."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_text,
    read_directory,
    recover_directory,
    whole_directory,
)
from emrrg_cli.files.temporary import host_name
from emrrg_cli.files.write_errors import writing

# Replaces `final` in a process that dies, without any clean-up, just before its n-th rename (0: inside the block).
DYING = """
import os, shutil, sys
from pathlib import Path
from emrrg_cli.files.atomic import atomic_directory

final, dies_at = Path(sys.argv[1]), int(sys.argv[2])
renames = 0
rename = os.replace

def replace(source, target):
    global renames
    renames += 1
    if renames == dies_at:
        os._exit(9)
    rename(source, target)

os.replace = replace
shutil.rmtree = lambda *a, **k: os._exit(9)
with atomic_directory(final) as directory:
    (directory / "content").write_text("new")
    if dies_at == 0:
        os._exit(9)
"""


# Replaces `final` until stdin ends, all of its files saying the same each time. The pause is longer than a tick of the
# system's clock, which tells two versions apart that have the same number on the disk.
WRITING = """
import itertools, os, select, sys
from pathlib import Path
from emrrg_cli.files.atomic import atomic_directory

os.fsync = lambda handle: None
for version in itertools.count():
    with atomic_directory(Path(sys.argv[1])) as directory:
        for name in "abcdefgh":
            (directory / name).write_text(str(version))
    if select.select([sys.stdin], [], [], 0.02)[0]:
        break
"""


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def _write(final: Path, text: str) -> None:
    with atomic_directory(final) as directory:
        (directory / "content").write_text(text)


def _content(place: Path) -> str:
    return (place / "content").read_text()


def test_text_and_bytes_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    atomic_write_text(path, "caf\u00e9\n")
    atomic_write_text(path, "second\n")
    assert path.read_bytes() == b"second\n"
    atomic_write_bytes(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert _names(path.parent) == ["b.txt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "file", "x")
        _write(tmp_path / "directory", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0o750


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store", target_is_directory=True)
    _write(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "store" / "content").read_text() == "x"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*file: No space left"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "run"
    with atomic_directory(final) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "only-in-old").write_text("x")
        assert not final.exists()
    _write(final, "new")
    assert _names(tmp_path) == ["run"]
    assert _names(final) == ["content"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_directory(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "run"
    _write(final, "old")

    def fail() -> None:
        with atomic_directory(final) as directory:
            (directory / "content").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (final / "content").read_text() == "old"
    assert _names(tmp_path) == ["run"]


def test_a_failed_second_rename_brings_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "run"
    _write(final, "old")
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunError, match="Input/output error"):
        _write(final, "new")
    assert (final / "content").read_text() == "old"
    assert _names(tmp_path) == ["run"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="is a file"), atomic_directory(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "x"


@pytest.mark.skipif(os.name != "posix", reason="asks the system which processes are alive")
@pytest.mark.parametrize(
    ("dies_at", "survives"),
    [(0, "old"), (1, "old"), (2, "old"), (3, "new")],
    ids=["in the block", "before the first rename", "between the renames", "before the removal"],
)
def test_a_crash_at_any_step_loses_no_whole_directory(tmp_path: Path, dies_at: int, survives: str) -> None:
    final = tmp_path / "run"
    _write(final, "old")
    died = subprocess.run([sys.executable, "-c", DYING, str(final), str(dies_at)])
    assert died.returncode == 9
    assert len(_names(tmp_path)) == 2  # something was left behind
    recover_directory(final)
    assert (final / "content").read_text() == survives
    _write(final, "third")
    assert (final / "content").read_text() == "third"
    assert _names(tmp_path) == ["run"]


def test_a_users_folder_named_previous_is_not_changed(tmp_path: Path) -> None:
    mine = tmp_path / "run.previous"
    mine.mkdir()
    (mine / "precious").write_text("x")
    for text in ("first", "second"):
        _write(tmp_path / "run", text)
    recover_directory(tmp_path / "run")
    assert (mine / "precious").read_text() == "x"
    assert whole_directory(tmp_path / "other") == tmp_path / "other"


def test_a_reader_finds_a_directory_that_is_being_replaced(tmp_path: Path) -> None:
    final, previous = tmp_path / "run", tmp_path / "run.previous-emrrg"
    _write(previous, "old")
    assert whole_directory(final) == previous
    assert read_directory(final, _content) == "old"
    assert _names(tmp_path) == ["run.previous-emrrg"]
    final.mkdir()  # the new one has come, the old one is about to go
    (final / "content").write_text("new")
    assert whole_directory(final) == final
    assert read_directory(final, _content) == "new"
    assert _names(tmp_path) == ["run", "run.previous-emrrg"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_directory_replaced_while_it_is_read_is_read_again(tmp_path: Path, fails: bool) -> None:
    final = tmp_path / "run"
    _write(final, "old")
    reads = 0

    def read(place: Path) -> str:
        nonlocal reads
        reads += 1
        text = _content(place)
        if reads == 1:
            _write(final, "new")
            if fails:
                raise FileNotFoundError(place / "another")
        return text

    assert read_directory(final, read) == "new"
    assert reads == 2


def test_failed_reads_are_not_repeated_and_retries_end(tmp_path: Path) -> None:
    places: list[Path] = []

    def fail(place: Path) -> None:
        places.append(place)
        raise ValueError(place)

    with pytest.raises(ValueError, match="run"):
        read_directory(tmp_path / "run", fail)
    assert places == [tmp_path / "run"]
    with pytest.raises(RunError, match="was replaced each of the 10 times that it was read"):
        read_directory(tmp_path / "run", lambda place: _write(tmp_path / "run", "newer"))


@pytest.mark.skipif(os.name != "posix", reason="waits for stdin as for a socket")
def test_readers_beside_a_writer_never_see_two_versions(tmp_path: Path) -> None:
    final = tmp_path / "run"
    seen: set[str] = set()
    end = time.monotonic() + 120
    with subprocess.Popen([sys.executable, "-c", WRITING, str(final)], stdin=subprocess.PIPE) as writer:
        while len(seen) < 50 and writer.poll() is None and time.monotonic() < end:
            if whole_directory(final).exists():
                with contextlib.suppress(RunError):  # a busy machine may stop this reader in each of its attempts
                    texts = read_directory(final, lambda place: [(place / name).read_text() for name in "abcdefgh"])
                    assert len(set(texts)) == 1
                    seen.add(texts[0])
    assert writer.returncode == 0  # it ends when its stdin does
    assert len(seen) == 50


def test_only_files_of_dead_local_processes_are_removed(tmp_path: Path) -> None:
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    host = host_name()
    gone = f"file.tmp-{host}-{died.pid}-00"
    kept = [f"file.tmp-{host}-{os.getpid()}-00", f"file.tmp-elsewhere-{died.pid}-00", f"other.tmp-{host}-{died.pid}-00"]
    for name in [gone, *kept, "file.tmp-mine"]:
        (tmp_path / name).write_text("x")
    atomic_write_text(tmp_path / "file", "x")
    assert _names(tmp_path) == sorted([*kept, "file.tmp-mine", "file"])


def test_a_full_disk_is_reported_with_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*curve.png: No space left on device") as caught:
        atomic_write_bytes(tmp_path / "curve.png", bytes(2**20))
    assert str(caught.value.hint).startswith("It needs about 1.0 MiB; ")


def test_a_failed_write_names_the_space_only_if_it_is_full(tmp_path: Path) -> None:
    for error, told, hinted in (
        (OSError(30, "Read-only file system", "x"), "model: Read-only file system", False),
        (OSError(28, "No space left on device", "x"), "model: No space left on device", True),
        (RuntimeError("[enforce fail at inline_container.cc:603]"), "model: the file is cut off", True),
    ):
        with pytest.raises(RunError, match=told) as caught, writing(tmp_path / "model", 10):
            raise error
        assert ("are free there" in str(caught.value.hint)) is hinted
