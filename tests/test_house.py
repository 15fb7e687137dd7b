"""The size of files, functions and parameter lists, and of the names of tests. An exception needs a reason."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_TEST_NAME = 350, 60, 8, 60

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Of kernels every line and pointer is one of the algorithm's; they cannot be handed a structure.
KERNELS = ("emrrg_cli/models/scan/kernels/", "emrrg_cli/models/scan/numba_kernels.py")
# A scan's tensors, one parameter each: inputs, weights and orders, in the order that torch's operators demand.
SCANS = "emrrg_cli/models/scan/"

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "emrrg_cli/models/scan/triton_engine.py:_backward_of": "launches kernels in order and frees tensors between them",
}
LONG_PARAMETERS = {
    "emrrg_cli/ingest/preprocess.py:preprocess": "options of the command, all with a default",
    "emrrg_cli/models/arm/encoder.py:__init__": "a public constructor; six sizes and three switches",
}


@cache
def _files(folder: str) -> dict[str, str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@cache
def _functions(folder: str) -> list[tuple[str, str, Function]]:
    return [
        (path, f"{path}:{node.name}", node)
        for path, text in _files(folder).items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, Function)
    ]


def _is_command(path: str, function: Function) -> bool:
    """Whether typer reads the parameters as the options of a command."""
    return path.startswith("emrrg_cli/commands/") and not function.name.startswith("_")


def _parameters(function: Function) -> int:
    listed = function.args
    names = [one.arg for one in (*listed.posonlyargs, *listed.args, *listed.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_files_are_short() -> None:
    long = {path: lines for path, text in _files("emrrg_cli").items() if (lines := text.count("\n")) > MAX_FILE}
    assert {path: lines for path, lines in long.items() if path not in LONG_FILES} == {}


def test_functions_are_short() -> None:
    long = {
        name: lines
        for path, name, function in _functions("emrrg_cli")
        if not path.startswith(KERNELS) and not _is_command(path, function)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION
    }
    assert {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS} == {}


def test_parameter_lists_are_short() -> None:
    long = {
        name: count
        for path, name, function in _functions("emrrg_cli")
        if not path.startswith(SCANS) and not _is_command(path, function)
        if (count := _parameters(function)) > MAX_PARAMETERS
    }
    assert {name: count for name, count in long.items() if name not in LONG_PARAMETERS} == {}


def test_names_of_tests_are_short() -> None:
    names = [f"{path}:{function.name}" for path, _, function in _functions("tests") if function.name[:5] == "test_"]
    assert len(names) > 500
    assert [name for name in names if len(name.partition(":")[2]) > MAX_TEST_NAME] == []


def test_exceptions_name_existing_files() -> None:
    files = _files("emrrg_cli")
    functions = {name for _, name, _ in _functions("emrrg_cli")}
    assert LONG_FILES.keys() <= files.keys()
    assert LONG_FUNCTIONS.keys() | LONG_PARAMETERS.keys() <= functions
