"""Finds the default model of the package, and reads the limits of a run's model."""

from __future__ import annotations

from pathlib import Path

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.records import read_bounded

LIMITS = "limits.txt"
SYNTHETIC_ONLY = "this model knows synthetic films only"
_LONGEST = 1000  # bytes


def default_model_dir() -> Path:
    """Returns the folder of the default model, whether it exists or not."""
    return Path(__file__).resolve().parent / "box"


def find_default_model(hint: str) -> Path:
    """Returns the run directory of the default model.

    Args:
        hint: What to do without it.

    Raises:
        UsageError: The package has none.
    """
    folder = default_model_dir()
    if not (folder / "model").is_dir():
        raise UsageError("this installation has no default model", hint=hint)
    return folder


def read_limits(run_dir: Path) -> str:
    """Returns the limits of a run's model, one sentence without a full stop; "" if the run has none.

    Raises:
        RunError: The file cannot be read.
    """
    file = run_dir / LIMITS
    if not file.exists():
        return ""
    try:
        return " ".join(read_bounded(file, _LONGEST).decode("utf-8").split()).rstrip(".")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise RunError(f"{file}, the limits of a model, cannot be read: {reason}") from error
