"""SHA-256 of what was written, checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emrrg_cli.checksums import CHECKSUMS, check_directory, check_file, write_checksums
from emrrg_cli.errors import RunError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "run" / "inner").mkdir(parents=True)
    (tmp_path / "run" / "a").write_text("a")
    (tmp_path / "run" / "inner" / "b").write_text("b")
    write_checksums(tmp_path / "run")
    return tmp_path / "run"


def test_what_is_as_it_was_written_passes(written: Path) -> None:
    assert check_directory(written)
    assert check_file(written / "inner" / "b")
    assert set(json.loads((written / CHECKSUMS).read_text())) == {"a", "inner/b"}
    (written / "added later").touch()
    assert check_directory(written)
    assert not check_file(written / "added later")


@pytest.mark.parametrize("name", ["a", "inner/b"])
def test_what_differs_or_is_missing_is_named(written: Path, name: str) -> None:
    assert check_directory(written)
    (written / name).write_text("c")
    for check in (lambda: check_directory(written), lambda: check_file(written / name)):
        with pytest.raises(RunError, match=f"{name} is damaged"):
            check()
    (written / name).unlink()
    with pytest.raises(RunError, match=f"{name} is missing"):
        check_directory(written)


def test_without_checksums_nothing_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert not check_directory(tmp_path)
    assert not check_file(tmp_path / "a")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"../a": "b"}', '{"/etc/passwd": "b"}', '{"a": 1}', "[" * 100_000, "\x00"]
)
def test_a_broken_list_is_refused(written: Path, content: str) -> None:
    (written / CHECKSUMS).write_text(content)
    with pytest.raises(RunError, match=CHECKSUMS):
        check_directory(written)


def test_only_the_names_that_are_given_are_listed(written: Path) -> None:
    write_checksums(written, ["a", "none"])
    assert set(json.loads((written / CHECKSUMS).read_text())) == {"a"}
