"""Modules that the tests of the labeler share, loaded from their files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_HERE = Path(__file__).parent


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where typing.NamedTuple looks up annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hard_sentences() -> ModuleType:
    """`hard_sentences.py`: DEVELOPMENT, HELD_OUT and CODES."""
    return _load("labeling_hard_sentences", _HERE / "hard_sentences.py")


@pytest.fixture(scope="session")
def benchmark() -> ModuleType:
    """`tests/benchmarks/labeler.py`: reads IU X-Ray's annotation and counts agreement."""
    return _load("labeling_benchmark", _HERE.parent / "benchmarks" / "labeler.py")
