"""JSON and JSON-lines files: whole, cut off, broken, too large."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files import records
from emrrg_cli.files.records import append_jsonl, iterate_jsonl, read_bounded, read_jsonl, read_record


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "log" / "history.jsonl"
    rows = [{"step": 1, "text": "caf\u00e9\n\u2028"}, {"step": 2, "loss": 0.1}]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows


@pytest.mark.parametrize("cut", [b'{"step": 2, "te', b'{"step": 2, "text": "caf\xc3', b"{" + b"x" * 10_000])
def test_an_incomplete_last_line_is_skipped_and_removed(
    tmp_path: Path, cut: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}\n' + cut)
    assert read_jsonl(path) == [{"step": 1}]
    assert "the last line is incomplete" in " ".join(capsys.readouterr().err.split())
    append_jsonl(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_last_row_without_line_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}')
    append_jsonl(path, {"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("text", "says"), [('{}\n{"a\n{}\n', ":2: not JSON"), ("{}\n3\n", ":2: expected an object")])
def test_a_broken_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_jsonl(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows\.jsonl"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_reads_are_bounded_and_never_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"x" * 101)
    for name in ("pipe", "zero", "large", "."):
        with pytest.raises(OSError, match=r"not a regular file|larger than|directory"):
            read_bounded(tmp_path / name, 100)
        if name != "large":
            with pytest.raises(UsageError, match="cannot read"):
                read_jsonl(tmp_path / name)
            with pytest.raises(RunError, match="cannot be read"):
                read_record(tmp_path / name, "a record", "")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(RunError, match="cannot be read"):
        read_record(tmp_path / "deep", "a record", "")


def test_rows_are_read_one_at_a_time_with_positions(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": "ü"}\n\n{"a": 2}\n{"a": cut')
    places = dict(iterate_jsonl(file))
    assert list(places.values()) == [{"a": "ü"}, {"a": 2}] == read_jsonl(file)
    begin = append_jsonl(file, {"a": 3})  # what was cut off goes
    assert dict(iterate_jsonl(file)) == places | {begin: {"a": 3}}
    for place, row in iterate_jsonl(file):
        with file.open("rb") as stream:
            stream.seek(place)
            assert json.loads(stream.readline()) == row


def test_a_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n' + "x" * 100)
    monkeypatch.setattr(records, "_LARGEST_LINE", 50)
    rows = iterate_jsonl(file)
    assert next(rows) == (0, {"a": 1})
    with pytest.raises(UsageError, match=r"rows\.jsonl:2: longer than 50 bytes"):
        next(rows)
    with pytest.raises(UsageError, match="cannot read"):
        list(iterate_jsonl(tmp_path))
