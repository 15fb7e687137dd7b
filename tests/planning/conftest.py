"""Trials of one round."""

from __future__ import annotations

import pytest

from emrrg_cli.planning import trial


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_ROUNDS", 1)
