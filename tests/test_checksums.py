"""SHA-256 of what was written, checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emrrg_cli.checksums import CHECKSUMS, check_directory, check_file, check_run, write_checksums
from emrrg_cli.errors import RunError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "run" / "inner").mkdir(parents=True)
    (tmp_path / "run" / "a").write_text("a")
    (tmp_path / "run" / "inner" / "b").write_text("b")
    write_checksums(tmp_path / "run")
    return tmp_path / "run"


def test_unchanged_files_pass(written: Path) -> None:
    assert check_directory(written)
    assert check_file(written / "inner" / "b")
    assert set(json.loads((written / CHECKSUMS).read_text())) == {"a", "inner/b"}
    (written / "added later").touch()
    assert check_directory(written)
    assert not check_file(written / "added later")


@pytest.mark.parametrize("name", ["a", "inner/b"])
def test_changed_and_missing_files_are_named(written: Path, name: str) -> None:
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


def test_only_the_given_names_are_listed(written: Path) -> None:
    write_checksums(written, ["a", "none"])
    assert set(json.loads((written / CHECKSUMS).read_text())) == {"a"}


@pytest.mark.parametrize("lost", ["", "model", "both", "none"])
def test_a_missing_list_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("a")
    (tmp_path / "static").write_text("b")
    write_checksums(model)
    write_checksums(tmp_path, ["static"])
    for place in (tmp_path, model) if lost == "both" else [tmp_path / lost] if lost != "none" else []:
        (place / CHECKSUMS).unlink()
    check_run(tmp_path, model)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == (lost != "none")
    assert (f"{tmp_path / lost / CHECKSUMS} is missing" in told) == (lost in ("", "model"))


def test_one_list_for_all_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("a")
    write_checksums(tmp_path)
    check_run(tmp_path, tmp_path / "model")
    assert capsys.readouterr().err == ""
