from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from emrrg_cli import app as app_module
from emrrg_cli.app import COMMANDS, main
from emrrg_cli.errors import Interrupted, RunError, UsageError


@pytest.fixture
def raises(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `emrrg doctor` raise what it is given."""
    monkeypatch.setenv("EMRRG_DEBUG", "")  # so that what main sets is taken back

    def _raises(failure: BaseException) -> None:
        def diagnose() -> NoReturn:
            raise failure

        monkeypatch.setattr("emrrg_cli.diagnosis.diagnose", diagnose)

    return _raises


# Runs `emrrg` and prints the packages that are imported.
_IMPORTED = """
import sys
from emrrg_cli.app import main
code = main(sys.argv[1:])
print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
sys.exit(code)
"""
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "numpy", "matplotlib", "PIL"}


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], HEAVY | {"pydantic", "yaml"}),
        (["--version"], HEAVY | {"pydantic", "yaml"}),
        (["recipe", "--help"], HEAVY),
        (["finetune", "--help"], HEAVY),  # some versions of Typer import pydantic themselves for list arguments
        (["recipe", "ls"], HEAVY),
        (["recipe", "validate", "tiny/finetune"], HEAVY),
    ],
)
def test_help_and_recipes_import_nothing_heavy(arguments: list[str], absent: set[str], light_forked: Any) -> None:
    (done,) = light_forked(*arguments, code=_IMPORTED)
    assert done.returncode == 0
    packages = {*done.stderr.splitlines()[-1].split()}
    assert "typer" in packages
    assert packages & absent == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "tiny/finetune", "data.root=nowhere"], "no such dataset directory: nowhere"),
        (["convert", "nowhere.pth", "out"], "nowhere.pth: no such file or directory"),
        (["demo", ".", "--train"], "already exists and is not empty"),
        (["evaluate", "--model", "nowhere"], "nowhere"),
        (["generate", "film.png", "--model", "nowhere"], "nowhere"),
        (["generate", "film.png", "--model", "nowhere", "--device", "cuda!"], "unknown device 'cuda!'"),
        (["pretrain", "phantom/pretrain", "data.root=nowhere"], "nowhere: no such folder"),
        (["align", "phantom/align", "data.root=.", "model.encoder.weights=none"], "none: no such file or directory"),
        (["finetune", "tiny/finetune", "data.root=.", "model.encoder.weights=none"], "none: no such file or dir"),
        (["finetune", "nowhere/nothing"], "no shipped recipe"),
    ],
)
def test_a_simple_mistake_is_found_before_torch_is_imported(arguments: list[str], said: str, light_forked: Any) -> None:
    (done,) = light_forked(*arguments, code=_IMPORTED)
    assert done.returncode == 2
    assert said in done.stderr
    assert "torch" not in done.stderr.splitlines()[-1].split()


@pytest.mark.skipif(any(Path("/dev").glob("nvidia*")) or sys.platform != "linux", reason="a GPU may be there")
def test_a_missing_gpu_is_found_before_torch_is_imported(light_forked: Any) -> None:
    (done,) = light_forked("generate", "film.png", "-m", "run", "--device", "cuda:1", code=_IMPORTED)
    assert done.returncode == 2
    assert "there is no device 'cuda:1' here" in done.stderr
    assert "torch" not in done.stderr.splitlines()[-1].split()


# Runs commands one after the other, and prints the exit code of each and whether torch was imported.
_MISTAKES = """
import json, sys
from emrrg_cli.app import main
for line in json.loads(sys.argv[1]):
    print(main(line), "torch" in sys.modules, " ".join(line), flush=True)
"""


@pytest.mark.slow
def test_no_command_imports_torch_for_a_simple_mistake(tiny_run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "films").mkdir()
    for name in ("full/x", "file", "films/film.png", "table.csv"):
        (tmp_path / name).touch()
    (tmp_path / "table.csv").write_text("id,prediction\n1,clear .\n")
    shutil.copytree(tiny_run, tmp_path / "untrained", ignore=lambda folder, names: {"model"} & set(names))
    data, run = f"data.root={tiny_dataset}", str(tiny_run)
    lines = [
        ["preprocess", "folder", "nowhere", "out"],
        ["preprocess", "folder", "films", "full"],
        ["preprocess", "folder", "films", "out", "nokey=1"],
        ["data", "show", "nowhere"],
        ["pretrain", "nowhere/x"],
        ["pretrain", "phantom/pretrain", data, "-o", "full"],
        ["pretrain", "phantom/pretrain", data, "--num-processes", "0"],
        ["align", "phantom/align", "data.root=films"],
        ["align", "phantom/align", data, "model.text={name: ./none, frozen: true}"],
        ["finetune", "tiny/finetune"],
        ["finetune", "tiny/finetune", data, "nokey=1"],
        ["finetune", "tiny/finetune", data, "-o", "full"],
        ["finetune", "tiny/finetune", data, "-o", "out", "--resume"],
        ["finetune", "tiny/finetune", data, "model.llm.name=./none"],
        ["evaluate", "--model", "untrained"],
        ["evaluate", "--model", run, "--data", "nowhere"],
        ["evaluate", "--model", run, "--data", "films"],
        ["evaluate", "--model", run, "--output", "file/x"],
        ["evaluate", "--model", run, "--chexbert", "none.pth"],
        ["evaluate", "--model", run, "--num-processes", "0"],
        ["evaluate", "--predictions", "none.csv"],
        ["evaluate", "--predictions", "table.csv", "--chexbert", "./none"],
        ["compare", "nowhere", "table.csv"],
        ["generate", "nowhere.png", "--model", run, "-o", "out"],
        ["generate", "films", "--model", "untrained", "-o", "out"],
        ["generate", "films", "--model", run, "-o", "file"],
        ["generate", "films", "--model", run, "-o", "out", "--shard", "5/4"],
        ["generate", "films", "--model", run, "-o", "out", "--recipe", "none/none"],
        ["generate", "--table", "none.csv", "--model", run, "-o", "out"],
        ["convert", "table.csv", "full"],
        ["convert", "table.csv", "file"],
        ["convert", run, "file", "--to", "published"],
        ["plan", "tiny/finetune", "data.root=films"],
        ["plan", "tiny/finetune", "model.llm.name=./none"],
        ["demo", "full"],
    ]
    command = [sys.executable, "-c", _MISTAKES, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    printed = done.stdout.splitlines()
    assert [line for line in printed if not line.startswith(("2 False", "1 False"))] == [], done.stderr
    assert len(printed) == len(lines), done.stderr
    assert [line.split()[2:] for line in printed if line.startswith("1 ")] == [
        ["evaluate", "--model", "untrained"],
        ["generate", "films", "--model", "untrained", "-o", "out"],
    ]


def test_help_lists_the_commands_in_the_order_of_the_work(light_forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = light_forked("--help")[0].stdout.splitlines()
    listed = [word for line in lines if len(line.split()) > 1 and (word := line.split()[0]) in COMMANDS]
    assert listed == list(COMMANDS)


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    command = [sys.executable, "-X", "importtime", "-m", "emrrg_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout == f"emrrg {version('emrrg')}\n"
    assert not re.search(r"\| +torch$", done.stderr, re.M)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctr"], "error: No such command 'doctr'."),
        (["doctor", "--nope"], "No such option: --nope"),
        (["doctor", "extra"], "`emrrg doctor --help` shows how to use it."),
        (["recipe", "show", "nope"], "error: no shipped recipe is named nope"),
    ],
)
def test_wrong_usage_is_exit_code_2_on_stderr(arguments: list[str], said: str, light_forked: Any) -> None:
    (done,) = light_forked(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) in (0, 2)  # as the installed version of Typer has it
    captured = capsys.readouterr()
    assert "finetune" in captured.out + captured.err
    assert "error:" not in captured.err


@pytest.mark.parametrize(
    ("failure", "code", "printed"),
    [
        (UsageError("no [bold] such key", hint="look here"), 2, "error: no [bold] such key\nlook here\n"),
        (RunError("disk full"), 1, "error: disk full\n"),
        (Interrupted("stopped; saved"), 130, "stopped; saved\n"),
        (Interrupted("terminated", exit_code=143), 143, "terminated\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ValueError("odd\nsecond line"),
            1,
            "unexpected error: ValueError: odd\nrun again with --debug for the traceback\n",
        ),
        (AssertionError(), 1, "unexpected error: AssertionError\nrun again with --debug for the traceback\n"),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    failure: BaseException, code: int, printed: str, raises: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(failure)
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.err == printed
    assert captured.out == ""


def test_a_panic_of_a_library_is_one_message(raises: Any, capsys: pytest.CaptureFixture[str]) -> None:
    raises(type("PanicException", (BaseException,), {})("too many retries"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith("unexpected error: PanicException: too many retries\n")
    raises(GeneratorExit())
    with pytest.raises(GeneratorExit):
        main(["doctor"])


def test_long_messages_keep_their_paths_whole(raises: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["directory"] * 40)
    raises(RunError(f"{path} is missing"))
    main(["doctor"])
    assert path in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
@pytest.mark.parametrize("failure", [ValueError("odd"), RunError("odd"), KeyboardInterrupt()])
def test_debug_shows_the_traceback(
    arguments: list[str], failure: BaseException, raises: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(failure)
    assert main(arguments) in (1, 130)
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert type(failure).__name__ in text
    assert "run again with --debug" not in text
    assert os.environ["EMRRG_DEBUG"] == "1"  # processes that a command starts show theirs


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_debug_is_also_taken_from_the_environment(
    value: str, shown: bool, raises: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(RunError("odd"))
    monkeypatch.setenv("EMRRG_DEBUG", value)
    assert main(["doctor"]) == 1
    assert ("Traceback" in capsys.readouterr().err) is shown


def test_ctrl_c_at_a_question_is_an_interruption(raises: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    raises(typer.Abort())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


_STOPPED_IN_IMPORT = """
import sys
from emrrg_cli import diagnosis
from emrrg_cli.app import main
sys.path.insert(0, sys.argv[1])
diagnosis.diagnose = lambda: __import__("stopped")
sys.exit(main(["doctor"]))
"""
_RAISED_IN_EXTENSION = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    raise RecursionError
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another signal there")
def test_ctrl_c_in_an_import_ends_at_once(light_forked: Any, tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(_RAISED_IN_EXTENSION)
    (done,) = light_forked(str(tmp_path), code=_STOPPED_IN_IMPORT)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another signal there")
def test_ctrl_c_elsewhere_is_taken_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("emrrg_cli.diagnosis.diagnose", interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))  # a caller's own handler stays
    try:
        main(["doctor"])
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert caught == [signal.SIGINT]


def test_a_broken_pipe_other_than_stdout_is_an_error(raises: Any, capsys: pytest.CaptureFixture[str]) -> None:
    raises(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert main(["doctor"]) == 1
    assert "unexpected error: BrokenPipeError" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
@pytest.mark.parametrize("arguments", [["recipe", "show", "tiny/finetune", "--resolved"], ["--help"]])
def test_a_closed_stdout_ends_quietly(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "emrrg_cli", *arguments], stdout=write_end, stderr=subprocess.PIPE, timeout=600
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["recipe", "show", "tiny/finetune"], ["doctor"], ["--help"]])
def test_a_full_stdout_is_one_message(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "emrrg_cli", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    said = "error: the results cannot be written to stdout: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


_GENERATE = ["--output", "out", "--device", "cpu", "generation.num_beams=1", "generation.max_new_tokens=3"]
# Runs `emrrg` in a folder with a stderr that is full.
_STDERR_FULL = """
import os
import sys
from emrrg_cli.app import main
os.chdir(sys.argv[1])
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("stderr", "image", "code"), [("2>/dev/full", "none.png", 2), ("2>&-", "none.png", 2), ("2>&-", "a.png", 0)]
)
@pytest.mark.slow
def test_messages_that_stderr_does_not_take(stderr: str, image: str, code: int, tmp_path: Path) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    command = f"{sys.executable} -m emrrg_cli generate {image} {' '.join(_GENERATE)} {stderr}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=600)
    assert done.returncode == code
    assert (tmp_path / "out" / "reports.jsonl").exists() == (code == 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.slow
def test_reports_are_written_when_stderr_is_full(tmp_path: Path, forked: Any) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    (done,) = forked(str(tmp_path), "generate", "a.png", *_GENERATE, code=_STDERR_FULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "reports.jsonl").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_streams_that_are_closed_are_left_out() -> None:
    command = f"{sys.executable} -m emrrg_cli --help <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=600).returncode == 0


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a.png", "--output", "NAME"],
        ["generate", "a.png", "--model", "NAME"],
        ["generate", "--table", "NAME"],
        ["generate", "--merge", "NAME"],
        ["demo", "NAME"],
        ["preprocess", "folder", "NAME", "out"],
        ["finetune", "NAME"],
    ],
)
def test_a_name_that_is_too_long_is_wrong_usage(
    arguments: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    assert main([name if argument == "NAME" else argument for argument in arguments]) == 2
    assert "unexpected" not in capsys.readouterr().err


def test_every_command_is_in_the_help() -> None:
    group: Any = app_module.get_command(app_module.app)
    assert set(group.commands) == set(COMMANDS)


def test_the_shell_command_is_this_main() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="emrrg")
    assert script.load() is main
    assert Path(app_module.__file__).name == "app.py"
