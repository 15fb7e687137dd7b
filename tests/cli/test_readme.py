"""The README stays true: its commands run on small data, and the others at least parse."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli import app as app_module
from emrrg_cli.app import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- not run by the tests: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S)
BLOCKS = [(match["reason"], match["language"], match["code"]) for match in BLOCK.finditer(README)]
TUTORIAL = (ROOT / "CONTRIBUTING.md").read_text().split("## Tutorial", 1)[1].split("\n## ", 1)[0]

# Put behind the commands that train, so that a step takes milliseconds.
ENCODER = "model.encoder={d_model: 16, depth: 4, d_state: 4, image_size: 128}"
LLM = "model.llm.scratch={hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, vocab_size: 320}"
TINY = {
    "pretrain": [ENCODER, "model.decoder_width=16"],
    "align": [ENCODER, "model.dim=16", "model.text.scratch.layers=1"],
    "finetune": [ENCODER, LLM, "train.select=loss"],
}
SHORT = ["train.max_steps=1", "train.trackers=[]"]


def commands(code: str) -> Iterator[list[str]]:
    """What follows `emrrg` in each of a block's commands."""
    for line in code.splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if "emrrg_cli" in words:  # torchrun -m emrrg_cli
                words = ["emrrg", *words[words.index("emrrg_cli") + 1 :]]
            if words[:1] == ["emrrg"]:
                yield words[1:]


def small(arguments: list[str]) -> list[str]:
    """The same command on little data, with a tiny model."""
    changed = [
        re.sub(r"^[0-9]{4,}$", "100", word) if before == "--count" else word for before, word in _pairs(arguments)
    ]
    if arguments[0] in TINY:
        changed += [*TINY[arguments[0]], *SHORT]
    if arguments[0] == "plan":
        changed += [ENCODER, LLM]
    if arguments[0] == "evaluate" and "--model" in arguments:
        changed += ["data.limit=2"]
    return changed


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    yield from zip(["", *words], words, strict=False)


def test_few_blocks_are_not_run_and_each_has_a_reason() -> None:
    assert [reason for reason, _, _ in BLOCKS if reason] == [
        "installs the package",
        "needs IU X-Ray and a hub",
        "needs IU X-Ray, a hub and several GPUs",
        "installs another tool, which downloads models",
    ]
    assert len(README.splitlines()) <= 200
    assert 'pip install ".[dev]" && python -m pytest' in README


@pytest.mark.parametrize(
    "arguments", [line for _, language, code in BLOCKS if language == "bash" for line in commands(code)], ids=" ".join
)
def test_every_command_parses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command: Any = app_module.get_command(app_module.app)
    words = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(arguments[0], words)
    assert context.params
    if arguments[0] in ("pretrain", "align", "finetune"):
        assert main(["recipe", "validate", context.params["recipe"], *(context.params["overrides"] or [])]) == 0


@pytest.mark.slow
def test_the_commands_and_the_python_run(
    tiny_r2gen: Path,
    tmp_path: Path,
    no_java: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images = sorted((tiny_r2gen / "images").rglob("*.png"))
    Path("films").mkdir()
    for name, image in zip(("a", "b", "c", "d"), images, strict=False):
        shutil.copy(image, f"films/{name}.png")
    for name in ("study", "frontal", "lateral"):
        shutil.copy(images[0], f"{name}.png")
    rows = "".join(f"{name}.png,The heart is normal.\n" for name in "abcd")
    Path("reports.csv").write_text(f"file,text\n{rows}")
    ran = 0
    for reason, language, code in BLOCKS:
        if reason:
            continue
        for line in commands(code) if language == "bash" else ():
            assert main(small(line)) == 0, (line, capsys.readouterr().err[-2000:])
            ran += 1
        if language == "python":
            names: dict[str, Any] = {}
            exec(compile(code, "README.md", "exec"), names)
            assert len(names["reports"]) == 2
            ran += 1
    assert ran >= 15
    for written in ("scores/scores.json", "reports/reports.csv", "more-reports/reports.jsonl", "mine.yaml"):
        assert Path(written).is_file(), written


@pytest.mark.slow
def test_the_tutorial_runs(
    tmp_path: Path, no_java: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in BLOCK.finditer(TUTORIAL):
        if block["language"] == "python":
            exec(compile(block["code"], "CONTRIBUTING.md", "exec"), {})
            for film in sorted(Path("raw").glob("*.png"))[20:]:  # the rest is counted as missing
                film.unlink()
        for line in commands(block["code"]) if block["language"] == "bash" else ():
            assert main(small(line)) == 0, (line, capsys.readouterr().err[-2000:])
            ran += 1
    assert ran == 11
    for written in ("runs/tutorial-scores/scores.json", "runs/tutorial-reports/reports.csv"):
        assert Path(written).is_file(), written


def test_the_pictures_of_the_readme_exist_and_are_small() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 150_000


def test_the_links_of_the_readme_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert {target for target in targets if not (ROOT / target).exists()} == set()
