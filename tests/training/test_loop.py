"""The training loop: exact accumulation, exact continuation, selection, and how a run ends."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from emrrg_cli.datasets.epochs import EpochOrder
from emrrg_cli.errors import Interrupted, RunError, UsageError
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.outputs import StageOutput
from emrrg_cli.recipe.finetuning import TrainSettings
from emrrg_cli.runtime import make_accelerator
from emrrg_cli.training import run_checkpoints
from emrrg_cli.training.loop import train
from emrrg_cli.training.optimizer_step import update_weights

# Two steps an epoch. The rate of the first two blocks is 0 by the paper's formula, that of the third is half of this.
NOISY = ("model.encoder.depth=3", "model.encoder.drop_path=0.9", "train.epochs=3")


def _untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


# -- a small stage of its own ------------------------------------------------------------------------------------


class Batch(list[int]):
    def to(self, device: torch.device) -> Batch:
        return self


class Line(nn.Module):
    """One weight; the gradient of each example is 1, so that SGD-like changes can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.broken_from = 10**9
        self.seen: list[list[int]] = []

    def forward(self, batch: Batch) -> StageOutput:
        if self.training:
            self.seen.append(list(batch))
        loss = (self.weight - 1.0).square().sum() * len(batch)
        if len(self.seen) >= self.broken_from:
            loss = loss * math.nan
        return StageOutput(loss, torch.tensor(len(batch)))


class Stage:
    """Validates to given figures, and keeps the weight of each export."""

    def __init__(self, figures: list[dict[str, float]] | None = None) -> None:
        self.model = Line()
        self.figures = figures
        self.validations = 0
        self.exports: list[float] = []
        self.during: Callable[[], None] = lambda: None

    def items(self, batch: Batch) -> int:
        return len(batch)

    def validate(self, display: Any) -> dict[str, float]:
        if self.figures is None:
            return {}
        self.during()
        self.validations += 1
        return dict(self.figures[self.validations - 1])

    def export(self) -> None:
        self.exports.append(self.model.weight.item())


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Any]:
    def run(stage: Stage, examples: int = 8, *, resume: bool = False, **settings: Any) -> Any:
        train_settings = TrainSettings(**{"batch_size": 4, "epochs": 3, "lr": 0.1, "trackers": []} | settings)
        accelerator = make_accelerator("fp32", 0)
        return train(stage, range(examples), Batch, train_settings, tmp_path, accelerator, resume=resume)

    return run


def _figures(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"validation/score": score, "validation/loss": loss} for score, loss in pairs]


# -- accumulation ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_micro_batches_of_two_are_one_batch_of_eight(finetune: Any, difference: Any) -> None:
    options = ("train.epochs=4", "train.validate_every_epochs=4")
    whole = finetune("whole", *options)
    for size in (2, 3):  # 3 does not divide 8
        split = finetune(
            f"by{size}", "train.epochs=4", "train.validate_every_epochs=4", f"train.micro_batch_size={size}"
        )
        assert split.series("train/loss") == pytest.approx(whole.series("train/loss"), rel=1e-6)
        assert split.series("train/grad_norm") == pytest.approx(whole.series("train/grad_norm"), rel=1e-5)
        assert difference(split.weights, whole.weights) < 5e-6
    assert len(whole.series("train/loss")) == 8
    assert difference(whole.weights, finetune("other", *options, "train.seed=1").weights) > 1e-3


def test_the_loss_is_a_mean_over_tokens_not_over_reports(finetune: Any, tiny_dataset: Path) -> None:
    from emrrg_cli.datasets.directory import open_dataset
    from emrrg_cli.datasets.report_dataset import ReportDataset
    from emrrg_cli.recipe.common import DataSettings

    reports = ReportDataset(open_dataset(tiny_dataset)["train"], DataSettings(), 32).reports
    assert len({len(report) for report in reports}) > 2  # so that the two means differ
    run = finetune("run", "train.max_steps=1", "train.batch_size=16")
    # Before the first step, computed report by report.
    from safetensors.torch import load_file

    from emrrg_cli.datasets.report_dataset import collate
    from emrrg_cli.models.build import load_model
    from emrrg_cli.recipe.load import load_recipe

    recipe = load_recipe(str(run.directory / "recipe.yaml"), stage="finetune")
    fresh = finetune("fresh", "train.max_steps=1", "train.batch_size=16", "train.lr=1e-30", "train.min_lr=0")
    model = load_model(fresh.directory, recipe.model, torch.float32)
    data = ReportDataset(open_dataset(tiny_dataset)["train"], recipe.data, 32)
    sums, tokens = 0.0, 0
    for index in range(len(data)):
        output = model(collate([data[index]], model.encode_report))
        sums, tokens = sums + float(output.loss_sum), tokens + int(output.items)
    assert run.series("train/loss") == pytest.approx([sums / tokens], rel=1e-5)
    assert load_file(fresh.checkpoint / "trainable.safetensors").keys() == run.weights.keys()


