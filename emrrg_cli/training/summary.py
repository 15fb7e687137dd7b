"""How a training run ended, for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table


@dataclass
class Summary:
    """How a training run ended.

    Attributes:
        steps: Optimizer steps of the whole run.
        best: Score and negative loss of the best validation; None if no validation gave finite figures.
        best_step: Step of the best validation.
        reason: Why the run ended.
        samples_per_second: Training rate at the end; None if no step was done.
        peak_memory_mib: Peak GPU memory in MiB; None on a CPU.
        is_main_process: Whether this process prints the summary.
    """

    steps: int
    best: list[float] | None
    best_step: int | None
    reason: str
    samples_per_second: float | None
    peak_memory_mib: float | None
    is_main_process: bool

    def table(self, run_dir: Path) -> Table:
        """Returns the summary as a table for the terminal."""
        table = Table(show_header=False, title=f"run {run_dir}", title_justify="left")
        rows = {"steps": f"{self.steps} ({self.reason})"}
        if self.best is None:
            rows["best validation"] = "none: the result is the model of the last step"
        else:
            score, negative_loss = self.best
            shown = f"score {score:.4f}, " if score else ""
            rows["best validation"] = f"{shown}loss {-negative_loss:.4f}, step {self.best_step}"
        if self.samples_per_second is not None:
            rows["samples per second"] = f"{self.samples_per_second:.2f}"
        if self.peak_memory_mib is not None:
            rows["peak GPU memory"] = f"{self.peak_memory_mib:,.0f} MiB"
        for name, value in rows.items():
            table.add_row(name, value)
        return table
