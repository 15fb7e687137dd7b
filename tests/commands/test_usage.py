"""Help texts, and what to type instead of a command line that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from emrrg_cli import app as app_module
from emrrg_cli.app import main
from emrrg_cli.recipe.load import load_recipe


def paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that runs something, by the words that lead to it."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from paths(inner, (*path, name))


COMMANDS = dict(paths(app_module.get_command(app_module.app)))


def help_of(path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*path, "-h"]) == 0
    shown = capsys.readouterr().out
    assert main([*path, "--help"]) == 0
    assert capsys.readouterr().out == shown
    return shown


@pytest.mark.parametrize("path", list(COMMANDS), ids=" ".join)
def test_help_is_complete_at_80_columns(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(path, capsys, monkeypatch)
    names = [name for parameter in COMMANDS[path].params for name in parameter.opts if name.startswith("--")]
    for name in names:
        assert re.search(rf"{name}\b", shown), name
    assert "bool" not in shown
    assert re.search(r"<[^>]*>", shown.replace("runs/<recipe>", "")) is None  # values have names: PATH, N, NAME
    assert re.search(r"{[a-z]", shown) is None  # arguments are in capitals
    example = shown.partition("Example")[2]
    assert f"emrrg {' '.join(path)}" in example.replace("emrrg preprocess combined clip", "emrrg preprocess combined ")


@pytest.mark.parametrize("path", [(), *sorted({(path[0],) for path in COMMANDS if len(path) > 1})], ids=" ".join)
def test_no_line_in_a_list_of_commands_is_cut(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "..." not in help_of(path, capsys, monkeypatch).partition("Commands:")[2]


@pytest.mark.parametrize("source", ["folder", "phantom"])
def test_help_of_preprocess_has_the_defaults_of_the_recipe(
    source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = " ".join(help_of(("preprocess", source), capsys, monkeypatch).split())
    recipe = load_recipe("default/preprocess")
    for name in ("section", "views", "min_words", "dedupe", "size", "format", "quality"):
        told = shown.partition(f" --{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert f"default: {getattr(recipe, name)}" in told, name
    assert f"for phantom {load_recipe('phantom/preprocess').size}" in shown


@pytest.mark.parametrize("path", list(COMMANDS), ids=" ".join)
def test_only_training_commands_mention_train_lr(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trains = path[0] in ("pretrain", "align", "finetune", "plan") or path in (
        ("recipe", "show"),
        ("recipe", "validate"),
    )
    assert ("train.lr" in help_of(path, capsys, monkeypatch)) == trains


def test_the_list_of_commands_has_whole_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ((), ("recipe",), ("data",)):
        assert "..." not in help_of(path, capsys, monkeypatch).partition("Commands:")[2]


@pytest.mark.usefixtures("no_default_model")
@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("train", "`emrrg pretrain`, `emrrg align`, `emrrg finetune`"),
        ("predict", "Did you mean `emrrg generate`?"),
        ("doctr", "Did you mean `emrrg doctor`?"),
        ("preprocess iu", "Did you mean `emrrg preprocess iu_xray`?"),
        ("preprocess openi/ data/iu", "The commands of `emrrg preprocess` are: r2gen, folder, iu_xray, mimic_cxr,"),
        ("finetune --data DIR", "key=value, without dashes: data.root=DIR"),
        ("finetune tiny/finetune --lr=1e-4", "key=value, without dashes: lr=1e-4"),
        ("finetune tiny/finetune --resum", "--resume"),
        ("evaluate runs/iu", "`emrrg evaluate --model runs/iu`"),
        ("generate films/", "`emrrg generate films/ --model RUN`"),
        ("demo folder --count 1", "--count"),
        ("preprocess phantom out --workers 0", "--workers"),
        ("finetune tiny/finetune --resume true", "Flags such as --resume take no value."),
    ],
)
def test_wrong_usage_says_what_to_type(line: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert advice in shown.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate no.png --page -1", "--page must be a whole number, 0 or more, got -1"),
        ("generate no.png --page=x", "--page must be a whole number, 0 or more, got x"),
        ("generate no.png --num-processes 0", "--num-processes must be a whole number, 1 or more, got 0"),
        ("data show no --examples 900", "--examples must be a whole number from 0 to 200, got 900"),
        ("demo --count=", "--count must be a whole number, 10 or more, got nothing"),
        ("generate no.png", "no.png: no such file or folder"),
    ],
)
def test_a_wrong_value_is_told_first_and_in_words(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}\n")


def test_a_command_without_its_arguments_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune"]) == 2
    shown = capsys.readouterr()
    assert "Usage: emrrg finetune" in shown.out + shown.err
    assert "error" not in shown.err