def test_each_example_is_seen_once_an_epoch_in_seeded_order(fit: Any) -> None:
    stage, other = Stage(), Stage()
    fit(stage, 8, epochs=2, micro_batch_size=1)
    fit(other, 8, epochs=2, seed=7)
    seen = [example for batch in stage.model.seen for example in batch]
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:]
    assert seen != [example for batch in other.model.seen for example in batch]


def test_an_incomplete_last_batch_is_dropped(fit: Any) -> None:
    stage = Stage()
    assert fit(stage, 7, epochs=2).steps == 2
    assert [len(batch) for batch in stage.model.seen] == [4, 4]


def test_a_batch_larger_than_the_split_is_refused(fit: Any) -> None:
    with pytest.raises(UsageError, match=r"3 usable examples, fewer than train\.batch_size=4"):
        fit(Stage(), 3)


def test_one_study_is_enough_for_a_batch_of_one(fit: Any) -> None:
    assert fit(Stage(), 1, batch_size=1, epochs=2).steps == 2


def test_gradients_are_clipped_or_unchanged(fit: Any, tmp_path: Path) -> None:
    from emrrg_cli.files.records import read_jsonl

    fit(Stage(), epochs=1, log_every=1, clip_norm=0.5)
    # d/dw mean (w - 1)^2 = -2 at w = 0: the norm is told as it was before clipping.
    assert read_jsonl(tmp_path / "history.jsonl")[0]["train/grad_norm"] == pytest.approx(2.0)
    clipped, unchanged = (Stage().model.weight for _ in range(2))
    for weight, most in ((clipped, 0.5), (unchanged, None)):
        weight.grad = torch.full((1,), 4e5)
        weights = nn.ParameterList([weight])
        norm = update_weights(weights, torch.optim.SGD(weights, lr=1.0), most, make_accelerator("fp32", 0))
        assert norm == pytest.approx(4e5)
    assert (clipped.item(), unchanged.item()) == (pytest.approx(-0.5), -4e5)


def test_a_stage_sees_all_micro_batches_before_the_model(fit: Any) -> None:
    class Preparing(Stage):
        def prepare_step(self, batches: list[Batch], epoch: int) -> list[Batch]:
            assert self.model.training
            together = [sum(len(batch) for batch in batches)]
            return [Batch([*batch, *together]) for batch in batches]

    stage = Preparing()
    fit(stage, 8, epochs=1, micro_batch_size=3)
    assert [(len(batch), batch[-1]) for batch in stage.model.seen] == [(4, 4), (2, 4)] * 2


# -- continuation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tiny_overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of two steps with stochastic depth, in one go."""
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.training.finetune import run_finetune

    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    recipe = load_recipe(
        "tiny/finetune", [*tiny_overrides, "train.trackers=[]", "train.select=loss", *NOISY], stage="finetune"
    )
    run_finetune(recipe, directory, resume=False, expected_processes=0)
    return directory


def test_noise_matters_in_these_runs(uninterrupted: Path, run_of: Any, finetune: Any, difference: Any) -> None:
    quiet = finetune("quiet", *NOISY, "model.encoder.drop_path=0.0")
    assert difference(quiet.weights, run_of(uninterrupted).weights) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "every"),
    [
        ((3,), "null"),  # in the middle of the second epoch
        ((2,), "null"),  # between epochs
        ((1, 1, 2), "2"),  # twice and again, within epochs
    ],
)
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(
    uninterrupted: Path, run_of: Any, finetune: Any, stops: tuple[int, ...], every: str
) -> None:
    whole = run_of(uninterrupted)
    done = 0
    for number, steps in enumerate(stops):
        options = (*NOISY, f"train.checkpoint_every_steps={every}", f"train.stop_after_steps={steps}")
        part = finetune("part", *options, resume=number > 0)
        done += steps
        assert (part.last_step(), part.summary.reason) == (done, f"train.stop_after_steps={steps}")
        torch.manual_seed(99)  # what the process drew meanwhile is of no importance
        torch.rand(10)
    resumed = finetune("part", *NOISY, resume=True)
    assert resumed.summary.reason == "schedule ended"
    assert resumed.weights.keys() == whole.weights.keys()
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name
    for name, tensor in whole.exported.items():
        assert torch.equal(resumed.exported[name], tensor), name
    assert _untimed(resumed.history) == _untimed(whole.history)


