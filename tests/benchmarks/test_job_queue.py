"""The queue of the benchmarks: order, places on GPUs, what is kept, and the end of a call."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import iu_xray
import job_queue
from job_queue import Job, Queue, Records, Running

# Says when it began and on which GPU; a training goes on until it is stopped or has run twice.
_CODE = """
import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])
def stopped(*_):
    out.with_suffix(".stopped").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stopped)
out.with_suffix(".gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
if sys.argv[2] == "fail":
    sys.exit(1)
if sys.argv[2] == "long" and not out.with_suffix(".stopped").exists():
    time.sleep(60)
time.sleep(0.3)
out.touch()
"""


@dataclass(frozen=True)
class Fake(Job):
    how: str = "well"

    def command(self) -> list[str]:
        return [sys.executable, "-c", _CODE, str(self.output), self.how]


def _job(folder: Path, name: str, *needs: str, kind: str = "finetune", how: str = "well", weight: float = 0.5) -> Fake:
    return Fake(name, (kind, name), folder / name, needs, weight, how)


@pytest.mark.slow
def test_jobs_run_after_what_they_need_and_once(tmp_path: Path) -> None:
    jobs = [_job(tmp_path, name, *needs) for name, *needs in (("a",), ("b", "a"), ("c", "a"), ("d", "b"), ("other",))]
    seen: list[int] = []

    def count(records: Records) -> None:
        seen.append(len(records.entries))

    queue = Queue(jobs, tmp_path, 2, lambda job: {"kept": job.name}, on_change=count)
    assert queue.run(["d", "c"], None)
    assert seen == [1, 2, 3, 4]
    done = {name: (tmp_path / name).stat().st_mtime for name in "abcd"}
    assert done["a"] < done["b"] < done["d"]
    assert not (tmp_path / "other").exists()
    assert queue.records.entries["d"]["kept"] == "d"
    # Finished goals stay so without what they were made from; what is needed again is made again.
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    assert Queue(jobs, tmp_path, 2).run(["d", "c"], None)
    assert not (tmp_path / "a").exists()
    more = [*jobs, _job(tmp_path, "e", "b")]
    assert Queue(more, tmp_path, 2).run(["d", "e"], None)
    assert (tmp_path / "a").exists()
    with pytest.raises(SystemExit, match="d was done with other settings"):
        Queue([*jobs[:3], Fake("d", ("finetune", "d", "new"), tmp_path / "d")], tmp_path, 2).run(["d"], None)


def test_mps_runs_on_each_gpu_while_jobs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "nvidia-cuda-mps-control"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "${{1:-$(cat)}} $CUDA_VISIBLE_DEVICES $CUDA_MPS_PIPE_DIRECTORY" >> {tmp_path}/mps.txt\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    jobs = [_job(tmp_path, "a"), _job(tmp_path, "b")]
    assert Queue(jobs, tmp_path, 2, mps=True).run(["a", "b"], None)
    calls = [line.split() for line in (tmp_path / "mps.txt").read_text().splitlines()]
    assert [call[:2] for call in calls] == [["-d", "0"], ["-d", "1"], ["quit", "0"], ["quit", "1"]]
    assert calls[0][2] == calls[2][2] != calls[1][2] == calls[3][2]
    assert [(tmp_path / f"{name}.gpu").read_text() for name in "ab"] == ["0", "0"]  # each daemon shows one GPU


@pytest.mark.slow
def test_gpus_are_shared_by_weight(tmp_path: Path) -> None:
    jobs = [_job(tmp_path, f"j{i}") for i in range(4)] + [_job(tmp_path, "whole", weight=1.0)]
    queue = Queue(jobs, tmp_path, 2)
    seen: list[list[float]] = []
    start = queue._start

    def watched(job: Job, gpu: int) -> None:
        start(job, gpu)
        seen.append([sum(r.job.weight for r in queue.running if r.gpu == gpu) for gpu in (0, 1)])

    queue._start = watched  # type: ignore[method-assign]
    assert queue.run([job.name for job in jobs], None)
    assert max(max(weights) for weights in seen) == 1.0
    assert {(tmp_path / f"j{i}.gpu").read_text() for i in range(4)} == {"0", "1"}


def test_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    jobs = [_job(tmp_path, "bad", how="fail"), _job(tmp_path, "after", "bad"), _job(tmp_path, "good")]
    queue = Queue(jobs, tmp_path, 1)
    assert not queue.run(["after", "good"], None)
    assert queue.failed == {"bad"}
    assert not (tmp_path / "after").exists()
    assert (tmp_path / "good").exists()


class _Clock:
    """Stands still until there is a file; then so many seconds have passed."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self.seconds, self.sleep = file, seconds, time.sleep

    def monotonic(self) -> float:
        return self.seconds if self.file.exists() else 0.0


@pytest.mark.slow
def test_a_call_ends_in_time_and_the_next_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "GRACE_S", 60.0)
    monkeypatch.setattr(job_queue, "LEAST_S", 0.5)
    jobs = [_job(tmp_path, "long", how="long"), _job(tmp_path, "a"), _job(tmp_path, "score", "a", kind="evaluate")]
    before = signal.getsignal(signal.SIGTERM)
    # Time passes on a clock of the test, which waits for a job: each call may take two seconds.
    with monkeypatch.context() as patch:
        patch.setattr(job_queue, "time", _Clock(tmp_path / "long.gpu", 3.0))
        assert not Queue(jobs, tmp_path, 1).run(["long"], 62 / 60)
        # Whether it ends within a call is not known: it is started only where most of the call is left.
        patch.setattr(job_queue, "time", _Clock(tmp_path / "a", 0.6))
        assert not Queue(jobs, tmp_path, 1).run(["score"], 62 / 60)
    assert (tmp_path / "a").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "long.stopped").exists()
    assert not (tmp_path / "score").exists()
    first = Queue(jobs, tmp_path, 1).records.entries["long"]["seconds"]
    queue = Queue(jobs, tmp_path, 1)
    assert queue.run(["long", "score"], None)
    assert queue.records.entries["long"]["seconds"] > first


