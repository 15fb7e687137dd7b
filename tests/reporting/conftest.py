"""Tests of plots draw them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick_pictures() -> None:
    """Plots are drawn here."""
