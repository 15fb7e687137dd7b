"""The model that travels with the package, and the limits that a run states of its model."""

from __future__ import annotations

from pathlib import Path

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.records import read_bounded

LIMITS = "limits.txt"
SYNTHETIC_ONLY = "this model knows synthetic films only"
_LONGEST = 1000  # bytes


def default_model_dir() -> Path:
    """Where the default model is, if the package has one."""
    return Path(__file__).resolve().parent / "box"


def find_default_model(hint: str) -> Path:
    """The run directory of the default model.

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
    """What a run says that its model cannot do, one sentence without a full stop; "" where it says nothing.

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
