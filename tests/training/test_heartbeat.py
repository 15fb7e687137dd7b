"""Processes that wait for another one's file, on a clock that the test turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from emrrg_cli.errors import RunError
from emrrg_cli.training import heartbeat
from emrrg_cli.training.heartbeat import beating, wait_for

Waits = Callable[[Callable[[float], None]], float]


@pytest.fixture
def waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Waits:
    """`waits(pause)`: waits for `file`; `pause(now)` is called in each pause, `now` seconds after the start."""

    def wait(pause: Callable[[float], None]) -> float:
        now = 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            assert now < 5000, "waits for ever"
            pause(now)

        with monkeypatch.context() as patch:
            patch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
            wait_for(tmp_path / "file", tmp_path / "beat", patience_s=60)
        return now

    return wait


def _touch(file: Path, now: float) -> None:
    file.touch()
    os.utime(file, ns=(0, round(now * 1e9)))  # two of the system's own times may be the same


def test_a_dead_writer_is_noticed(waits: Waits, tmp_path: Path) -> None:
    moments: list[float] = []

    def pause(now: float) -> None:
        moments.append(now)
        if now < 100:
            _touch(tmp_path / "beat", now)

    with pytest.raises(RunError, match="no longer responds"):
        waits(pause)
    assert moments[-1] == pytest.approx(160, abs=1)


def test_a_writer_that_never_came_is_noticed(waits: Waits) -> None:
    moments: list[float] = []
    with pytest.raises(RunError, match="no longer responds"):
        waits(moments.append)
    assert moments[-1] == pytest.approx(60, abs=1)


def test_a_living_writer_is_waited_for(waits: Waits, tmp_path: Path) -> None:
    def pause(now: float) -> None:
        if now % 50 < 1:
            _touch(tmp_path / "beat", now)
        if now > 1000:
            (tmp_path / "file").touch()

    assert waits(pause) > 1000


def test_a_writer_beats_until_its_end(tmp_path: Path) -> None:
    beat, seen = tmp_path / "beat", set()
    with beating(beat, every_s=0.01):
        end = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < end:
            if beat.exists():
                seen.add(beat.stat().st_mtime_ns)
            time.sleep(0.005)
    assert len(seen) == 3
    assert not beat.exists()
