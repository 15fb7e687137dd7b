"""The display of a training run, on a terminal and in a log file, on a clock that the test turns."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from emrrg_cli.training import progress
from emrrg_cli.training.progress import TrainingDisplay
from emrrg_cli.training.rate import SmoothedValue


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _file() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=60, force_terminal=False), stream


def _terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    environ = {"TERM": "xterm-256color"}
    return Console(file=stream, width=width, height=25, force_terminal=True, _environ=environ), stream


def _train(display: TrainingDisplay, clock: Clock, steps: range, seconds: float = 1.0) -> None:
    for step in steps:
        clock.now += seconds
        display.update(step=step, epoch=step / 10, loss=2.0, lr=1e-4, samples=8)


def test_a_log_file_gets_a_line_every_20_seconds_and_at_the_end(clock: Clock) -> None:
    console, stream = _file()
    with TrainingDisplay(50, console=console) as display:
        _train(display, clock, range(1, 51))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["20/50", "40/50", "50/50"]
    assert "\x1b" not in stream.getvalue()
    assert re.fullmatch(
        r"step 40/50  epoch 4\.00  loss 2\.0000  lr 1\.00e-04  8 samples/s  \S+ \S+ GiB  elapsed 0:00:40  left 0:00:10",
        lines[1],
    )


def test_a_log_file_gets_lines_before_and_during_a_validation(clock: Clock) -> None:
    console, stream = _file()
    with TrainingDisplay(50, console=console) as display:
        _train(display, clock, range(1, 6))
        for _ in range(2):  # the second phase of a validation repeats nothing
            with display.phase("validation: loss", 30) as advance:
                clock.now += 12
                advance(16)
                clock.now += 12
                advance(16)
        display.message("validation [loss] 1.5")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 5/50")
    assert lines[1:] == ["validation: loss 30/30", "validation: loss 30/30", "validation [loss] 1.5"]


def test_a_terminal_gets_a_bar_with_the_figures(clock: Clock) -> None:
    console, stream = _terminal()
    with TrainingDisplay(20, console=console) as display:
        _train(display, clock, range(1, 11))
        with display.phase("validation: loss", 30) as advance:
            advance(12)
            assert display._bar is not None
            display._bar.refresh()
        display.message("best [so far]")
        _train(display, clock, range(11, 21))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for text in ("training", "20/20", "validation: loss", "12/30", "best [so far]", "loss 2.0000", "8 samples/s"):
        assert text in shown
    assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= 80


def test_a_failed_run_restores_the_terminal(clock: Clock) -> None:
    console, stream = _terminal()

    def run() -> None:
        with TrainingDisplay(20, console=console) as display, display.phase("validation", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(("terminal", "enabled"), [(False, True), (True, True), (False, False)])
def test_a_callback_runs_after_each_batch_of_a_phase(clock: Clock, terminal: bool, enabled: bool) -> None:
    console, _ = _terminal() if terminal else _file()
    looks: list[int] = []
    with TrainingDisplay(2, enabled=enabled, console=console, after_batch=lambda: looks.append(1)) as display:
        with display.phase("validation", 2) as advance:
            assert looks == []
            advance(1)
            advance(1)
        _train(display, clock, range(1, 3))
    assert looks == [1, 1]


@pytest.mark.parametrize("terminal", [False, True])
def test_other_processes_print_nothing_but_measure_the_rate(clock: Clock, terminal: bool) -> None:
    console, stream = _terminal() if terminal else _file()
    with TrainingDisplay(100, enabled=False, console=console) as display:
        _train(display, clock, range(1, 101))
        with display.phase("validation", 2) as advance:
            advance(2)
        display.message("x")
    assert stream.getvalue() == ""
    assert display.samples_per_second == pytest.approx(8.0)


def test_the_rate_excludes_validation_and_the_first_step(clock: Clock) -> None:
    with TrainingDisplay(100, enabled=False) as display:
        assert display.samples_per_second is None
        _train(display, clock, range(1, 2), seconds=30)
        assert display.samples_per_second == pytest.approx(8 / 30)
        _train(display, clock, range(2, 6), seconds=0.5)
        with display.paused(), display.phase("validation", 1):
            clock.now += 600
        _train(display, clock, range(6, 9), seconds=0.5)
    assert display.samples_per_second == pytest.approx(16.0)


def test_the_rate_is_of_recent_steps(clock: Clock) -> None:
    with TrainingDisplay(1000, enabled=False) as display:
        _train(display, clock, range(1, 101), seconds=1)
        _train(display, clock, range(101, 141), seconds=4)
    assert display.samples_per_second == pytest.approx(2.0)


def test_time_left_counts_this_run_and_its_validations(clock: Clock) -> None:
    display = TrainingDisplay(110, start_step=90, enabled=False)
    with display:
        for first in (91, 96):
            _train(display, clock, range(first, first + 5))
            with display.phase("validation", 1):
                clock.now += 10
    # 10 more steps of 1 s, and 2 s of validation for each step so far.
    assert display._left() == "0:00:30"


def test_the_loss_is_smoothed_without_unknown_values() -> None:
    smoothed = SmoothedValue()
    assert smoothed.value is None
    for value in (math.nan, 4.0, math.inf):
        smoothed.add(value)
    assert smoothed.value == pytest.approx(4.0)
    smoothed.add(2.0)
    assert smoothed.value == pytest.approx((0.9 * 4 + 2) / 1.9)


def test_memory_of_this_process_is_plausible() -> None:
    assert 10 * 2**20 < progress.resident_bytes() < 2**40


def test_values_that_do_not_fit_become_a_table() -> None:
    output = io.StringIO()
    display = TrainingDisplay(4, console=Console(file=output, width=80))
    display.figures("step 2: validation", {"loss": 1.5, "BLEU_4": 0.25}, "  (best so far)")
    assert output.getvalue() == "step 2: validation loss 1.5000  BLEU_4 0.2500  (best so far)\n"
    output.truncate(0)
    display.figures("step 4: validation", {f"a_long_name_{i}": 0.5 for i in range(9)})
    display.figures("step 6: validation", {f"image_to_text_recall_R@{i}": 0.5 for i in (1, 5, 10)})
    assert "image_to_text_recall_R@10 0.5000" in output.getvalue()
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("a_long_name") for line in lines) == 9
