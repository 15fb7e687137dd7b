"""Reports by several processes of one machine: the same records, and what is left when one of them ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from emrrg_cli.app import main
from emrrg_cli.decoding import processes
from emrrg_cli.errors import EmrrgError, RunError
from emrrg_cli.recipe.load import load_run_recipe


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Nine films, some of which get a text of their own, and a file that is none."""
    folder = tmp_path / "films"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(9):
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8) // (index + 1)).save(folder / f"{index}.png")
    (folder / "x.txt").write_text("no image")
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "reports.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def _options(run: Path, output: Path) -> list[str]:
    return ["--model", str(run), "--output", str(output), "--device", "cpu", "generation.batch_size=2"]


def _has_ended(group: int) -> bool:
    # Whether nobody is left of a group of processes, after a while: as long as a busy machine may need.
    for _ in range(6000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


# Runs `emrrg` in a fork whose processes are forks as well; with `killed`, the second ends at its start.
_FORKED = """
import multiprocessing
import sys
from types import SimpleNamespace

from emrrg_cli.app import main
from emrrg_cli.decoding import processes

start = processes._start

def start_and_kill(index, *arguments):
    connection, process = start(index, *arguments)
    if index == 1 and {killed}:
        process.kill()
    return connection, process

processes._start = start_and_kill
processes.multiprocessing = SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes_after_a_crash(
    varied_run: Path, films: Path, tmp_path: Path, forked: Any
) -> None:
    assert main(["generate", str(films), *_options(varied_run, tmp_path / "one")]) == 0
    command = ["generate", str(films), *_options(varied_run, tmp_path / "two"), "--num-processes", "2"]
    (done,) = forked(*command, code=_FORKED.format(killed=True))
    assert done.returncode == 1
    assert "process 2 of 2 ended by signal 9" in done.stderr
    (done,) = forked(*command, code=_FORKED.format(killed=False))
    assert done.returncode == 0, done.stderr
    one, two = _rows(tmp_path / "one"), _rows(tmp_path / "two")
    assert len({row["report"] for row in one}) > 3
    assert len(two) == 9
    assert one == two
    assert (tmp_path / "one" / "skipped.jsonl").read_text() == (tmp_path / "two" / "skipped.jsonl").read_text()
    cards = [[json.loads(line) for line in (tmp_path / name / "page.jsonl").open()] for name in ("one", "two")]
    assert [(card["study"], card["images"]) for card in cards[0]] == [
        (card["study"], card["images"]) for card in cards[1]
    ]
    for ours, theirs in zip(*cards, strict=True):
        assert ours["peaks"] == pytest.approx(theirs["peaks"], abs=0.011)  # other studies stood in the batch
    assert sorted(entry.name for entry in (tmp_path / "two").iterdir()) == [
        "page.html", "page.jsonl", "reports.csv", "reports.jsonl", "skipped.jsonl",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_page_is_whole_with_unreadable_files(varied_run: Path, films: Path, tmp_path: Path, forked: Any) -> None:
    for index in (0, 2, 4):  # all of them are of the first process
        (films / f"{index}.png").write_text("no image")
    command = ["generate", str(films), *_options(varied_run, tmp_path / "out"), "--num-processes", "2", "--page", "4"]
    (done,) = forked(*command, code=_FORKED.format(killed=False))
    assert done.returncode == 0, done.stderr
    assert "6 reports, 4 files skipped" in done.stderr
    cards = [json.loads(line) for line in (tmp_path / "out" / "page.jsonl").open()]
    assert [Path(card["study"]).stem for card in cards] == ["1", "3", "5", "6"]
    assert all(card["images"] and card["maps"] for card in cards)


# Runs `emrrg`, and interrupts all of its processes as a terminal does: when it waits again, with the first reports
# saved. However slow this machine is, that is long before the end.
_INTERRUPTED = """
import os
import signal
import sys

from emrrg_cli.app import main
from emrrg_cli.decoding import processes

wait, waited = processes.wait, []

def interrupted(connections):
    waited.append(connections)
    if len(waited) == 2:
        os.killpg(os.getpgrp(), signal.SIGINT)
    return wait(connections)

processes.wait = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_signal_stops_all_and_keeps_what_is_written(varied_run: Path, films: Path, tmp_path: Path) -> None:
    for index in range(9, 400):
        os.link(films / f"{index % 9}.png", films / f"{index}.png")
    command = ["generate", str(films), *_options(varied_run, tmp_path / "out"), "--num-processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    rows = _rows(tmp_path / "out")
    assert 0 < len(rows) <= 4  # of one batch or two, as they come
    assert f"{len(rows)} report{'s' if len(rows) > 1 else ''} saved in" in printed
    assert _has_ended(process.pid)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("no trained model", hint="Train."), "no trained model\nTrain."),
        (TypeError("x"), "unexpected TypeError"),
    ],
)
def test_an_error_in_a_process_is_sent(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(processes, "stop_signals", lambda: ())
    monkeypatch.setattr(processes, "load_generator", fail)
    monkeypatch.setattr(processes, "err", Console())
    ours, theirs = multiprocessing.Pipe()
    ours.send([])
    processes._write(theirs, 0, 1, tiny_run, load_run_recipe(tiny_run, None, [], "generate"), "cpu", 0)
    received = ours.recv()
    assert isinstance(received, EmrrgError)
    assert str(received).startswith(message)
