"""The rate of a training run over its last steps, and a smoothed loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator

# The window of the rate: this many seconds of training, and at least this many steps.
_WINDOW_S = 30.0
_WINDOW_STEPS = 10
_SMOOTHING = 0.9


class TrainingRate:
    """Samples and steps per second over a moving window. Pauses do not count."""

    def __init__(self) -> None:
        self.paused_s = 0.0
        self._pauses = 0
        self._samples = 0
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._cold = True

    def add(self, samples: int) -> None:
        """Records a step with this many samples."""
        self._samples += samples
        now = time.monotonic() - self.paused_s
        self._points.append((now, self._samples))
        if self._cold and len(self._points) == 3:
            # The first step also starts workers and loads kernels, so it counts only until there are two steps.
            self._points.popleft()
            self._cold = False
        while len(self._points) > _WINDOW_STEPS + 1 and now - self._points[0][0] > _WINDOW_S:
            self._points.popleft()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of a block."""
        began = time.monotonic()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:  # the outer pause includes the inner one
                self.paused_s += time.monotonic() - began

    @property
    def samples_per_second(self) -> float | None:
        """Samples per second in the window; None before the first step."""
        seconds, samples, _ = self._span()
        return samples / seconds if samples and seconds > 0 else None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean duration of a step in the window, in seconds; None before the first step."""
        seconds, _, steps = self._span()
        return seconds / steps if steps else None

    def _span(self) -> tuple[float, int, int]:
        """Returns the seconds, samples and steps of the window."""
        (began, before), (ended, after) = self._points[0], self._points[-1]
        return ended - began, after - before, len(self._points) - 1


class SmoothedValue:
    """Exponential moving average of finite values, with bias correction at the start."""

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def add(self, value: float) -> None:
        """Adds a value; ignored if it is not finite."""
        if math.isfinite(value):
            self._total = _SMOOTHING * self._total + value
            self._weight = _SMOOTHING * self._weight + 1

    @property
    def value(self) -> float | None:
        """The average; None before the first finite value."""
        return self._total / self._weight if self._weight else None
