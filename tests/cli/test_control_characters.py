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


@pytest.mark.skipif(os.name == "nt", reason="names without control characters")
@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe", "cp", "tiny/finetune", "{root}/b.yaml"],
        ["recipe", "validate", "{root}/a.yaml"],
        ["preprocess", "phantom", "{root}/out", "--count", "5", "--size", "64"],
        ["evaluate", "--predictions", "{root}/{name}.jsonl", "--output", "{root}/out"],
    ],
)
@pytest.mark.usefixtures("no_java")
def test_results_show_control_characters_as_escapes(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / NAME
    root.mkdir()
    (root / "a.yaml").write_text("stage: finetune\nextends: tiny/finetune\n")
    (root / f"{NAME}.jsonl").write_text('{"id": "s", "hypothesis": "clear", "reference": "clear"}\n')
    assert main([argument.format(root=root, name=NAME) for argument in arguments]) == 0
    printed = capfd.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & {*printed.out, *printed.err}
    assert r"a\x1b[31m\x07b\x9b2J" in printed.out + printed.err
