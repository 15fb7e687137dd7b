"""One process or several: the same training, the same predictions, and one message when something is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from emrrg_cli.app import main
from emrrg_cli.errors import EmrrgError, Interrupted, RunError, UsageError
from emrrg_cli.training import launch
from emrrg_cli.training.launch import processes_expected, processes_wanted, tell_launcher
from tests.forks import LAUNCHER, run_forked

# No tracker, no noise, three epochs of two steps, a validation with generation in each.
OPTIONS = ("train.trackers=[]", "train.epochs=3", "generation.batch_size=3")


@pytest.fixture(scope="module")
def one(tiny_overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process, with the same global batch."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert main(["finetune", "tiny/finetune", *tiny_overrides, *OPTIONS, "--output", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def two(tiny_overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, fork_server: Any) -> Path:
    """The run of `emrrg finetune --num-processes 2`; `test_stop_processes.py` starts one that does not fork."""
    folder = tmp_path_factory.mktemp("two")
    run = folder / "run"
    arguments = ["finetune", "tiny/finetune", *tiny_overrides, *OPTIONS, "--output", str(run), "--num-processes", "2"]
    (done,) = run_forked(fork_server, folder, *arguments, code=LAUNCHER + "sys.exit(main(sys.argv[1:]))")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("schedule ended") == 1  # one process speaks
    assert "Warning" not in done.stderr
    return run


@pytest.mark.slow
def test_two_processes_train_as_one(one: Path, two: Path, run_of: Any, difference: Any) -> None:
    alone, both = run_of(one), run_of(two)
    assert len(alone.series("train/loss")) == 6
    for key in ("train/loss", "validation/loss"):
        assert both.series(key) == pytest.approx(alone.series(key), rel=1e-6)
    assert both.series("train/grad_norm") == pytest.approx(alone.series("train/grad_norm"), rel=1e-5)
    assert both.series("validation/score") == pytest.approx(alone.series("validation/score"), abs=1e-9)
    assert difference(both.exported, alone.exported) < 1e-5
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    state = torch.load(both.checkpoint / "state.pt", weights_only=True)
    assert len(state["rng"]) == 2
    assert not torch.equal(state["rng"][0]["torch"], state["rng"][1]["torch"])  # each has its own noise


# Runs `emrrg` and prints what is left of the process group; a model of several processes waits for the collector.
LEAVING = """
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

from emrrg_cli.app import main

code = main(sys.argv[1:])
import torch.distributed
gc.collect()
names = []
for task in Path("/proc/self/task").glob("*"):
    with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends just now
        names.append((task / "comm").read_text().strip())
line = f"{code} {torch.distributed.is_initialized()} {sorted(name for name in names if 'gloo' in name)}"
os.write(1, f"{line}\\n".encode())  # in one piece: both processes write here
"""

FAILING = """
from emrrg_cli.errors import RunError
from emrrg_cli.evaluation import split_reports

def fail(*arguments, **options):
    raise RunError("the disk is on fire")

