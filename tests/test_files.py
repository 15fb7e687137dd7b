"""Whole files or none: also when the process dies between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
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


# Replaces `final` a hundred times, all of its files saying the same each time.
WRITING = """
import os, sys, time
from pathlib import Path
from emrrg_cli import files

os.fsync = lambda handle: None
for version in range(100):
    with files.atomic_directory(Path(sys.argv[1])) as directory:
        for name in "abcdefgh":
            (directory / name).write_text(str(version))
    time.sleep(0.003)
"""


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def _write(final: Path, text: str) -> None:
    with files.atomic_directory(final) as directory:
        (directory / "content").write_text(text)


def _content(place: Path) -> str:
    return (place / "content").read_text()


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


def test_a_folder_that_somebody_called_previous_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "run.previous"
    mine.mkdir()
    (mine / "precious").write_text("x")
    for text in ("first", "second"):
        _write(tmp_path / "run", text)
    files.recover_directory(tmp_path / "run")
    assert (mine / "precious").read_text() == "x"
    assert files.whole_directory(tmp_path / "other") == tmp_path / "other"


def test_a_reader_finds_a_directory_that_is_being_replaced(tmp_path: Path) -> None:
    final, previous = tmp_path / "run", tmp_path / "run.previous-emrrg"
    _write(previous, "old")
    assert files.whole_directory(final) == previous
    assert files.read_directory(final, _content) == "old"
    assert _names(tmp_path) == ["run.previous-emrrg"]
    final.mkdir()  # the new one has come, the old one is about to go
    (final / "content").write_text("new")
    assert files.whole_directory(final) == final
    assert files.read_directory(final, _content) == "new"
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

    assert files.read_directory(final, read) == "new"
    assert reads == 2


def test_failed_reads_are_not_repeated_and_endless_ones_end(tmp_path: Path) -> None:
    places: list[Path] = []

    def fail(place: Path) -> None:
        places.append(place)
        raise ValueError(place)

    with pytest.raises(ValueError, match="run"):
        files.read_directory(tmp_path / "run", fail)
    assert places == [tmp_path / "run"]
    with pytest.raises(RunError, match="was replaced each of the 10 times that it was read"):
        files.read_directory(tmp_path / "run", lambda place: _write(tmp_path / "run", "newer"))


def test_readers_beside_a_writer_never_see_two_versions(tmp_path: Path) -> None:
    final = tmp_path / "run"
    writer = subprocess.Popen([sys.executable, "-c", WRITING, str(final)])
    seen = set()
    try:
        while writer.poll() is None:
            if files.whole_directory(final).exists():
                texts = files.read_directory(final, lambda place: [(place / name).read_text() for name in "abcdefgh"])
                assert len(set(texts)) == 1
                seen.add(texts[0])
    finally:
        writer.kill()
        writer.wait()
    assert writer.returncode == 0
    assert len(seen) > 3


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


# Holds the lock of a place until its stdin ends.
HOLDING = """
import sys
from collections.abc import Iterator
from pathlib import Path
from emrrg_cli import files

with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


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
            files.locked(tmp_path / name).__enter__()
        with files.locked(tmp_path / "other"):
            pass


def test_a_lock_ends_with_its_process_and_leaves_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _holder(out) as holder:
        holder.kill()
        holder.wait()
        assert _names(tmp_path) == [".out.lock"]  # left behind by the kill
        for _ in range(2):
            with files.locked(out), pytest.raises(RunError, match="another process"):
                files.locked(out).__enter__()
            assert _names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Loading processes may outlive a killed run by some seconds; `--resume` must not wait for them."""
    fork = "    import os, time\n    if os.fork():\n        time.sleep(60)\n    print("
    command = [sys.executable, "-c", HOLDING.replace("    print(", fork), str(tmp_path / "out")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"  # the child says so
        os.kill(holder.pid, signal.SIGKILL)
        os.waitpid(holder.pid, 0)
        with files.locked(tmp_path / "out"):
            pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_a_directory_in_a_read_only_one_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with files.locked(out):
        assert _names(out) == [".lock"]
    assert _names(out) == []


@pytest.mark.parametrize("kind", ["file", "device", "pipe", "link out", "link to a device"])
def test_only_regular_files_in_place_are_replaced(tmp_path: Path, kind: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_text("kept")
    path = run / "curve.png"
    match kind:
        case "file":
            path.write_text("old")
        case "device":
            path = Path("/dev/null")
        case "pipe":
            os.mkfifo(path)
        case "link out":
            path.symlink_to(outside)
        case "link to a device":
            path.symlink_to("/dev/null")
    if kind == "file":
        files.atomic_write_text(path, "new")
        assert path.read_text() == "new"
        return
    for write in (files.atomic_write_text, lambda path, text: files.append_jsonl(path, {"text": text}), _write):
        with pytest.raises(RunError, match=r"not a regular file|is a link to"):
            write(path, "new")
    assert outside.read_text() == "kept"
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("entry", ["a link out", "a device", "a pipe", "a deep link", "a link to nothing"])
def test_a_directory_with_links_out_is_refused(tmp_path: Path, entry: str) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "inside").symlink_to("model")
    (run / "model" / "up").symlink_to(run)
    files.refuse_links(run)
    (tmp_path / "link").symlink_to(run)
    files.refuse_links(tmp_path / "link")
    match entry:
        case "a link out":
            (run / "bad").symlink_to(tmp_path)
        case "a device":
            (run / "bad").symlink_to("/dev/zero")
        case "a pipe":
            os.mkfifo(run / "bad")
        case "a deep link":
            (run / "model" / "bad").symlink_to("../../elsewhere")
        case "a link to nothing":
            (run / "bad").symlink_to("/nowhere\x1b[31m")
    with pytest.raises(RunError, match=r"bad is (a link to|not a regular file)") as caught:
        files.refuse_links(run)
    assert "\x1b" not in str(caught.value)


def test_reads_are_bounded_and_never_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"x" * 101)
    for name in ("pipe", "zero", "large", "."):
        with pytest.raises(OSError, match=r"not a regular file|larger than|directory"):
            files.read_bounded(tmp_path / name, 100)
        if name != "large":
            with pytest.raises(UsageError, match="cannot read"):
                files.read_jsonl(tmp_path / name)
            with pytest.raises(RunError, match="cannot be read"):
                files.read_record(tmp_path / name, "a record", "")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(RunError, match="cannot be read"):
        files.read_record(tmp_path / "deep", "a record", "")


@pytest.mark.parametrize("becomes", ["removed", "replaced", "a file"])
def test_an_output_that_is_removed_is_noticed(tmp_path: Path, becomes: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check = files.directory_guard(out)
    (out / "file").touch()
    check()
    out.rename(tmp_path / "moved")
    match becomes:
        case "replaced":
            out.mkdir()
        case "a file":
            out.touch()
    with pytest.raises(RunError, match=r"out was (removed|replaced) while the program wrote to it"):
        check()


def test_a_full_disk_is_reported_with_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*curve.png: No space left on device") as caught:
        files.atomic_write_bytes(tmp_path / "curve.png", bytes(2**20))
    assert str(caught.value.hint).startswith("It needs about 1.0 MiB; ")
