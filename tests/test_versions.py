"""A checkout that is not installed works as an installed package does."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from emrrg_cli.app import main
from emrrg_cli.versions import installed_versions


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def hidden(package: str) -> str:
        if package == "emrrg":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", hidden)


@pytest.mark.usefixtures("not_installed")
def test_a_missing_package_has_no_version() -> None:
    assert installed_versions(["emrrg", "torch"]) == {"emrrg": None, "torch": metadata.version("torch")}


@pytest.mark.usefixtures("not_installed")
def test_the_version_of_a_bare_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert "not installed" in capsys.readouterr().out


@pytest.mark.usefixtures("not_installed")
def test_a_bare_checkout_preprocesses(tiny_r2gen: Path, tmp_path: Path) -> None:
    assert main(["preprocess", "r2gen", str(tiny_r2gen), str(tmp_path / "out"), "--workers", "1"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["emrrg"] is None
    assert manifest["libraries"]["datasets"] == metadata.version("datasets")