def test_resuming_a_finished_run_changes_nothing(finetune: Any, run_of: Any) -> None:
    first = finetune("run", "train.epochs=1")
    history, weights = first.history, first.weights
    again = finetune("run", "train.epochs=1", resume=True)
    assert (again.summary.steps, again.summary.reason, again.summary.best_step) == (2, "schedule ended", 2)
    assert again.history == history
    assert all(torch.equal(again.weights[name], weights[name]) for name in weights)


def test_a_run_stopped_before_its_first_checkpoint_starts_over(fit: Any, tmp_path: Path) -> None:
    from emrrg_cli.files.records import append_jsonl, read_jsonl

    append_jsonl(tmp_path / "history.jsonl", {"step": 1, "train/loss": 9.0})
    summary = fit(Stage(), epochs=1, log_every=1, resume=True)
    assert summary.steps == 2
    assert [(row["step"], row["train/loss"] < 9) for row in read_jsonl(tmp_path / "history.jsonl")] == [
        (1, True),
        (2, True),
    ]


def test_a_warm_up_longer_than_the_run_is_told(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Stage(), epochs=1, warmup_epochs=1)
    assert "warmup" not in capsys.readouterr().err
    fit(Stage(), epochs=1, warmup_epochs=4)
    assert "train.warmup_epochs=4 is 8 steps, but training has 2" in capsys.readouterr().err


def test_rows_after_the_checkpoint_are_written_once(fit: Any, tmp_path: Path) -> None:
    from emrrg_cli.files.records import append_jsonl, read_jsonl

    fit(Stage(_figures((0, 1), (0, 1))), epochs=2, log_every=1, stop_after_steps=3)
    append_jsonl(tmp_path / "history.jsonl", {"step": 4, "train/loss": 9.0})
    append_jsonl(tmp_path / "history.jsonl", {"step": 4, "validation/loss": 9.0})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')  # cut off
    fit(Stage(_figures((0, 1), (0, 1))), epochs=2, log_every=1, resume=True)
    rows = read_jsonl(tmp_path / "history.jsonl")
    assert [(row["step"], "train/loss" in row) for row in rows] == [
        (1, True),
        (2, True),
        (2, False),
        (3, True),
        (4, True),
        (4, False),
    ]
    assert 9.0 not in [value for row in rows for value in row.values()]


# -- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    fit: Any, tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage()
    handlers = [signal.getsignal(watched) for watched in (signal.SIGINT, signal.SIGTERM)]
    forward = stage.model.forward

    def press(batch: Batch) -> StageOutput:
        if len(stage.model.seen) == 2:
            os.kill(os.getpid(), number)
        return forward(batch)

    stage.model.forward = press  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=r"stopped at step [34] of 6") as caught:
        fit(stage)
    assert caught.value.exit_code == code
    assert "Finishing this step and saving a checkpoint. Press Ctrl-C again to quit now." in capsys.readouterr().err
    steps = len(stage.model.seen)
    assert (tmp_path / "checkpoints" / "last").read_text() == f"step-{steps:08d}\n"
    assert [signal.getsignal(watched) for watched in (signal.SIGINT, signal.SIGTERM)] == handlers
    rest = Stage()
    assert fit(rest, resume=True).steps == 6
    assert len(rest.model.seen) == 6 - steps


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every_steps": 1}])
def test_a_run_with_lost_checkpoints_does_not_start_again(
    tmp_path: Path, fit: Callable[..., Any], settings: dict[str, int]
) -> None:
    fit(Stage(), log_every=1, stop_after_steps=3, **settings)
    before = (tmp_path / "history.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RunError, match="the checkpoint of this run is lost: there is none, and history"):
        fit(Stage(), log_every=1, resume=True, **settings)
    assert (tmp_path / "history.jsonl").read_text() == before


def test_a_lost_checkpoint_of_the_first_epoch_is_noticed(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit(Stage(), 80, log_every=1, stop_after_steps=5, checkpoint_every_steps=2)  # of 20 steps in an epoch
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RunError, match="goes up to step 5"):
        fit(Stage(), 80, log_every=1, resume=True, checkpoint_every_steps=2)


def test_a_checkpoint_not_yet_due_is_not_expected(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*arguments: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run_checkpoints, "save_checkpoint", die)
        with pytest.raises(RuntimeError, match="killed"):
            finetune("run", "train.epochs=1")
    # The run wrote steps 1 and 2. Its first checkpoint was due at step 2, not at step 1 as for the resumed one.
    assert finetune("run", "train.epochs=1", "train.checkpoint_every_steps=1", resume=True).summary.steps == 2
    expected = f"{tmp_path / 'run'} has no checkpoint (history.jsonl goes up to step 2): training starts at the first"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("log_every", "steps"), [(1, 0), (100, 4)])
