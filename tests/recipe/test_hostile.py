"""Recipes of strangers: whatever is in one, it is one recipe error within seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emrrg_cli.app import main
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.library import recipe_names
from emrrg_cli.recipe.load import load_recipe

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
_HEAD = "stage: finetune\n"
HOSTILE = {
    "alias bomb": _HEAD + _BOMB,
    "deep list": _HEAD + "a: " + "[" * 100_000,
    "deep list that ends": _HEAD + "a: " + "[" * 5000 + "]" * 5000,
    "deep mapping": _HEAD + "\n".join(" " * i + "a:" for i in range(900)),
    "deep sequence": _HEAD + "a:\n" + "- " * 20_000,
    "many values": _HEAD + "a: [" + "1, " * 300_000 + "1]",
    "too large": _HEAD + "# " + "x" * 2**20,
    "lr": _HEAD + "train: {lr: 1e300}",
    "batch": _HEAD + "train: {batch_size: 1000000000000}",
    "width": _HEAD + "model: {encoder: {size: null, depth: 2, d_model: 10000000000000}}",
    "40 digits": _HEAD + "train: {epochs: 1234567890123456789012345678901234567890}",
    "10,000 digits": _HEAD + "train: {epochs: " + "9" * 10_000 + "}",
    "hexadecimal": _HEAD + "train: {epochs: 0x" + "f" * 10_000 + "}",
    "infinity": _HEAD + "train: {lr: 1e999}",
    "escape in a value": _HEAD + 'data: {root: "a\\x1b[31mb"}',
    "escape in a key": _HEAD + '"tr\\x1bain": 1',
    "null in a path": _HEAD + 'data: {root: "a\\0b"}',
    "surrogate": _HEAD + 'data: {root: "\\ud800"}',
    "long name": _HEAD + "data: {root: " + "x" * 300 + "}",
    "long path": _HEAD + "data: {root: " + "x/" * 3000 + "}",
    "long text": _HEAD + "model: {llm: {name: " + "x " * 20_000 + "}}",
    "itself": _HEAD + "data: &a {root: *a}",
    "control character": _HEAD + "a: \x07",
    "tag": _HEAD + "a: !!python/object/apply:os.system ['true']",
    "tag of another kind": _HEAD + "a: !!set {b}",
    "merge key": _HEAD + "<<: {a: 1}",
    "nobody": _HEAD + "extends: ~nouser/recipe.yaml",
    "long parent": _HEAD + "extends: " + "x" * 300 + ".yaml",
    "itself as parent": _HEAD + "extends: recipe.yaml",
    "wide sections": _HEAD + "train:\n" + "".join(f"  k{i}: 1\n" for i in range(9000)),
}


@contextmanager
def _within_seconds() -> Iterator[None]:
    """The block takes at most ten seconds of the processor: a busy machine changes nothing."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 10


def _check(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with _within_seconds():
        assert main(["finetune", str(path), "--print-recipe"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "\x1b" not in printed.err
    assert "unexpected" not in printed.err
    return printed.err


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(HOSTILE[name], encoding="utf-8")
    _check(tmp_path / "recipe.yaml", capsys)


@pytest.mark.skipif(os.name != "posix", reason="special files")
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "/proc/self/environ", "/proc/kcore", "pipe", "directory"])
def test_special_files_are_not_recipes(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    match target:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to(target)
    _check(path, capsys)


@pytest.mark.parametrize("ref", ["~nouser/a.yaml", "x" * 300 + ".yaml", "x/" * 3000 + "a.yaml", "a\nb\x1b[2J.yaml"])
def test_an_odd_path_is_one_error(ref: str, capsys: pytest.CaptureFixture[str]) -> None:
    _check(Path(ref), capsys)


@pytest.mark.parametrize(
    "override",
    ["a." * 500 + "b=1", "train.lr=" + "[" * 5000, "train.epochs=" + "9" * 50, "data.root=\x1b[31m", "train.lr=1e300"],
)
def test_a_hostile_override_is_one_error(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "tiny/finetune", override, "--print-recipe"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_limit_names_the_line_and_the_value(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stage: finetune\ntrain:\n  epochs: 3\n  lr: 1e9\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml:4: train\.lr: must be 1000 or less, got 1e\+09"):
        load_recipe(str(tmp_path / "recipe.yaml"))


_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=30), st.just("x" * 400)
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_fuzzed_recipes_give_settings_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Shipped recipes with keys replaced, added and dropped, or with bytes changed."""
    from emrrg_cli.recipe.library import find_recipe

    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    text = find_recipe(data.draw(st.sampled_from(recipe_names()))).read_text()
    if data.draw(st.booleans()):
        document = yaml.safe_load(text)
        for _ in range(data.draw(st.integers(1, 4))):
            section = document
            while isinstance(section, dict) and section and data.draw(st.booleans()):
                inner = section[data.draw(st.sampled_from(sorted(section, key=str)))]
                if not isinstance(inner, dict):
                    break
                section = inner
            key = data.draw(st.sampled_from([*map(str, section), "train", "lr", "new"]) | st.text(max_size=20))
            if data.draw(st.booleans()):
                section[key] = data.draw(_VALUES)
            else:
                section.pop(key, None)
        content = yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")
    else:
        raw = bytearray(text.encode())
        for _ in range(data.draw(st.integers(1, 8))):
            place = data.draw(st.integers(0, len(raw) - 1))
            raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
        content = bytes(raw)
    path.write_bytes(content)
    with _within_seconds(), suppress(UsageError):  # any other error fails the test
        load_recipe(str(path))
