"""Errors for people: what is wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path


class EmrrgError(Exception):
    """A failure with one clear message. The command line prints it without a traceback (`--debug` shows one).

    Args:
        message: What is wrong, in one sentence, naming the file, key or row.
        hint: What the user can do next; printed on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class RunError(EmrrgError):
    """The request is valid, but the run failed: exit code 1."""


class UsageError(EmrrgError):
    """Wrong usage or a wrong recipe: exit code 2."""

    exit_code = 2


class Interrupted(BaseException):
    """Stopped by a signal, such as Ctrl-C, after the finished work was saved. Exit code: 128 + the signal's number.

    Like `KeyboardInterrupt`, it is not an `Exception`: code that treats exceptions of a decoder as broken files must
    not catch it.
    """

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 130) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def require_report(text: object) -> str:
    """Returns a report that was given in Python.

    Raises:
        UsageError: It is not a text.
    """
    if not isinstance(text, str):
        raise UsageError(f"a report must be a text, not {type(text).__name__}", hint='An empty report is "".')
    return text


def require_path(value: object, what: str) -> Path:
    """Returns a path that was given in Python.

    Args:
        what: What it names, such as `the run directory`.

    Raises:
        UsageError: It is neither a text nor a path.
    """
    if not isinstance(value, str | Path):
        raise UsageError(f"{what} must be a path, not {type(value).__name__}", hint="Give a text or a pathlib.Path.")
    return Path(value)
