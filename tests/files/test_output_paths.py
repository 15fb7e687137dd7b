"""Nothing is written through links, over special files, or into a directory that was replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_directory, atomic_write_text
from emrrg_cli.files.output_paths import directory_guard, refuse_links
from emrrg_cli.files.records import append_jsonl


def _write(final: Path, text: str) -> None:
    with atomic_directory(final) as directory:
        (directory / "content").write_text(text)


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
        atomic_write_text(path, "new")
        assert path.read_text() == "new"
        return
    for write in (atomic_write_text, lambda path, text: append_jsonl(path, {"text": text}), _write):
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
    refuse_links(run)
    (tmp_path / "link").symlink_to(run)
    refuse_links(tmp_path / "link")
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
        refuse_links(run)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("becomes", ["removed", "replaced", "a file"])
def test_an_output_that_is_removed_is_noticed(tmp_path: Path, becomes: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check = directory_guard(out)
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