split_reports.write_split = fail
"""


@pytest.mark.slow
def test_torchrun_does_the_same_and_leaves_no_thread(
    two: Path, tiny_overrides: tuple[str, ...], tmp_path: Path, run_of: Any, forked: Any
) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    how = ("--nproc-per-node=2", "--start-method=fork", "--run-path", str(script))
    training = ("finetune", "tiny/finetune", *tiny_overrides, *OPTIONS, "--output", str(tmp_path / "run"))
    (done,) = forked(*how, *training, code="from torch.distributed.run import main\nmain()")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.endswith("]")] == ["0 False []"] * 2
    run, both = run_of(tmp_path / "run"), run_of(two)
    assert run.series("train/loss") == pytest.approx(both.series("train/loss"), rel=1e-6)
    assert len(torch.load(run.checkpoint / "state.pt", weights_only=True)["rng"]) == 2


@pytest.mark.slow
def test_an_error_leaves_no_thread_of_the_process_group(
    tiny_run: Path, tmp_path: Path, no_java: None, forked: Any
) -> None:
    arguments = ["evaluate", "--model", str(tiny_run), "data.limit=1", "--output", str(tmp_path / "out")]
    for done in forked(*arguments, code=FAILING + LEAVING, processes=2):
        assert [line for line in done.stdout.splitlines() if line.endswith("]")] == ["1 False []"], done.stderr
        assert done.returncode == 0
        assert done.stderr.count("the disk is on fire") == 1


@pytest.mark.slow
def test_accelerate_launch_does_the_same(
    one: Path, tiny_overrides: tuple[str, ...], tmp_path: Path, run_of: Any, forked: Any
) -> None:
    how = ("--cpu", "--num_processes", "1", "-m", "emrrg_cli")
    training = ("finetune", "tiny/finetune", *tiny_overrides, *OPTIONS, "--output", str(tmp_path / "run"))
    (done,) = forked(*how, *training, code="from accelerate.commands.launch import main\nmain()")
    assert done.returncode == 0, done.stderr
    assert run_of(tmp_path / "run").series("train/loss") == pytest.approx(run_of(one).series("train/loss"), rel=1e-6)


@pytest.mark.slow
def test_two_processes_evaluate_each_study_once_as_one_does(
    varied_run: Path, tmp_path: Path, no_java: None, forked: Any
) -> None:
    arguments = ["evaluate", "--model", str(varied_run), "--split", "train", "data.limit=15", "generation.batch_size=4"]
    both = tmp_path / "both"
    first, second = forked(*arguments, "--output", str(both), "--json", "--num-processes", "2", processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == second.stderr == ""
    result = json.loads(first.stdout)
    assert result["studies"] == 15  # an odd number: one process has a study less
    assert main([*arguments, "--output", str(tmp_path / "alone")]) == 0
    predictions, alone = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("both", "alone"))
    assert predictions == alone
    rows = [json.loads(line) for line in predictions.splitlines()]
    assert len({row["study_id"] for row in rows}) == len(rows) == 15
    assert len({row["hypothesis"] for row in rows}) >= 5
    assert result["scores"] == json.loads((tmp_path / "alone" / "scores.json").read_text())["scores"]


@pytest.mark.slow
def test_an_error_in_all_processes_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EmrrgError) as caught:
        launch.launch(["recipe", "show", "no/such-recipe"], 2)
    assert (caught.value.exit_code, capfd.readouterr()) == (2, ("", ""))  # by this process, not by the two
    assert caught.value.message.startswith("no shipped recipe is named no/such-recipe")


@pytest.mark.parametrize("recipe", ["tiny/finetune", "phantom/align", "phantom/pretrain"])
def test_an_uneven_batch_starts_no_process(
    recipe: str,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "launch", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    batch = ["train.batch_size=6", "train.micro_batch_size=null"]
    arguments = [recipe.split("/")[1], recipe, f"data.root={tiny_dataset}", *batch, "-o", str(tmp_path / "run")]
    assert main([*arguments, "--num-processes", "4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: train.batch_size=6 does not divide among 4 processes\n")
    assert "use --num-processes 3, or train.batch_size=4 or 8." in said
    assert not (tmp_path / "run").exists()


def test_a_different_number_of_processes_is_refused(
    tiny_overrides: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")  # as the launcher that started one process of two leaves it
    monkeypatch.setenv("WORLD_SIZE", "1")
    arguments = ["finetune", "tiny/finetune", *tiny_overrides, "--output", str(tmp_path / "run")]
    assert main([*arguments, "--num-processes", "2"]) == 1
    assert "error: 2 processes were requested, but 1 started" in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "run").exists()


def test_a_launcher_from_outside_overwrites_no_run(
    one: Path, tiny_overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = (one / "recipe.yaml").stat().st_mtime_ns
    assert main(["finetune", "tiny/finetune", *tiny_overrides, "--output", str(one)]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert (one / "recipe.yaml").stat().st_mtime_ns == before


def test_the_started_processes_get_the_arguments_of_this_command(
    tiny_overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(launch, "launch", lambda arguments, processes: started.append((list(arguments), processes)))
    arguments = ["finetune", "tiny/finetune", *tiny_overrides, "--output", str(tmp_path / "run"), "--num-processes=2"]
    assert main(arguments) == 0
    assert started == [(arguments, 2)]
    assert not (tmp_path / "run").exists()


def test_the_default_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (processes_wanted(None), processes_wanted(3)) == (1, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (processes_wanted(None), processes_wanted(2)) == (4, 2)
    with pytest.raises(UsageError, match="--num-processes 5: this computer has 4 GPUs"):
        processes_wanted(5)
    with pytest.raises(UsageError, match="must be 1 or more, got 0"):
        processes_wanted(0)
    # `accelerate launch` with one process on a machine of four GPUs.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert (processes_wanted(None), processes_wanted(2)) == (1, 2)
    # On a CPU it starts one process whatever it was asked for.
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RunError, match="should start several processes, but it started only this one"):
        processes_wanted(None)


def test_the_world_size_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMRRG_NUM_PROCESSES", raising=False)
    assert (processes_expected(None), processes_expected(3)) == (0, 3)
    monkeypatch.setenv("EMRRG_NUM_PROCESSES", "2")
    assert processes_expected(None) == 2


def test_errors_go_to_the_launching_process_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "EMRRG_ERRORS"):
        monkeypatch.delenv(name, raising=False)
    assert not tell_launcher(RunError("x"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not tell_launcher(RunError("x"))  # torchrun shows no messages
    assert tell_launcher(Interrupted("x"))  # rank 0 says it
    monkeypatch.setenv("EMRRG_ERRORS", str(tmp_path))
    assert launch._first_error(tmp_path) is None
    assert tell_launcher(RunError("lost the connection"), expected=False)
    monkeypatch.setenv("RANK", "0")
    assert tell_launcher(RunError("disk full", hint="make room"))
    assert not tell_launcher(Interrupted("x"))
    error = launch._first_error(tmp_path)
    assert error is not None
    assert (error.message, error.hint) == ("disk full", "make room")
    monkeypatch.setenv("EMRRG_ERRORS", str(tmp_path / "gone"))
    assert not tell_launcher(RunError("x"))


def test_the_first_error_of_the_processes_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diagnose() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("emrrg_cli.diagnosis.diagnose", diagnose)
    monkeypatch.setenv("EMRRG_DEBUG", "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("EMRRG_ERRORS", str(tmp_path))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == ""
    error = launch._first_error(tmp_path)
    assert error is not None
    assert error.message == "unexpected: RuntimeError: Connection closed by peer"
    monkeypatch.setenv("RANK", "1")
    tell_launcher(RunError("study s1: broken image"))
    error = launch._first_error(tmp_path)
    assert error is not None
    assert error.message == "study s1: broken image"


def test_the_launching_process_restores_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMRRG_NUM_PROCESSES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with launch._environment({"EMRRG_NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"}):
        assert (os.environ["EMRRG_NUM_PROCESSES"], os.environ["OMP_NUM_THREADS"]) == ("2", "1")
    assert "EMRRG_NUM_PROCESSES" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "3"
