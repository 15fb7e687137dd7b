"""The result of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Plan:
    """Prediction for one device. Sizes are in bytes; times are in seconds per optimizer step.

    `seconds_loading` is the time to load the studies of a step, None without a data set. `total_steps` counts the
    steps of all epochs, at most `train.max_steps`; it is None if the number of studies is not known. Validation writes
    `reports_at_a_time` reports together, whose keys and values have `reports_bytes`; 0 if it writes none. The times are
    those of cross-entropy without what `not_in_time` names.
    """

    parameters: dict[str, int]
    trainable: dict[str, int]
    memory: dict[str, int]
    available: int
    device: str
    precision: str
    micro_batch_size: int
    seconds_computing: float
    seconds_loading: float | None
    seconds_per_step: float
    steps_per_epoch: int | None
    epochs: int
    total_steps: int | None
    disk: dict[str, int]
    disk_free: int
    reports_at_a_time: int
    reports_bytes: int
    not_in_time: list[str] = field(default_factory=list)
    proposals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Predicted peak memory of the device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether memory and disk are large enough. 5 % of the memory is reserved for what the plan does not count."""
        return self.peak <= 0.95 * self.available and sum(self.disk.values()) <= self.disk_free

    def as_dict(self) -> dict[str, Any]:
        """Returns the content of the `--json` output."""
        counts = (self.steps_per_epoch, self.total_steps)
        epoch, total = (None if steps is None else self.seconds_per_step * steps for steps in counts)
        more = {"peak": self.peak, "fits": self.fits, "seconds_per_epoch": epoch, "seconds_total": total}
        return {**asdict(self), **more}
