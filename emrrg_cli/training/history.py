"""The figures of a training run: a line in `history.jsonl` and an entry in the trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.records import append_jsonl, read_jsonl
from emrrg_cli.training.checkpoint import Progress


class History:
    """Writes the figures of a run. Only the main process writes.

    Args:
        run_dir: Directory of `history.jsonl`.
        steps_per_epoch: Optimizer steps in an epoch.
        accelerator: `accelerate.Accelerator`, which passes the figures to the trackers.
        require_run_dir: Called before each write; raises `RunError` if the run directory was removed.
    """

    def __init__(
        self, run_dir: Path, steps_per_epoch: int, accelerator: Any, require_run_dir: Callable[[], None]
    ) -> None:
        self._path = run_dir / "history.jsonl"
        self._steps_per_epoch = steps_per_epoch
        self._accelerator = accelerator
        self._require_run_dir = require_run_dir

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step."""
        if not self._accelerator.is_main_process:
            return
        self._require_run_dir()
        epoch = round(step / self._steps_per_epoch, 6)
        append_jsonl(self._path, {"step": step, "epoch": epoch, **figures})
        self._accelerator.log(dict(figures), step=step)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of the resumed run; empty in all but the main process and without `history.jsonl`.

        Raises:
            RunError: A row has no step.
        """
        if not self._accelerator.is_main_process or not self._path.exists():
            return []
        rows = read_jsonl(self._path)
        if not all(isinstance(row.get("step"), int) for row in rows):
            raise RunError(f"{self._path}: a line has no step", hint="Put it back from a copy, or delete it.")
        return rows

    def keep_until(self, progress: Progress, rows: Sequence[Mapping[str, Any]]) -> None:
        """Removes the rows written after the checkpoint: the resumed run repeats these steps."""
        if self._accelerator.is_main_process and self._path.exists():
            kept = [json.dumps(row) + "\n" for row in rows if _is_done(row, progress)]
            atomic_write_text(self._path, "".join(kept))


def _is_done(row: Mapping[str, Any], progress: Progress) -> bool:
    if row["step"] == progress.step and progress.validation_due:
        return "validation/loss" not in row
    return bool(row["step"] <= progress.step)
