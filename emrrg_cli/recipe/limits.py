"""Largest values in a recipe: far above realistic training, but small enough that no machine hangs."""

from __future__ import annotations

import os
from typing import Any

MAX_BYTES = 2**20  # of a recipe file
MAX_VALUES = 20_000  # keys and values of a recipe, counting every use of an alias
MAX_DEPTH = 16  # sections and lists inside each other
MAX_DIGITS = 30  # of a number
MAX_TEXT = 20_000  # characters of one value
_MAX_NAME = 255  # bytes of a file name, on every common file system
_MAX_PATH = 4096

# Largest value by the name of a setting in any section; None is the limit of all other numbers.
_LARGEST: dict[str | None, float] = {
    None: 10**9,
    "d_model": 2**14,
    "depth": 2**10,
    "d_state": 2**12,
    "image_size": 2**13,
    "decoder_width": 2**14,
    "decoder_depth": 2**10,
    "hidden_size": 2**16,
    "layers": 2**10,
    "heads": 2**10,
    "kv_heads": 2**10,
    "vocab_size": 10**6,
    "dim": 2**16,
    "rank": 2**14,
    "batch_size": 10**6,
    "micro_batch_size": 10**6,
    "workers": 2**10,
    "epochs": 10**6,
    "lr": 1000.0,
    "min_lr": 1000.0,
    "num_beams": 2**10,
    "max_new_tokens": 10**5,
    "max_report_tokens": 10**5,
    "max_text_tokens": 10**5,
    "seed": 2**31,
}
_PATHS = ("root", "weights", "output", "name")


def check_size(name: str | None, value: Any) -> None:
    """Checks that the value of a setting is not absurdly large.

    Args:
        name: The last part of its key.

    Raises:
        ValueError: The value is too large; the message gives the limit.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        largest = _LARGEST.get(name, _LARGEST[None])
        if abs(value) > largest:
            raise ValueError(f"must be {largest:.10g} or less, got {value:.6g}")
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"must have at most {MAX_TEXT:,} characters, got {len(value):,}")
        parts = os.fsencode(value).split(b"/") if name in _PATHS else []
        if parts and (len(os.fsencode(value)) > _MAX_PATH or max(map(len, parts)) > _MAX_NAME):
            raise ValueError(f"not a valid path: a name has at most {_MAX_NAME} bytes and a path {_MAX_PATH}")
    elif isinstance(value, list):
        for item in value:
            check_size(name, item)
    elif isinstance(value, dict):
        for item in value.values():
            check_size(name, item)
