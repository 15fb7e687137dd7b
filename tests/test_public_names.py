"""The names that `emrrg_cli` has for Python."""

from __future__ import annotations

import pytest

import emrrg_cli


def test_every_public_name_has_a_home() -> None:
    assert set(emrrg_cli.__all__) == set(emrrg_cli._HOMES) <= set(dir(emrrg_cli))
    for name in emrrg_cli.__all__:
        assert getattr(emrrg_cli, name).__name__ == name


def test_the_errors_of_public_functions_are_public() -> None:
    assert issubclass(emrrg_cli.ImageError, emrrg_cli.RunError)
    assert issubclass(emrrg_cli.RunError, emrrg_cli.EmrrgError)
    with pytest.raises(emrrg_cli.UsageError, match="must be lists of texts, not one text"):
        emrrg_cli.score(["clear"], "clear")  # type: ignore[arg-type]