def test_a_start_at_step_one_is_reported(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, log_every: int, steps: int
) -> None:
    def die(*arguments: Any) -> None:
        raise RuntimeError("killed")

    stage = Stage()
    forward = stage.model.forward
    stage.model.forward = lambda batch: die() if len(stage.model.seen) == steps else forward(batch)  # type: ignore
    with pytest.raises(RuntimeError, match="killed"):
        fit(stage, 80, log_every=log_every)
    assert fit(Stage(), 80, log_every=log_every, resume=True).steps == 60
    logged = "history.jsonl goes up to step 1" if steps else "history.jsonl has no step"
    assert f"{tmp_path} has no checkpoint ({logged}): training starts at the first step" in capsys.readouterr().err


def test_the_second_ctrl_c_acts_at_once(fit: Any) -> None:
    stage = Stage()
    forward = stage.model.forward

    def press(batch: Batch) -> StageOutput:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return forward(batch)

    stage.model.forward = press  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(stage)
    assert stage.model.seen == []


def test_a_signal_in_a_validation_acts_after_the_batch(fit: Any, tmp_path: Path) -> None:
    from emrrg_cli.files.records import read_jsonl

    stage = Stage(_figures((0.5, 1.0)))
    batches = []

    def validate(display: Any) -> dict[str, float]:
        with display.phase("validation", 9) as advance:
            for batch in range(9):
                if batch == 4:
                    os.kill(os.getpid(), signal.SIGINT)
                batches.append(batch)
                advance(1)
        raise AssertionError("the validation went on")

    stage.validate = validate  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped at step 2 of 6"):
        fit(stage, log_every=1)
    assert batches == [0, 1, 2, 3, 4]
    assert [row["step"] for row in read_jsonl(tmp_path / "history.jsonl")] == [1, 2]
    rest = Stage(_figures((0.5, 1.0), (0.4, 0.9), (0.3, 0.8)))
    summary = fit(rest, log_every=1, resume=True)
    assert (summary.best_step, rest.validations) == (2, 3)
    rows = read_jsonl(tmp_path / "history.jsonl")
    assert [row["step"] for row in rows if "validation/loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("every", [None, 100])
def test_a_validation_that_fails_loses_no_training(fit: Any, tmp_path: Path, every: int | None) -> None:
    stage = Stage(_figures((0.5, 1.0)))

    def fail() -> None:
        raise RuntimeError("out of memory")

    stage.during = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(stage, checkpoint_every_steps=every)
    rest = Stage(_figures(*[(0.5, 1.0)] * 3))
    fit(rest, resume=True, checkpoint_every_steps=every)
    assert (len(rest.model.seen), rest.validations) == (4, 3)


def test_a_crash_after_a_validation_repeats_it_with_one_row(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emrrg_cli.files.records import read_jsonl

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_checkpoints, "save_progress", crash)
        with pytest.raises(KeyboardInterrupt):
            fit(Stage(_figures((0.5, 1.0))), epochs=2)
    fit(Stage(_figures((0.5, 1.0), (0.4, 1.0))), epochs=2, resume=True)
    rows = [row["step"] for row in read_jsonl(tmp_path / "history.jsonl") if "validation/loss" in row]
    assert rows == [2, 4]


# -- validation and selection ------------------------------------------------------------------------------------


def test_the_best_by_score_is_exported_not_the_last(fit: Any) -> None:
    stage = Stage(_figures((0.1, 3.0), (0.3, 2.0), (0.2, 1.0)))
    summary = fit(stage)
    assert (summary.best, summary.best_step, summary.steps) == ([0.3, -2.0], 4, 6)
    assert len(stage.exports) == 2
    assert stage.exports[-1] < stage.model.weight.item()  # the weight grows towards 1 with each step


def test_the_loss_decides_between_equal_scores(fit: Any) -> None:
    # The epsilons are those of BLEU where no n-gram is found.
    stage = Stage(_figures((3e-15, 3.0), (1e-15, 2.0), (9e-15, 2.0)))
    assert fit(stage).best_step == 4
    stage = Stage(_figures((0.5, 1.0), (0.5, 1.0), (0.5, 1.0)))
    assert fit(stage).best_step == 2


def test_a_stage_without_scores_is_selected_by_loss(fit: Any) -> None:
    stage = Stage([{"validation/loss": loss} for loss in (3.0, 1.0, 2.0)])
    assert fit(stage).best_step == 4


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["validation/score", "validation/loss"])
def test_infinity_and_nan_are_never_the_best(fit: Any, place: str, broken: float) -> None:
    rows = _figures((0.9, 0.1), (0.5, 1.0), (0.9, 0.1), (0.4, 1.0))
    rows[0][place] = rows[2][place] = broken
    stage = Stage(rows)
    summary = fit(stage, epochs=4)
    assert (summary.best, summary.best_step) == ([0.5, -1.0], 4)
    assert len(stage.exports) == 1


