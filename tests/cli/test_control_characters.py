"""Control characters of file names reach no terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emrrg_cli.app import main

NAME = "a\x1b[31m\x07b\x9b2J"


@pytest.mark.skipif(os.name == "nt", reason="names without control characters")
@pytest.mark.parametrize(
    "arguments",
    [
        ["preprocess", "folder", "{root}/none", "{root}/out"],
        ["preprocess", "r2gen", "{root}", "{root}/out"],
        ["preprocess", "folder", "{root}/films", "{root}/out", "--table", "{root}/t.csv"],
        ["preprocess", "folder", "{root}/films", "{root}/out"],
        ["data", "show", "{root}"],
    ],
)
def test_errors_show_control_characters_as_escapes(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / NAME
    (root / "films" / NAME).mkdir(parents=True)
    (root / "films" / NAME / f"{NAME}.png").write_bytes(b"no image")
    (root / "t.csv").write_text(f"image\n{NAME}.png\n")
    assert main([argument.format(root=root) for argument in arguments]) in (1, 2)
    printed = capfd.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & {*printed.out, *printed.err}
    assert r"a\x1b[31m\x07b\x9b2J" in printed.err
