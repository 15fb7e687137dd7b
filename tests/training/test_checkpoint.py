"""Checkpoints: whole or not there, and all that an exact continuation needs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emrrg_cli.errors import RunError
from emrrg_cli.training import checkpoint as checkpoints
from emrrg_cli.training import run_checkpoints
from emrrg_cli.training.checkpoint import (
    Progress,
    last_checkpoint,
    load_checkpoint,
    require_checkpoint,
    rng_state,
    save_checkpoint,
    save_progress,
    set_rng_state,
)


def _trained(steps: int = 3, width: int = 4) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _save(directory: Path, step: int = 3, **progress: Any) -> tuple[nn.Module, torch.optim.AdamW, Path]:
    model, optimizer = _trained(step)
    saved = save_checkpoint(directory, model, optimizer, None, Progress(step=step, **progress), [rng_state()])
    return model, optimizer, saved


def test_a_checkpoint_restores_weights_optimizer_rng_and_place(tmp_path: Path) -> None:
    progress = Progress(3, 1, 1, [0.25, -1.5], 2, 1, True)
    model, optimizer = _trained()
    saved = save_checkpoint(tmp_path, model, optimizer, None, progress, [rng_state()])
    drawn = (random.random(), np.random.rand(), torch.rand(2), torch.randn(1), np.random.randn(), random.gauss(0, 1))
    other, other_optimizer = _trained(steps=1)
    assert load_checkpoint(saved, other, other_optimizer, None, 0) == progress
    again = (random.random(), np.random.rand(), torch.rand(2), torch.randn(1), np.random.randn(), random.gauss(0, 1))
    for a, b in zip(drawn, again, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for model_, optimizer_ in ((model, optimizer), (other, other_optimizer)):
        model_(torch.ones(1, 3)).square().sum().backward()
        optimizer_.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_state_holds_numbers_between_two_gaussians() -> None:
    np.random.seed(1)
    random.seed(1)
    np.random.randn()
    random.gauss(0, 1)
    state = rng_state()
    first = (np.random.randn(), random.gauss(0, 1))  # the second of a pair
    set_rng_state(state)
    assert (np.random.randn(), random.gauss(0, 1)) == first


def test_each_process_gets_its_own_random_numbers(tmp_path: Path) -> None:
    model, optimizer = _trained()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(rng_state())
    saved = save_checkpoint(tmp_path, model, optimizer, None, Progress(3), states)
    load_checkpoint(saved, model, optimizer, None, 1)
    assert torch.equal(torch.get_rng_state(), states[1]["torch"])
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


def test_only_trained_weights_are_saved_and_read_without_code(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, _, saved = _save(tmp_path)
    assert set(load_file(saved / "trainable.safetensors")) == {"0.weight", "0.bias", "1.weight"}
    state = torch.load(saved / "state.pt", weights_only=True)
    assert set(state) == {"optimizer", "scaler", "rng"}


def test_the_newest_is_kept_and_named(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    _, _, newest = _save(tmp_path, 5)
    assert last_checkpoint(tmp_path) == newest == tmp_path / "step-00000005"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last", "step-00000005"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "last").write_text("step-00000005\n")
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("breaks", ["save_file", "torch.save", "atomic_write_text"])
def test_a_crash_while_writing_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    _, _, before = _save(tmp_path, 3, epoch=1)

    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, breaks, crash) if "." not in breaks else patch.setattr(torch, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            _save(tmp_path, 5)
    assert last_checkpoint(tmp_path) == before
    model, optimizer = _trained(1)
    assert load_checkpoint(before, model, optimizer, None, 0).epoch == 1
    # And the next one is written as if nothing had been.
    _, _, saved = _save(tmp_path, 5)
    assert last_checkpoint(tmp_path) == saved
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last", "step-00000005"]


@pytest.mark.parametrize("full", ["save_file", "torch.save"])
def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    from safetensors import SafetensorError

    def fail(*arguments: Any, **options: Any) -> None:
        if full == "save_file":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 143744 vs 143636\nand more")

    full_file = {
        "save_file": r"trainable\.safetensors: Error while serializing: I/O error: No space left on device",
        "torch.save": r"state\.pt: the file is cut off, most often because the disk is full",
    }[full]
    _, _, before = _save(tmp_path, 3)
    monkeypatch.setattr(*((checkpoints, full) if full == "save_file" else (torch, "save")), fail)
    with pytest.raises(RunError, match=rf"cannot write .*step-00000005/{full_file}") as caught:
        _save(tmp_path, 5)
    assert "\n" not in caught.value.message
    assert re.fullmatch(r"It needs about 1 KiB; [\d,.]+ MiB are free there\.", str(caught.value.hint))
    assert last_checkpoint(tmp_path) == before


def test_a_checkpoint_replaced_halfway_is_found(tmp_path: Path) -> None:
    _, _, saved = _save(tmp_path)
    previous = saved.rename(saved.with_name(saved.name + ".previous-emrrg"))
    assert last_checkpoint(tmp_path) == previous
    model, optimizer = _trained(0)
    assert load_checkpoint(previous, model, optimizer, None, 0).step == int(saved.name.removeprefix("step-"))
    _save(tmp_path, 8)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last", "step-00000008"]


def test_a_checkpoint_of_the_same_step_is_written_anew(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    model, optimizer = _trained(7)
    saved = save_checkpoint(tmp_path, model, optimizer, None, Progress(step=3), [rng_state()])
    other, other_optimizer = _trained(1)
    load_checkpoint(saved, other, other_optimizer, None, 0)
    assert torch.equal(other[0].weight, model[0].weight)


def test_the_end_of_a_validation_changes_only_the_progress(tmp_path: Path) -> None:
    _, _, saved = _save(tmp_path, 3, validation_due=True)
    before = (saved / "state.pt").read_bytes()
    save_progress(tmp_path, Progress(step=3, best=[0.5, -1.0], best_step=3))
    model, optimizer = _trained(1)
    assert load_checkpoint(saved, model, optimizer, None, 0) == Progress(step=3, best=[0.5, -1.0], best_step=3)
    assert (saved / "state.pt").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _, _, saved = _save(tmp_path)
    wider, optimizer = _trained(1, width=5)
    with pytest.raises(RunError, match=r"0\.(weight|bias) is \[4.*, the model has \[5"):
        load_checkpoint(saved, wider, optimizer, None, 0)
    more = nn.Sequential(*wider, nn.Linear(2, 2))
    with pytest.raises(RunError, match=r"trainable parameters are not those of the recipe, starting with 2\.bias"):
        load_checkpoint(saved, more, optimizer, None, 0)


@pytest.mark.parametrize("file", ["trainable.safetensors", "state.pt", "progress.json"])
def test_a_broken_checkpoint_is_named(tmp_path: Path, file: str) -> None:
    _, _, saved = _save(tmp_path)
    (saved / file).write_bytes((saved / file).read_bytes()[:20])
    model, optimizer = _trained(1)
    before = model[0].weight.detach().clone()
    with pytest.raises(RunError, match="step-00000003: this checkpoint cannot be read"):
        load_checkpoint(saved, model, optimizer, None, 0)
    assert torch.equal(model[0].weight, before)


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(RunError, match=r"cannot write .*step-00000003: the disk is full"):
        _save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _break(directory: Path, what: str) -> None:
    last, step = directory / "last", directory / "step-00000005"
    match what:
        case "no last":
            last.unlink()
        case "empty last":
            last.write_text("")
        case "binary last":
            last.write_bytes(b"\xff\xfe\x00")
        case "last names another":
            last.write_text("step-00000009\n")
        case "last leads elsewhere":
            last.write_text("../../etc\n")
        case "last is a link":
            last.unlink()
            last.symlink_to("/dev/zero")
        case "last is a directory":
            last.unlink()
            last.mkdir()
        case "last is a pipe":
            last.unlink()
            os.mkfifo(last)
        case _:
            (step / what).unlink()


_LOST = ("no last", "empty last", "binary last", "last names another", "last leads elsewhere", "last is a link",
         "last is a directory", "last is a pipe")  # fmt: skip


@pytest.mark.parametrize("what", _LOST)
def test_the_newest_complete_checkpoint_is_used_without_last(tmp_path: Path, what: str) -> None:
    _, _, newest = _save(tmp_path / "checkpoints", 5)
    shutil.copytree(newest, newest.with_name("step-00000003"))
    _break(tmp_path / "checkpoints", what)
    assert require_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("file", ["state.pt", "trainable.safetensors", "progress.json"])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, file: str) -> None:
    _, _, newest = _save(tmp_path / "checkpoints", 5)
    _break(tmp_path / "checkpoints", file)
    with pytest.raises(RunError, match="the checkpoint of this run is lost: step-00000005 is not complete"):
        require_checkpoint(tmp_path)
    assert newest.is_dir()


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    assert require_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000005.tmp-host-12-0123abcd").mkdir(parents=True)  # a kill during the first
    assert require_checkpoint(tmp_path) is None
    (tmp_path / "model").mkdir()
    with pytest.raises(RunError, match="there is none left"):
        require_checkpoint(tmp_path)


def test_a_newer_checkpoint_is_never_removed(tmp_path: Path) -> None:
    _save(tmp_path, 8)
    _save(tmp_path, 3)
    _save(tmp_path, 5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last", "step-00000005", "step-00000008"]
    assert last_checkpoint(tmp_path) == tmp_path / "step-00000005"


@pytest.mark.parametrize("file", ["trainable.safetensors", "state.pt"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_flipped_bit_is_noticed(tmp_path: Path, file: str, place: float) -> None:
    _, _, saved = _save(tmp_path)
    data = bytearray((saved / file).read_bytes())
    data[int(place * len(data))] ^= 16
    (saved / file).write_bytes(data)
    model, optimizer = _trained(1)
    with pytest.raises(RunError, match=rf"this checkpoint cannot be read: .*{file} is damaged"):
        load_checkpoint(saved, model, optimizer, None, 0)


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, saved = _save(tmp_path)
    (saved / "checksums.json").unlink()
    model, optimizer = _trained(1)
    assert load_checkpoint(saved, model, optimizer, None, 0).step == 3
    assert capsys.readouterr().err.count("has no checksums (an earlier version wrote it)") == 1


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_one_value_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    model, optimizer = _trained()
    with torch.no_grad():
        model[0].bias[0] = value
    saved = save_checkpoint(tmp_path, model, optimizer, None, Progress(step=3), [rng_state()])
    with pytest.raises(RunError, match=r"0\.bias has values that are not finite"):
        load_checkpoint(saved, *_trained(), None, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 4},
        {"step": -1},
        {"step": 3.0},
        {"step": True},
        {"epoch": 10**30},
        {"best": [0.1]},
        {"best": [float("nan"), 1.0]},
        {"best": ["a", "b"]},
        {"best_step": 9},
        {"unknown": 1},
    ],
)
def test_an_impossible_progress_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    _, _, saved = _save(tmp_path)
    record = json.loads((saved / "progress.json").read_text()) | change
    (saved / "progress.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="step-00000003: this checkpoint cannot be read"):
        load_checkpoint(saved, *_trained(1), None, 0)


def test_slow_checkpoints_take_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(run_checkpoints.time, "monotonic", lambda: clock[0])

    def save(*arguments: Any) -> None:
        clock[0] += seconds

    monkeypatch.setattr(run_checkpoints, "save_checkpoint", save)
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True, scaler=None, wait_for_everyone=lambda: None)
    optimizer = SimpleNamespace(optimizer=None)
    run = run_checkpoints.RunCheckpoints(tmp_path, None, optimizer, accelerator, None, lambda: None)
    assert run.affordable()  # the first
    seconds = 0.5
    run.save(Progress())
    assert run.affordable()  # a fast one may be repeated at once
    seconds = 3.0
    run.save(Progress())
    clock[0] += 59.0
    assert not run.affordable()
    clock[0] += 1.5
    assert run.affordable()