def test_without_finite_scores_the_last_model_is_exported(fit: Any) -> None:
    stage = Stage(_figures(*[(math.nan, math.nan)] * 3))
    summary = fit(stage)
    assert (summary.best, summary.best_step) == (None, None)
    assert stage.exports == [stage.model.weight.item()]


def test_patience_ends_the_run_and_resuming_it_trains_no_further(fit: Any) -> None:
    figures = _figures((0.5, 1.0), *[(0.1, 1.0)] * 8)
    stage = Stage(figures)
    summary = fit(stage, epochs=9, patience=2)
    assert (summary.steps, summary.best_step, summary.reason) == (6, 2, "no improvement in 2 validations")
    again = Stage(figures)
    assert fit(again, epochs=9, patience=2, resume=True).steps == 6
    assert again.model.seen == []
    more = Stage(figures)
    assert fit(more, epochs=9, patience=4, resume=True).steps == 10  # patience may be changed


def test_validation_every_other_epoch_and_always_at_the_end(fit: Any) -> None:
    stage = Stage(_figures(*[(0.0, 1.0)] * 9))
    fit(stage, epochs=5, validate_every_epochs=2)
    assert stage.validations == 3
    stage = Stage(_figures(*[(0.0, 1.0)] * 9))
    assert fit(stage, epochs=5, max_steps=3).steps == 3
    assert stage.validations == 2


def test_without_validation_the_last_model_is_exported(fit: Any) -> None:
    stage = Stage()
    summary = fit(stage)
    assert (summary.best, summary.best_step) == (None, None)
    assert stage.exports == [stage.model.weight.item()]


def test_validation_draws_no_random_numbers_of_the_training(fit: Any) -> None:
    drawn = []
    for figures in (None, _figures(*[(0.0, 1.0)] * 3)):
        stage = Stage(figures)
        stage.during = lambda: torch.rand(5)  # type: ignore[assignment, return-value]
        torch.manual_seed(5)
        fit(stage)
        drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1]


def test_the_model_is_in_training_mode_after_a_validation(fit: Any) -> None:
    stage = Stage(_figures(*[(0.0, 1.0)] * 3))
    fit(stage)
    assert len(stage.model.seen) == 6  # noted in training mode only


# -- failure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_unsaved(fit: Any, tmp_path: Path, log_every: int) -> None:
    stage = Stage()
    stage.model.broken_from = 4  # between two logged steps and before a checkpoint, where log_every is 100
    with pytest.raises(RunError, match="not finite at step 4; the last checkpoint, if any, is kept"):
        fit(stage, examples=24, log_every=log_every)
    assert not (tmp_path / "checkpoints").exists()
    stage = Stage()
    stage.model.broken_from = 4
    with pytest.raises(RunError, match="not finite at step 4"):
        fit(stage, examples=24, log_every=log_every, checkpoint_every_steps=3)
    assert (tmp_path / "checkpoints" / "last").read_text() == "step-00000003\n"
    rest = Stage()
    assert fit(rest, examples=24, resume=True).steps == 18
    assert math.isfinite(rest.model.weight.item())


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_ends_the_run_too(fit: Any, clip_norm: float | None) -> None:
    class Root(Line):
        def forward(self, batch: Batch) -> StageOutput:
            self.seen.append(list(batch))
            return StageOutput(self.weight.abs().sqrt().sum(), torch.tensor(len(batch)))  # slope at 0: infinite

    stage = Stage()
    stage.model = Root()
    with pytest.raises(RunError, match="gradient is not finite at step 1"):
        fit(stage, examples=24, clip_norm=clip_norm)


