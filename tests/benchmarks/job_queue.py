"""Runs commands of emrrg on the GPUs of one machine: several at a time on each, in order, each after the jobs it needs.

A call may end before all jobs are finished: SIGTERM stops training, and the next call resumes it. Finished jobs are not
repeated. `WORK/records.json` lists finished jobs with their seconds; logs are in `WORK/logs`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRAININGS = ("pretrain", "align", "finetune")
STOPPED = (130, 143)  # exit codes of a command that a signal stopped, with its work saved
GRACE_S = 45.0  # time for a checkpoint after SIGTERM
LEAST_S = 60.0  # training is not started with less time
UNKNOWN_S = 90.0  # expected time of a command if none of its kind has finished yet


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: name of its record and its log.
        arguments: arguments of emrrg; training also gets `--output`, and `--resume` if it was started before.
        output: output of the job; a needed job whose output is missing runs again.
        needs: names of jobs that must finish before.
        weight: fraction of a GPU that it takes.
    """

    name: str
    arguments: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    weight: float = 1.0

    @property
    def is_training(self) -> bool:
        return self.arguments[0] in TRAININGS

    def command(self) -> list[str]:
        """Returns the command line for now."""
        command = [sys.executable, "-m", "emrrg_cli", *self.arguments]
        if self.is_training:
            command += ["--output", str(self.output), "--num-processes", "1"]
            command += ["--resume"] if (self.output / "recipe.yaml").exists() else []
        return command


@dataclass
class Records:
    """Records of finished jobs by name; the file is rewritten after each change."""

    file: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Records:
        return cls(file, json.loads(file.read_text()) if file.exists() else {})

    def update(self, name: str, **values: Any) -> None:
        self.entries.setdefault(name, {}).update(values)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.entries, indent=1) + "\n")
        partial.replace(self.file)

    def is_done(self, job: Job) -> bool:
        """Whether a job has finished with the same arguments.

        Raises:
            SystemExit: it has finished with other arguments.
        """
        entry = self.entries.get(job.name, {})
        if entry.get("done") and entry["arguments"] != list(job.arguments):
            changed = set(entry["arguments"]) ^ set(job.arguments)
            sys.exit(f"{self.file}: {job.name} was done with other settings ({sorted(changed)}): name another WORK")
        return bool(entry.get("done"))

    def longest(self, kind: str) -> float:
        """Estimates the seconds of a command: the longest of its kind, and a little more."""
        known = [entry["seconds"] for entry in self.entries.values() if entry.get("done") and entry.get("kind") == kind]
        return 1.3 * max(known) if known else UNKNOWN_S


@dataclass
class Running:
    job: Job
    gpu: int
    process: subprocess.Popen[bytes]
    began: float


