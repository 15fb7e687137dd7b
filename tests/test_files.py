"""Whole files or none: also when the process dies between two steps."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from emrrg_cli import files
from emrrg_cli.errors import RunError, UsageError

# Replaces `final` in a process that dies, without any clean-up, just before its n-th rename (0: inside the block).
DYING = """
import os, sys
from pathlib import Path
from emrrg_cli import files

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
files.shutil.rmtree = lambda *a, **k: os._exit(9)
with files.atomic_directory(final) as directory:
    (directory / "content").write_text("new")
    if dies_at == 0:
        os._exit(9)
"""


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def _write(final: Path, text: str) -> None:
    with files.atomic_directory(final) as directory:
        (directory / "content").write_text(text)


def test_text_and_bytes_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    files.atomic_write_text(path, "caf\u00e9\n")
    files.atomic_write_text(path, "second\n")
    assert path.read_bytes() == b"second\n"
    files.atomic_write_bytes(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert _names(path.parent) == ["b.txt"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.atomic_write_text(tmp_path / "file", "x")
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
    files.atomic_write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*file: No space left"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file"]


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    final = tmp_path / "run"
    with files.atomic_directory(final) as directory:
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
        with files.atomic_directory(final) as directory:
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
    with pytest.raises(RunError, match="is a file"), files.atomic_directory(tmp_path / "run"):
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
    files.recover_directory(final)
    assert (final / "content").read_text() == survives
    _write(final, "third")
    assert (final / "content").read_text() == "third"
    assert _names(tmp_path) == ["run"]


def test_only_leftovers_of_dead_processes_of_this_host_go(tmp_path: Path) -> None:
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    host = files._host()
    gone = f"file.tmp-{host}-{died.pid}-00"
    kept = [f"file.tmp-{host}-{os.getpid()}-00", f"file.tmp-elsewhere-{died.pid}-00", f"other.tmp-{host}-{died.pid}-00"]
    for name in [gone, *kept, "file.tmp-mine"]:
        (tmp_path / name).write_text("x")
    files.atomic_write_text(tmp_path / "file", "x")
    assert _names(tmp_path) == sorted([*kept, "file.tmp-mine", "file"])


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "log" / "history.jsonl"
    rows = [{"step": 1, "text": "caf\u00e9\n\u2028"}, {"step": 2, "loss": 0.1}]
    for row in rows:
        files.append_jsonl(path, row)
    assert files.read_jsonl(path) == rows


@pytest.mark.parametrize("cut", [b'{"step": 2, "te', b'{"step": 2, "text": "caf\xc3', b"{" + b"x" * 10_000])
def test_a_cut_last_line_is_left_out_and_then_removed(
    tmp_path: Path, cut: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}\n' + cut)
    assert files.read_jsonl(path) == [{"step": 1}]
    assert "cut off" in capsys.readouterr().err
    files.append_jsonl(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_last_row_without_line_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}')
    files.append_jsonl(path, {"step": 2})
    assert files.read_jsonl(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("text", "says"), [('{}\n{"a\n{}\n', ":2: not JSON"), ("{}\n3\n", ":2: expected an object")])
def test_a_broken_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        files.read_jsonl(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows\.jsonl"):
        files.read_jsonl(tmp_path / "rows.jsonl")
