"""Advice of libraries does not reach the user."""

from __future__ import annotations

import warnings

from torch.utils.data import DataLoader

from emrrg_cli.silence_libraries import silence_libraries


def test_more_workers_than_cores_are_no_warning() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        DataLoader(range(2), num_workers=4096)  # type: ignore[arg-type]
        assert told  # what torch says without us
        silence_libraries()
        told.clear()
        DataLoader(range(2), num_workers=4096)  # type: ignore[arg-type]
        assert not told