class Queue:
    """Runs jobs.

    Args:
        jobs: jobs in order of importance, including all jobs they need.
        work: folder of records and logs.
        gpus: number of GPUs; 0: the CPU counts as one.
        when_done: called with a job that has just finished; its result goes into the record.
        on_change: called after each finished job, when its record is written.
        mps: whether NVIDIA MPS runs on each GPU while the jobs run: several jobs then compute at the same time.
        taken: fraction of each GPU that other programs use; missing ones: none.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        work: Path,
        gpus: int,
        when_done: Callable[[Job], dict[str, Any]] = lambda job: {},
        *,
        on_change: Callable[[Records], None] = lambda records: None,
        mps: bool = False,
        taken: Sequence[float] = (),
    ) -> None:
        self.jobs = {job.name: job for job in jobs}
        self.work, self.gpus, self.mps = work, gpus, mps
        self.taken = [*taken, *[0.0] * max(1, gpus)][: max(1, gpus)]
        self.when_done, self.on_change = when_done, on_change
        (work / "logs").mkdir(parents=True, exist_ok=True)
        self.records = Records.read(work / "records.json")
        self.running: list[Running] = []
        self.failed: set[str] = set()

    def run(self, goals: Sequence[str], minutes: float | None) -> bool:
        """Runs all jobs that the goals need; returns whether all goals are finished."""
        length = float("inf") if minutes is None else 60 * minutes - GRACE_S
        end = time.monotonic() + length
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._switch_mps("-d")
            while True:
                self._collect()
                waiting = self._waiting(goals)
                if not waiting and not self.running:
                    break
                if time.monotonic() >= end:
                    break
                started = self._start_first(waiting, end, 0.8 * length)
                if not started and not self.running:
                    break  # no job fits into the remaining time, or all remaining jobs need a failed one
                if not started:
                    time.sleep(0.5)
        finally:
            self._stop()
            self._switch_mps()
            signal.signal(signal.SIGTERM, before)
        return all(self.records.is_done(self.jobs[name]) for name in goals)

    def _waiting(self, goals: Sequence[str]) -> list[Job]:
        """Returns the unfinished jobs in order, each after the jobs it needs."""
        found: dict[str, Job] = {}

        def add(name: str, *, needed: bool) -> None:
            job = self.jobs[name]
            if name in found or (self.records.is_done(job) and (not needed or job.output.exists())):
                return
            for other in job.needs:
                add(other, needed=True)
            found[name] = job

        for name in goals:
            add(name, needed=False)
        return list(found.values())

    def _start_first(self, waiting: Sequence[Job], end: float, most: float) -> bool:
        """Starts the first job that is ready, fits on a GPU, and is expected to take at most `most` seconds."""
        open_names = {job.name for job in waiting}
        busy = {running.job.name for running in self.running}
        left = end - time.monotonic()
        free = [1.0 - used - sum(r.job.weight for r in self.running if r.gpu == i) for i, used in enumerate(self.taken)]
        for job in waiting:
            if job.name in busy or job.name in self.failed or open_names & set(job.needs):
                continue
            if left < (LEAST_S if job.is_training else min(most, self.records.longest(job.arguments[0]))):
                continue
            gpu = max(range(len(free)), key=lambda gpu: free[gpu])
            if free[gpu] < job.weight - 1e-6:
                free[gpu] = -1.0  # reserved for this job; others may start elsewhere
                continue
            self._start(job, gpu)
            return True
        return False

    def _start(self, job: Job, gpu: int) -> None:
        visible = "" if not self.gpus else "0" if self.mps else str(gpu)  # a daemon of MPS shows its GPU alone
        threads = max(1, (os.cpu_count() or 1) // (4 * max(1, self.gpus)))  # as if four ran on each GPU
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {"CUDA_VISIBLE_DEVICES": visible}
        environment |= self._mps_of(gpu) if self.mps else {}
        with (self.work / "logs" / f"{job.name}.txt").open("ab") as log:
            process = subprocess.Popen(job.command(), stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.running.append(Running(job, gpu, process, time.monotonic()))
        print(f"{job.name}: started{f' on GPU {gpu}' if self.gpus else ''}", flush=True)

    def _mps_of(self, gpu: int) -> dict[str, str]:
        folder = Path(tempfile.gettempdir()) / f"emrrg-mps-{os.getpid()}-{gpu}"  # sockets need short paths
        folder.mkdir(exist_ok=True)
        return {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}

    def _switch_mps(self, *arguments: str) -> None:
        """Starts MPS on each GPU with `-d`, and ends it without."""
        for gpu in range(self.gpus if self.mps else 0):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)} | self._mps_of(gpu)
            command = ["nvidia-cuda-mps-control", *arguments]
            subprocess.run(command, input=b"" if arguments else b"quit\n", env=environment, check=bool(arguments))

    def _collect(self) -> None:
        for running in [running for running in self.running if running.process.poll() is not None]:
            self.running.remove(running)
            self._ended(running)

    def _ended(self, running: Running) -> None:
        job, code = running.job, running.process.returncode
        seconds = time.monotonic() - running.began
        seconds += self.records.entries.get(job.name, {}).get("seconds", 0.0)
        entry = {"kind": job.arguments[0], "arguments": list(job.arguments), "seconds": round(seconds, 1)}
        if code == 0:
            self.records.update(job.name, **entry, done=True, **self.when_done(job))
            print(f"{job.name}: done after {seconds:.0f} s", flush=True)
            self.on_change(self.records)
        elif code in STOPPED:
            self.records.update(job.name, **entry)
            print(f"{job.name}: stopped after {seconds:.0f} s; the next call continues it", flush=True)
        else:
            self.failed.add(job.name)
            log = self.work / "logs" / f"{job.name}.txt"
            print(f"{job.name}: failed with {code}; see {log}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        for running in self.running:
            running.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE_S
        for running in self.running:
            try:
                running.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        self._collect()


def peak_memory(log: Path) -> float | None:
    """Returns the MiB of GPU memory in the summary of a training run; None if it has none."""
    found = re.findall(r"peak GPU memory\D*([\d,]+) MiB", log.read_text(errors="replace"))
    return max(float(number.replace(",", "")) for number in found) if found else None