class Seen(Line):
    """`Line` over an encoder whose scan breaks from a step on; notes the hooks that it sees."""

    def __init__(self, broken_from: int) -> None:
        super().__init__()
        self.broken_from = broken_from
        self.encoder = ArmEncoder(16, 2, image_size=32, d_state=2, drop_path=0.0).requires_grad_(False)
        self.hooks: set[int] = set()

    def forward(self, batch: Batch) -> StageOutput:
        self.seen.append(list(batch))
        if len(self.seen) >= self.broken_from:
            self.encoder.layers[1].mixer.D[2] = math.nan
        self.hooks.add(_hooks(self.encoder))
        loss = (self.weight - self.encoder(torch.ones(1, 3, 32, 32)).mean()).square().sum() * len(batch)
        return StageOutput(loss, torch.tensor(len(batch)))


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_block_and_direction_that_break_are_named(fit: Any, tmp_path: Path) -> None:
    stage = Stage()
    stage.model = Seen(4)
    with pytest.raises(RunError, match="not finite at step 4") as raised:
        fit(stage, examples=24, checkpoint_every_steps=3)
    assert "--resume with train.detect_non_finite=true" in str(raised.value)
    assert stage.model.hooks == {0}

    stage.model = Seen(1)  # the first step that is done again
    with pytest.raises(RunError, match=r"encoder block layers\.1, mixer, direction 2 \(column\): "):
        fit(stage, examples=24, checkpoint_every_steps=3, resume=True, detect_non_finite=True)
    assert stage.model.hooks == {10}
    assert _hooks(stage.model) == 0
    assert (tmp_path / "checkpoints" / "last").read_text() == "step-00000003\n"

    stage.model = Seen(100)
    assert fit(stage, examples=24, resume=True, detect_non_finite=True).steps == 18
    assert _hooks(stage.model) == 0


def test_nan_outside_the_blocks_is_reported_at_once(fit: Any) -> None:
    stage = Stage()
    stage.model.broken_from = 4
    with pytest.raises(RunError, match="not finite at step 4") as raised:
        fit(stage, examples=24, log_every=100, detect_non_finite=True)
    assert len(stage.model.seen) == 4  # not at the next entry of the log or checkpoint
    assert "All encoder blocks gave finite values" in str(raised.value)


def test_models_that_accelerate_would_shard_are_refused(tmp_path: Path) -> None:
    class Sharded:
        class distributed_type:
            value = "FSDP"

    with pytest.raises(UsageError, match="training under FSDP is not supported yet"):
        train(Stage(), range(8), Batch, TrainSettings(), tmp_path, Sharded())


# -- loading -----------------------------------------------------------------------------------------------------


def test_loading_processes_change_nothing(finetune: Any, difference: Any, uninterrupted: Path, run_of: Any) -> None:
    run = finetune("workers", *NOISY, "data.workers=1")
    assert difference(run.weights, run_of(uninterrupted).weights) == 0


class Places(Dataset[tuple[int, int, int]]):
    """Which process made an example, in which epoch, and its index."""

    epoch = -1

    def __len__(self) -> int:
        return 9

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return os.getpid(), self.epoch, index


@pytest.mark.parametrize("workers", [0, 1])
def test_the_epochs_of_a_run_are_loaded_by_the_same_processes(workers: int, tmp_path: Path) -> None:
    settings = TrainSettings(batch_size=4, micro_batch_size=3, epochs=4, stop_after_steps=5, lr=0.1, trackers=[])
    figures = _figures(*[(0.1, 1.0)] * 4)
    seen = []
    for resume in (False, True):
        stage = Stage(figures)
        accelerator = make_accelerator("fp32", 0)
        train(stage, Places(), Batch, settings, tmp_path, accelerator, workers=workers, resume=resume)
        made = [example for batch in stage.model.seen for example in batch]
        processes = {process for process, _, _ in made}
        assert len(processes) == 1
        assert (os.getpid() in processes) == (workers == 0)
        seen += [(epoch, index) for _, epoch, index in made]
    order = EpochOrder(9, 4, seed=settings.seed)
    assert seen == [(epoch, index) for epoch in range(4) for batch in order.epoch(epoch) for index in batch]
