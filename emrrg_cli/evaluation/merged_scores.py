"""Reads scores that other tools computed from the same reports, to show them in our table and page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError
from emrrg_cli.files.records import read_bounded

_MAX_BYTES = 64 * 2**20
_MAX_SCORES = 200


def read_merged(path: Path) -> dict[str, float]:
    """Reads the numbers in a JSON file of scores; a number in a nested object gets the name `outer.inner`.

    Lists (such as scores of single studies) and texts are ignored. RadEval writes such a file.

    Raises:
        UsageError: The file cannot be read, or contains no number.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 20} MB, so it is not a file of scores")
        content = json.loads(read_bounded(path, _MAX_BYTES))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON file: {error}") from error
    found = _numbers(content.get("scores", content)) if isinstance(content, Mapping) else {}
    if not found:
        raise UsageError(f"{path} contains no scores", hint='Expected {"name": number, ...}.')
    if len(found) > _MAX_SCORES:
        raise UsageError(f"{path} contains {len(found)} numbers, more than the limit of {_MAX_SCORES} scores")
    return found


def _numbers(content: Any, before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            name = f"{before}{printable(str(key))}"
            if isinstance(value, Mapping):
                found |= _numbers(value, f"{name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                found[name] = float(value)
    return found
