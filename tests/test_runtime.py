"""Threads that fit what is free, and advice where other programs slow a training down."""

from __future__ import annotations

import os
import subprocess
import sys

import joblib
import psutil
import pytest
import torch

from emrrg_cli import runtime
from emrrg_cli.runtime import fit_threads, slowdown_advice


def _model(parameters: int) -> torch.nn.Module:
    """A model with this many parameters and no memory."""
    return torch.nn.Linear(parameters, 1, bias=False, device="meta")


@pytest.mark.parametrize(
    ("cores", "load", "parameters", "writing", "threads"),
    [
        (2, 0.1, 10**6, False, 2),
        (2, 9.0, 10**6, False, 1),
        (64, 0.0, 10**6, False, 4),
        (64, 0.0, 10**8, False, 64),
        (64, 40.0, 10**8, True, 24),
        (64, 90.0, 10**8, True, 16),
        (1, 0.0, 10**8, True, 1),
        (2, 0.1, 10**6, True, 1),
    ],
)
def test_threads_fit_load_and_model(
    monkeypatch: pytest.MonkeyPatch, cores: int, load: float, parameters: int, writing: bool, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen: list[int] = []
    monkeypatch.setattr(runtime.torch, "set_num_threads", chosen.append)
    fit_threads(_model(parameters), writing=writing)
    assert chosen == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    fit_threads(_model(parameters), writing=writing)
    assert chosen == [threads]


def test_advice_only_if_other_programs_are_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (15.0, 1.0, 1.0))
    assert "load 15 on 2 cores" in str(slowdown_advice(14.0, 0.2))
    assert slowdown_advice(0.5, 0.2) is None
    assert slowdown_advice(14.0, 1.8) is None  # a large model
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.0, 1.0, 1.0))
    assert slowdown_advice(14.0, 0.2) is None


def test_threads_wait_passively_by_default() -> None:
    code = "import os, emrrg_cli; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if given is not None:
            environment["OMP_WAIT_POLICY"] = given
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == expected