def test_jobs_leave_the_share_of_other_programs(tmp_path: Path) -> None:
    queue = Queue([], tmp_path, 2, taken=[0, 0.5])
    jobs = [_job(tmp_path, name) for name in "abcd"]
    started: list[int] = []

    def start(job: Job, gpu: int) -> None:
        started.append(gpu)
        queue.running.append(Running(replace(job, weight=0.5), gpu, None, 0.0))  # type: ignore[arg-type]

    queue._start = start  # type: ignore[method-assign]
    jobs = [replace(job, weight=0.5) for job in jobs]
    while queue._start_first(jobs, float("inf"), 1.0):
        pass
    assert started == [0, 0, 1]


def test_rows_share_the_stages_before_their_change(tmp_path: Path) -> None:
    options = iu_xray.argparse.Namespace(
        data=str(tmp_path / "iu"), work=tmp_path / "w", tiny=False, each=2, films=[], reports=None,
        recipe="iu_xray/finetune-small", overrides=[], more=[], samples=True, image_controls=[1],
    )  # fmt: skip
    chain = iu_xray.Chain(options)
    rows = [
        iu_xray.Row("X"), iu_xray.parse_row("slow = train.lr=1e-5"), iu_xray.Row("no stage 1", without=("pretrain",)),
        iu_xray.parse_row("no findings = align.model.findings=false"),
        iu_xray.parse_row("longer of X = generation.length_penalty=2"),
    ]  # fmt: skip
    known = {row.name: row for row in rows}
    goals = [chain.goal(row, seed, known, "validation") for seed in (1, 2) for row in rows]
    assert len(goals) == len(set(goals)) == 10
    needs = {job.name: job.needs for job in chain.jobs.values()}
    assert needs["X-1"] == needs["slow-1"] == ("align-1",)
    assert needs["X-2"] == ("align-2",)
    assert needs["align-2"] == ("pretrain-2",)
    assert needs["longer-1-validation"] == needs["X-1-validation"] == ("X-1",)
    assert needs["no-stage-1-1"] == ("align-alone-1",)
    (align,) = needs["no-findings-2"]
    assert align.startswith("align-")
    assert "model.findings=false" in chain.jobs[align].arguments
    assert "train.seed=2" in chain.jobs[align].arguments
    assert needs[align] == ("pretrain-2",)
    assert "generation.length_penalty=2" in chain.jobs["longer-2-validation"].arguments
    assert "train.lr=1e-5" in chain.jobs["slow-1"].arguments
    assert "--image-controls" not in chain.jobs["X-1-validation"].arguments
    assert "evaluation.samples=true" in chain.jobs["X-1-validation"].arguments
    assert chain.jobs["X-1-validation"].output == tmp_path / "w" / "X-1" / "evaluation" / "validation"
    assert "--image-controls" in chain.jobs[chain.goal(rows[0], 1, known, "test")].arguments
    assert "--image-controls" not in chain.jobs[chain.goal(rows[0], 2, known, "test")].arguments
