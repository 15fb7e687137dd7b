"""A run loses nothing: output that goes away, false starts, damaged runs, signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.errors import RunError
from emrrg_cli.signals import interrupted_by, stop_signals


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_run_whose_directory_is_removed_fails(
    finetune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emrrg_cli.training import loop

    update = loop.update_weights

    def remove(*arguments: Any) -> Any:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return update(*arguments)

    monkeypatch.setattr(loop, "update_weights", remove)
    with pytest.raises(RunError, match="run was removed while the program wrote to it"):
        finetune("run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["trainable.safetensors", "tokenizer/tokenizer.json", "recipe"])
def test_a_failed_resume_removes_nothing(finetune: Callable[..., Any], tmp_path: Path, damage: str) -> None:
    finetune("run", "train.stop_after_steps=1")
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")
    for name in ("history.jsonl", "curve.png"):
        (run / name).unlink()
    if damage == "tokenizer/tokenizer.json":
        (run / damage).write_text("{}")
    before = _names(run)
    if damage == "recipe":
        with pytest.raises(Exception, match="batch"):
            finetune("run", "train.batch_size=1000", resume=True)
    elif damage == "tokenizer/tokenizer.json":
        with pytest.raises(RunError, match=r"tokenizer.json is damaged"):
            finetune("run", resume=True)
    assert _names(run) == before


@pytest.mark.parametrize("name", ["model", "curve.png", "history.jsonl", "environment.json", "checkpoints"])
def test_a_run_with_links_out_is_not_resumed(finetune: Callable[..., Any], tmp_path: Path, name: str) -> None:
    finetune("run", "train.stop_after_steps=1")
    entry, outside = tmp_path / "run" / name, tmp_path / "outside"
    if entry.exists():
        entry.rename(outside)
    else:
        outside.touch()
    before = _names(outside) if outside.is_dir() else outside.read_bytes()
    entry.symlink_to(outside)
    with pytest.raises(RunError, match=f"{name} is a link to .*outside"):
        finetune("run", resume=True)
    assert (_names(outside) if outside.is_dir() else outside.read_bytes()) == before


def test_a_resume_without_its_checkpoint_is_refused(finetune: Callable[..., Any], tmp_path: Path) -> None:
    run = finetune("run", "train.stop_after_steps=1")
    (run.checkpoint / "state.pt").unlink()
    with pytest.raises(RunError, match="the checkpoint of this run is lost"):
        finetune("run", resume=True)
    assert (run.checkpoint / "trainable.safetensors").is_file()


@pytest.mark.parametrize("file", ["model/bridge.safetensors", "tokenizer/tokenizer.json", "model/llm/config.json"])
def test_a_damaged_run_is_not_loaded(tiny_run: Path, tmp_path: Path, file: str) -> None:
    from emrrg_cli import load_generator

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    data = bytearray((run / file).read_bytes())
    data[len(data) // 2] ^= 1
    (run / file).write_bytes(data)
    with pytest.raises(RunError, match=f"{Path(file).name} is damaged"):
        load_generator(run)


def test_a_run_of_an_earlier_version_is_loaded(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from emrrg_cli import load_generator

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for file in run.rglob("checksums.json"):
        file.unlink()
    load_generator(run)
    assert capsys.readouterr().err.count("has no checksums") == 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_interrupt_a_block_unless_ignored(name: str) -> None:
    code = f"""
import os, signal, sys
from emrrg_cli.errors import Interrupted
from emrrg_cli.signals import interrupted_by
if "ignored" in sys.argv:
    signal.signal(signal.{name}, signal.SIG_IGN)
try:
    with interrupted_by(message=lambda: "stopped"):
        os.kill(os.getpid(), signal.{name})
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""
    number = int(signal.Signals[name])
    assert subprocess.run([sys.executable, "-c", code]).returncode == 128 + number
    assert subprocess.run([sys.executable, "-c", code, "ignored"]).returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_training_with_a_checkpoint(
    finetune: Callable[..., Any], run_of: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from emrrg_cli.errors import Interrupted
    from emrrg_cli.training import loop

    update = loop.update_weights

    def interrupt(*arguments: Any) -> Any:
        if not sent:  # a second one ends the program at once
            os.kill(os.getpid(), signal.Signals[name])
            sent.append(name)
        return update(*arguments)

    sent: list[str] = []

    monkeypatch.setattr(loop, "update_weights", interrupt)
    with pytest.raises(Interrupted) as caught:
        finetune("run")
    assert caught.value.exit_code == 128 + signal.Signals[name]
    assert run_of(tmp_path / "run").last_step() <= 2


def test_the_signal_handlers_are_restored() -> None:
    before = {number: signal.getsignal(number) for number in stop_signals()}
    with interrupted_by(message=lambda: ""):
        assert all(signal.getsignal(number) is not handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in before} == before


def test_scores_of_noise_do_not_choose_the_model(finetune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLEU-4 of .001 against .0008 once outweighed a far better loss."""
    from emrrg_cli.training import finetune as stage

    bleu = iter([0.0010, 0.0008])
    monkeypatch.setattr(stage, "score", lambda *a, **k: {"BLEU_4": next(bleu), "CIDEr": 0.0})
    losses = iter([5.0, 4.0])
    monkeypatch.setattr(stage.FinetuneStage, "_validation_loss", lambda self, display: next(losses))
    run = finetune("run", "train.select=score", "train.epochs=2", "train.score_weights={BLEU_4: 1.0}")
    assert run.summary.best == [0.0, -4.0]
    assert run.summary.best_step == max(row["step"] for row in run.history)


def test_a_score_above_noise_chooses_the_model(finetune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from emrrg_cli.training import finetune as stage

    bleu = iter([0.3, 0.2])
    monkeypatch.setattr(stage, "score", lambda *a, **k: {"BLEU_4": next(bleu), "CIDEr": 0.0})
    run = finetune("run", "train.select=score", "train.epochs=2", "train.score_weights={BLEU_4: 1.0}")
    assert run.summary.best is not None
    assert run.summary.best[0] == 0.3


def test_equal_reports_are_mentioned(
    finetune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from emrrg_cli.training import finetune as stage

    monkeypatch.setattr(stage, "write_split", lambda *a, **k: ["the lungs are clear"] * 10)
    monkeypatch.setattr(stage, "reference_reports", lambda *a: ["the heart is large"] * 10)
    finetune("run", "train.select=score", "train.epochs=1")
    printed = capsys.readouterr().err
    assert "10 of 10 validation reports are the same text" in printed
    assert printed.count("the loss chooses the best model until BLEU_4 is above 0.02") == 1


def test_a_finished_run_says_so(finetune: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    finetune("run")
    capsys.readouterr()
    finetune("run", resume=True)
    assert "this run is already finished: 4 steps, schedule ended" in capsys.readouterr().err
