"""Words that several parts of the program share: the names of splits and views."""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "validation", "test"]


SPLITS: tuple[Split, ...] = ("train", "validation", "test")


UNKNOWN_VIEW = "unknown"
