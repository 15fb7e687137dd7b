"""Processes that wait for another one's file."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError
from emrrg_cli.training.heartbeat import beating, wait_for


def test_a_dead_writer_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no longer responds"):
        wait_for(tmp_path / "file", tmp_path / "beat", patience_s=0.3)


def test_a_living_writer_is_waited_for(tmp_path: Path) -> None:
    def write() -> None:
        with beating(tmp_path / "beat", every_s=0.05):
            time.sleep(1.2)
        (tmp_path / "file").touch()

    writer = threading.Thread(target=write)
    writer.start()
    wait_for(tmp_path / "file", tmp_path / "beat", patience_s=0.6)
    writer.join()
    assert not (tmp_path / "beat").exists()
