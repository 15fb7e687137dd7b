from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest

from emrrg_cli import diagnosis
from emrrg_cli.app import main


def test_doctor_json_has_every_topic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["versions", "devices", "scan", "java", "disk", "hub"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"]
    assert found["devices"]["cpu_cores"] >= 1
    assert found["scan"]["engines"]["reference"] == "ok"
    assert found["scan"]["engines"][found["scan"]["chosen"]] == "ok"
    assert found["disk"]["working_directory"]["free_gib"] > 0


def test_doctor_text_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    topics = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert topics == ["versions", "devices", "scan", "java", "disk", "hub"]
    assert "(selected)" in text
    assert "CPU cores" in text


def test_a_broken_part_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[str, object]:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(diagnosis, "devices", broken)
    monkeypatch.setattr(diagnosis, "scan", broken)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "devices   cannot be checked: OSError: libcudart.so" in text
    assert "free at" in text


def test_missing_packages_are_named_except_optional_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "PACKAGES", ("emrrg", "no-such-package", "mamba-ssm"))
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "emrrg" else _missing(name))
    python = platform.python_version()
    assert diagnosis.versions() == {"python": python, "emrrg": "1.0", "no-such-package": None, "mamba-ssm": None}
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["no-such-package", "not", "installed"] in lines
    assert ["mamba-ssm", "not", "installed", "(optional)"] in lines


def _missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_java_is_reported_present_absent_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert diagnosis.java() == {"path": None, "version": None}
    assert main(["doctor"]) == 0
    assert "java      not found: METEOR is skipped" in capsys.readouterr().out

    launcher = tmp_path / "java"
    for script, expected in [
        ("echo 'openjdk version \"21\"' >&2", {"path": str(launcher), "version": 'openjdk version "21"'}),
        ("echo 'no runtime' >&2; exit 1", {"path": str(launcher), "version": None, "problem": "no runtime"}),
    ]:
        launcher.write_text(f"#!/bin/sh\n{script}\n")
        launcher.chmod(0o755)
        assert diagnosis.java() == expected
    assert main(["doctor"]) == 0
    assert f"{launcher} does not run, METEOR is skipped: no runtime" in capsys.readouterr().out


def test_free_disk_is_known_for_a_cache_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert diagnosis._free_gib(tmp_path / "not" / "yet" / "there") > 0
    assert diagnosis._free_gib(Path("neither/this")) > 0
