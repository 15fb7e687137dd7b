"""Precision, processes and the record of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.runtime import choose_precision, llm_dtype, make_accelerator
from emrrg_cli.training.environment import (
    first_environment,
    git_revision,
    make_trackers,
    record_environment,
    start_trackers,
)


def test_auto_is_bf16_on_a_gpu_that_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("auto", "cpu") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_precision("auto", "cuda") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_precision("auto", "cuda") == "fp32"
    assert choose_precision("bf16", "cpu") == "bf16"
    assert choose_precision("fp16", "cuda") == "fp16"


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        choose_precision("fp16", "cpu")


def test_a_frozen_llm_has_the_dtype_of_training_by_default() -> None:
    assert llm_dtype("auto", "bf16") is torch.bfloat16
    assert llm_dtype("auto", "fp32") is torch.float32
    assert llm_dtype("fp16", "fp32") is torch.float16


def test_the_number_of_processes_is_checked() -> None:
    assert make_accelerator("fp32", 1).num_processes == make_accelerator("fp32", 0).num_processes == 1
    with pytest.raises(RunError, match="3 processes were requested, but 1 started"):
        make_accelerator("fp32", 3)


def test_the_precision_may_change_from_one_command_to_the_next() -> None:
    assert [make_accelerator(precision, 0).mixed_precision for precision in ("fp32", "bf16", "fp32")] == [
        "no",
        "bf16",
        "no",
    ]


def test_the_record_names_versions_device_and_command(tmp_path: Path) -> None:
    record_environment(tmp_path, make_accelerator("fp32", 0), "fp32", "reference")
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["command"] == sys.argv
    assert (record["processes"], record["precision"], record["scan"]) == (1, "fp32", "reference")
    assert set(record) >= {"started", "python", "platform", "git_revision", "device"}


def test_the_record_of_the_start_stays_when_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = make_accelerator("fp32", 0)
    assert first_environment(tmp_path) is None
    record_environment(tmp_path, accelerator, "fp32", "reference")
    first = first_environment(tmp_path)
    for scan in ("recompute", "auto"):
        monkeypatch.setattr(sys, "argv", ["emrrg", "--resume", scan])
        record_environment(tmp_path, accelerator, "fp32", scan)
    record = json.loads((tmp_path / "environment.json").read_text())
    resumed = record.pop("resumed")
    assert record == first
    assert [(entry["scan"], entry["command"][-1]) for entry in resumed] == [
        ("recompute", "recompute"),
        ("auto", "auto"),
    ]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_broken_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(RunError, match=r"environment\.json, the record of this run's environment, cannot be read"):
        record_environment(tmp_path, make_accelerator("fp32", 0), "fp32", "reference")
    assert (tmp_path / "environment.json").read_text() == content


# A package named wandb that notes what it is given.
WANDB = """
import json
from pathlib import Path

def init(**options):
    if options["name"] == "refused":
        raise RuntimeError("no login\\nat all")
    return Run(options)

class Run:
    def __init__(self, options):
        self.file = Path(options["dir"]) / "wandb.jsonl"
        self.note(options)

    def note(self, row):
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\\n")

    def log(self, row, step):
        self.note(row | {"step": step})

    def finish(self):
        self.note({"finished": True})
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "wandb-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    (tmp_path / "site" / "wandb-1.0.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


@pytest.mark.usefixtures("wandb")
def test_wandb_gets_project_name_and_recipe(tmp_path: Path) -> None:
    run = tmp_path / "long-lr3"
    run.mkdir()
    recipe = {"train": {"lr": 1e-4}}
    accelerator = make_accelerator("fp32", 0, make_trackers(["tensorboard", "wandb"], run, recipe))
    start_trackers(accelerator)
    accelerator.log({"train/loss": 1.5}, step=3)
    accelerator.end_training()
    told, *logged = [json.loads(line) for line in (run / "wandb.jsonl").read_text().splitlines()]
    assert told == {"project": "emrrg", "name": "long-lr3", "dir": str(run), "config": recipe}
    assert logged == [{"train/loss": 1.5, "step": 3}, {"finished": True}]
    assert len(list((run / "tracking").glob("events.out.tfevents.*"))) == 1


@pytest.mark.usefixtures("wandb")
def test_a_tracker_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "refused"
    run.mkdir()
    with pytest.raises(RunError) as caught:
        start_trackers(make_accelerator("fp32", 0, make_trackers(["wandb"], run, {})))
    assert caught.value.message == "train.trackers: a tracker does not start: no login"
    assert "WANDB_MODE=offline" in str(caught.value.hint)


def test_the_revision_is_that_of_the_checkout_or_none(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    assert git_revision(tmp_path / "none") is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    git("tag", "v1")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
