"""`finetune` as a whole: what a run directory holds, validation, failure, stops and kills, and that it learns."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from emrrg_cli.app import main
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.training import finetune as stage3
from emrrg_cli.training import run_setup
from emrrg_cli.training.finetune import run_finetune

# What `kill` needs: a process that ends itself in the middle of an optimizer step, by a signal that is a real one.
_ENDED_IN_STEP = """
import os, sys
from emrrg_cli.training import loop
step = loop._Loop._optimizer_step
def ended(self, *arguments):
    if self.progress.step + 1 == {step}:
        os.kill(os.getpid(), {signal})
    return step(self, *arguments)
loop._Loop._optimizer_step = ended
from emrrg_cli.app import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def ended_in_step(forked: Any) -> Callable[..., Any]:
    """`ended_in_step(step, signal, *arguments)`: a run of `emrrg` that ends by a signal in an optimizer step."""

    def run(step: int, number: signal.Signals, *arguments: str) -> Any:
        (done,) = forked(*arguments, code=_ENDED_IN_STEP.format(step=step, signal=int(number)))
        return done

    return run


@pytest.fixture
def without_split(tiny_dataset: Path, tmp_path: Path) -> Callable[[str], str]:
    """The override that trains on a copy of `tiny_dataset` that lacks a split."""

    def copy(split: str) -> str:
        root = tmp_path / f"without_{split}"
        shutil.copytree(tiny_dataset, root, ignore=shutil.ignore_patterns(f"{split}-*", "manifest.json"))
        return f"data.root={root}"

    return copy


# -- the run directory -------------------------------------------------------------------------------------------


def test_a_run_directory_explains_itself(tiny_run: Path, tiny_overrides: tuple[str, ...]) -> None:
    names = {entry.name for entry in tiny_run.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "history.jsonl", "curve.png", "tokenizer", "model"}
    assert not [entry for entry in tiny_run.rglob("*") if ".tmp" in entry.name or ".previous" in entry.name]
    assert load_recipe(str(tiny_run / "recipe.yaml")) == load_recipe("tiny/finetune", tiny_overrides)
    assert json.loads((tiny_run / "environment.json").read_text())["precision"] == "fp32"
    with Image.open(tiny_run / "curve.png") as curve:
        curve.load()
        assert curve.width > 300
    (events,) = (tiny_run / "tracking").rglob("events.out.tfevents.*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(events))
    log.Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in log.Scalars("validation/loss")] == [2, 4]


def test_a_run_names_its_data_wherever_it_was_started_from(
    no_java: None, finetune: Any, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_dataset.parent)
    options = (f"data.root={tiny_dataset.name}", "train.max_steps=1")
    run = finetune("run", *options).directory
    monkeypatch.chdir(run)
    assert load_recipe("./recipe.yaml").data.root == str(tiny_dataset)
    environment = json.loads((run / "environment.json").read_text())
    fingerprint = json.loads((tiny_dataset / "manifest.json").read_text())["fingerprint"]
    assert environment["data"] == {str(tiny_dataset): fingerprint}
    assert main(["evaluate", "--model", str(run), "data.limit=1", "generation.num_beams=1"]) == 0


def test_the_history_has_a_row_per_logged_step_and_validation(tiny_run: Path, run_of: Any) -> None:
    rows = run_of(tiny_run).history
    assert [(row["step"], row["epoch"], "train/loss" in row) for row in rows] == [
        (1, 0.5, True),
        (2, 1.0, True),
        (2, 1.0, False),
        (3, 1.5, True),
        (4, 2.0, True),
        (4, 2.0, False),
    ]
    assert set(rows[0]) == {"step", "epoch", "train/loss", "train/lr", "train/grad_norm"}
    scores = {f"validation/{name}" for name in ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr")}
    assert set(rows[2]) == {"step", "epoch", "validation/loss", "validation/score"} | scores
    weighted = 0.8 * rows[2]["validation/BLEU_4"] + 0.2 * rows[2]["validation/CIDEr"]
    assert rows[2]["validation/score"] == pytest.approx(weighted)
    assert rows[0]["train/lr"] == pytest.approx(1e-3)


def test_some_steps_are_logged_with_the_first_and_the_last(finetune: Any) -> None:
    run = finetune("run", "train.log_every=3", "train.epochs=2")
    assert [row["step"] for row in run.history if "train/loss" in row] == [1, 3, 4]


def test_every_generator_takes_the_largest_seed_of_a_recipe(finetune: Any) -> None:
    from emrrg_cli.recipe.common import SEEDS

    assert finetune("run", f"train.seed={SEEDS - 1}", "train.max_steps=1").last_step() == 1


# -- validation --------------------------------------------------------------------------------------------------


def test_selection_by_loss_generates_no_reports(finetune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_split(*arguments: Any, **options: Any) -> list[str]:
        raise AssertionError("reports were generated")

    monkeypatch.setattr(stage3, "write_split", write_split)
    run = finetune("run", "train.epochs=1")
    assert set(run.history[-1]) == {"step", "epoch", "validation/loss"}
    with pytest.raises(AssertionError, match="reports were generated"):
        finetune("score", "train.epochs=1", "train.select=score")


def test_the_validation_limit_applies_only_to_generation(finetune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written, scored = [], []
    write, score = stage3.write_split, stage3.score

    def write_split(*arguments: Any, **options: Any) -> list[str]:
        written.append(write(*arguments, **options))
        return written[-1]

    def scores(references: list[str], hypotheses: list[str], **options: Any) -> dict[str, float | None]:
        scored.append((references, options["meteor"]))
        return score(references, hypotheses, **options)

    monkeypatch.setattr(stage3, "write_split", write_split)
    monkeypatch.setattr(stage3, "score", scores)
    limited = finetune("limited", "train.epochs=1", "train.select=score", "train.validation_limit=3")
    assert [len(reports) for reports in written] == [3]
    assert len(scored[0][0]) == 3
    assert scored[0][1] is False  # METEOR is not in the score: Java is not started
    assert scored[0][0][0].startswith("study of the chest . the heart is enlarged")
    whole = finetune("whole", "train.epochs=1")
    assert limited.series("validation/loss") == whole.series("validation/loss")


def test_the_validation_loss_does_not_depend_on_the_batch(finetune: Any) -> None:
    losses = [
        finetune(f"by{size}", "train.max_steps=1", f"train.micro_batch_size={size}").series("validation/loss")
        for size in (1, 3, 8)
    ]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


def test_without_a_validation_split_the_last_model_is_the_result(
    finetune: Any, without_split: Any, difference: Any
) -> None:
    run = finetune("run", without_split("validation"), "train.epochs=1", "train.select=score")
    assert run.summary.best_step is None
    console = Console(width=200, file=io.StringIO())
    console.print(run.summary.table(run.directory))
    assert "none: the result is the model of the last step" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not run.series("validation/loss")
    assert not torch.equal(
        run.exported["bridge.safetensors:bridge.proj.weight"],
        finetune("more", "train.epochs=2").exported["bridge.safetensors:bridge.proj.weight"],
    )
    assert torch.equal(run.exported["bridge.safetensors:bridge.proj.weight"], run.weights["bridge.proj.weight"])


def test_studies_without_text_are_told(finetune: Any, with_column: Any, capfd: pytest.CaptureFixture[str]) -> None:
    copy = with_column("report", lambda reports: [None, " ", "", *reports[3:]])
    finetune("run", f"data.root={copy}", "train.max_steps=1")
    told = " ".join(capfd.readouterr().err.split())
    assert f"{copy}: 3 of 16 train studies have no text for data.section=report and are left out" in told


@pytest.mark.parametrize("nothing", [None, []])
def test_a_study_without_images_is_told_before_training(
    finetune: Any, with_column: Any, tmp_path: Path, nothing: list[Any] | None
) -> None:
    copy = with_column("images", lambda images: [*images[:-1], nothing])
    with pytest.raises(RunError, match=rf"{copy}: study \S+ of the train split has no images"):
        finetune("run", f"data.root={copy}", "train.max_steps=1")
    assert not (tmp_path / "run").exists()


def test_the_exported_model_is_that_of_the_best_step(finetune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(stage3.FinetuneStage, "_validation_loss", lambda self, display: next(losses))
    run = finetune("run", "train.epochs=3")
    assert (run.summary.best_step, run.last_step()) == (4, 6)
    exported = run.exported["bridge.safetensors:bridge.proj.weight"]
    assert not torch.equal(exported, run.weights["bridge.proj.weight"])
    monkeypatch.undo()
    until = finetune("until", "train.epochs=3", "train.stop_after_steps=4")
    assert torch.equal(exported, until.weights["bridge.proj.weight"])


# -- what a run starts from --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_on_a_frozen_encoder_resumes_with_the_same_one(
    finetune: Any, difference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("model.adapter={targets: [X], rank: 2, alpha: 2.0}", "train.epochs=2")
    whole = finetune("whole", *options)
    assert {name.split(".")[0] for name in whole.weights} == {"encoder", "bridge", "llm"}
    assert all(".lora_" in name for name in whole.weights if name.startswith("encoder."))
    finetune("part", *options, "train.stop_after_steps=3")
    build = stage3.build_encoder
    # As another version of torch may draw it.
    monkeypatch.setattr(stage3, "build_encoder", lambda *arguments: build(*arguments).apply(_disturb))
    part = finetune("part", *options, resume=True)
    assert difference(part.weights, whole.weights) == difference(part.exported, whole.exported) == 0
    frozen = [(run.directory / "encoder.safetensors").read_bytes() for run in (part, whole)]
    assert frozen[0] == frozen[1]


@pytest.mark.slow
def test_a_trained_encoder_resumes_without_its_start_weights(finetune: Any, tmp_path: Path, difference: Any) -> None:
    start = tmp_path / "start.safetensors"
    shutil.copy(finetune("first", "train.max_steps=1").directory / "model" / "encoder.safetensors", start)
    options = ("model.adapter.targets=full", f"model.encoder.weights={start}", "train.epochs=2")
    whole = finetune("whole", *options)
    finetune("part", *options, "train.stop_after_steps=3")
    (tmp_path / "early").mkdir()
    shutil.copy(tmp_path / "part" / "recipe.yaml", tmp_path / "early")
    start.unlink()
    part = finetune("part", *options, resume=True)
    assert difference(part.weights, whole.weights) == difference(part.exported, whole.exported) == 0
    # Stopped before its first checkpoint, a run has nothing else to start from.
    with pytest.raises(UsageError, match=r"start\.safetensors"):
        finetune("early", *options, resume=True)


def _disturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter += 0.1


@pytest.fixture
def local_llm(tmp_path: Path) -> Path:
    """A small causal LM with its tokenizer, as a directory."""
    from emrrg_cli.models.llm import build_scratch_llm, train_tokenizer
    from emrrg_cli.recipe.finetuning import ScratchLLMSettings

    tokenizer = train_tokenizer(["the heart is enlarged ."], 300)
    settings = ScratchLLMSettings(hidden_size=32, layers=2, heads=2, kv_heads=1, vocab_size=300)
    directory = tmp_path / "llm"
    tokenizer.save_pretrained(directory)
    build_scratch_llm(settings, tokenizer).save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_llm(finetune: Any, local_llm: Path, difference: Any) -> None:
    from safetensors.torch import load_file, save_file

    options = (f"model.llm.name={local_llm}", "train.epochs=2")
    whole = finetune("whole", *options)
    assert not [name for name in whole.weights if "embed_tokens" in name]  # frozen
    finetune("part", *options, "train.stop_after_steps=3")
    part = finetune("part", *options, resume=True)
    assert difference(part.weights, whole.weights) == 0
    finetune("other", *options, "train.stop_after_steps=3")
    tensors = load_file(local_llm / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, local_llm / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"is not the one that .* was trained with"):
        finetune("other", *options, resume=True)


def test_loading_processes_get_the_tokenizer_and_not_the_model(tiny_run: Path) -> None:
    import pickle

    from emrrg_cli.datasets.report_dataset import IGNORE, Example
    from emrrg_cli.models.llm import load_tokenizer

    class Model:
        tokenizer = load_tokenizer(str(tiny_run / "tokenizer"))

        def __reduce__(self) -> Any:
            raise AssertionError("the model was pickled")  # as it would be for each process on macOS and Windows

    recipe = load_recipe("tiny/finetune", ["data.max_report_tokens=4"], stage="finetune")
    stage: Any = stage3.FinetuneStage(Model(), recipe, None, tiny_run, None)  # type: ignore[arg-type]
    collate = pickle.loads(pickle.dumps(stage.collate))
    pixels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    batch = collate(
        [Example(0, "a", pixels, "no pneumothorax . the heart is enlarged ."), Example(1, "b", pixels, ".")]
    )
    end = Model.tokenizer.eos_token_id
    assert batch.labels.shape == (2, 4)
    assert end not in batch.labels[0].tolist()  # cut, so that the report does not end here
    assert batch.labels[1].tolist()[1:] == [end, IGNORE, IGNORE]


# -- failure -----------------------------------------------------------------------------------------------------


def test_a_missing_training_split_is_an_error(finetune: Any, without_split: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="this dataset directory has no split named train"):
        finetune("run", without_split("train"))
    assert not (tmp_path / "run").exists()


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.root is not set"):
        run_finetune(load_recipe("tiny/finetune", stage="finetune"), tmp_path, resume=False, expected_processes=0)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ("evaluation.tokenizer=ptb", "the ptb tokenizer needs Java"),
        ("train.score_weights={METEOR: 1.0}", "METEOR needs Java"),
    ],
)
def test_a_selection_that_needs_java_is_refused_without_it(
    finetune: Any, without_split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: str, told: str
) -> None:
    for name in ("PATH", "JAVA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(stage3, "build_encoder", None)  # nothing is built before it is said
        with pytest.raises(RunError, match=told):
            finetune("run", "train.select=score", scores)
    assert not (tmp_path / "run").exists()
    # Where nothing is selected by scores, none is computed.
    assert finetune("run", scores, "train.max_steps=1").summary.steps == 1
    assert finetune("last", "train.select=score", scores, without_split("validation")).summary.best is None


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("train.batch_size=17", "16 usable examples, fewer than"),
        ("model.llm.name=./nowhere", "nowhere"),
        ("model.encoder.weights=nowhere.safetensors", "nowhere"),
    ],
)
def test_a_failed_start_leaves_the_output_free(finetune: Any, tmp_path: Path, wrong: str, told: str) -> None:
    with pytest.raises((UsageError, RunError), match=told):
        finetune("run", wrong)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises((UsageError, RunError), match=told):
        finetune("run", wrong)
    assert finetune("run", "train.epochs=1").summary.steps == 2


def test_a_batch_that_does_not_fit_is_refused_before_loading(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage3, "_tokenizer", None)
    with pytest.raises(UsageError, match=r"fewer than train\.batch_size=17"):
        finetune("run", "train.batch_size=17")
    # Under a launcher from outside, which is not asked for a number.
    monkeypatch.setattr(run_setup, "make_accelerator", lambda *arguments: SimpleNamespace(num_processes=3))
    with pytest.raises(UsageError, match=r"train\.batch_size=8 does not divide among 3 processes"):
        finetune("run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dtype_without_effect_is_refused_and_harms_no_run(no_java: None, finetune: Any, tmp_path: Path) -> None:
    for dtype in ("bf16", "fp16"):
        with pytest.raises(UsageError, match=rf"model\.llm\.dtype={dtype} is only for a frozen LLM") as caught:
            finetune("run", f"model.llm.dtype={dtype}")
        assert "train.precision" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()
    run = finetune("run", "model.llm.dtype=fp32", "train.epochs=2", "train.stop_after_steps=1").directory
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("dtype: fp32", "dtype: bf16"))  # as it was taken before
    assert finetune("run", "model.llm.dtype=bf16", "train.epochs=2", resume=True).summary.steps == 4
    for dtype in ("bf16", "auto"):
        arguments = ["evaluate", "--model", str(run), "data.limit=1", f"model.llm.dtype={dtype}"]
        assert main([*arguments, "--output", str(tmp_path / dtype)]) == 0


def test_a_failed_start_removes_only_its_own_files(finetune: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        finetune("run", "train.batch_size=17")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_run_that_fails_later_keeps_its_files(finetune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from emrrg_cli.models.report_generator import ReportGenerator

    forward = ReportGenerator.forward
    steps = []

    def fails(self: Any, batch: Any) -> Any:
        if self.training:
            steps.append(1)
        output = forward(self, batch)
        return output._replace(loss_sum=output.loss_sum * float("nan")) if len(steps) > 3 else output

    monkeypatch.setattr(ReportGenerator, "forward", fails)
    with pytest.raises(RunError, match="not finite at step 4; the last checkpoint, if any, is kept"):
        finetune("run", "train.epochs=3", "train.log_every=100")
    monkeypatch.undo()
    whole = finetune("whole", "train.epochs=3")
    resumed = finetune("run", "train.epochs=3", resume=True)
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor)
    assert (resumed.directory / "curve.png").is_file()


# -- stops and kills ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_interrupted_and_resumed_equals_uninterrupted(
    finetune: Any, tiny_overrides: tuple[str, ...], tmp_path: Path, run_of: Any, ended_in_step: Any
) -> None:
    noise = ("model.encoder.depth=3", "model.encoder.drop_path=0.9")
    schedule = ("train.batch_size=4", "train.epochs=3", "train.checkpoint_every_steps=3")  # 4 steps an epoch
    options = (*tiny_overrides, "train.trackers=[]", "train.select=loss", *noise, *schedule)
    arguments = ("finetune", "tiny/finetune", *options, "--output", str(tmp_path / "run"))
    killed = ended_in_step(8, signal.SIGKILL, *arguments)
    assert killed.returncode == -signal.SIGKILL
    run = run_of(tmp_path / "run")
    assert (run.last_step(), run.history[-1]["step"]) == (6, 7)
    interrupted = ended_in_step(9, signal.SIGINT, *arguments, "--resume")
    assert interrupted.returncode == 130
    assert interrupted.stdout == ""
    told = f"stopped at step 10 of 12; a checkpoint is in {run.directory}"
    assert interrupted.stderr.endswith(f"{told}\nContinue with the same command and --resume.\n")
    assert "Traceback" not in interrupted.stderr
    assert run.last_step() == 10
    resumed, whole = finetune("run", *options, resume=True), finetune("whole", *options)
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name
    for name, tensor in whole.exported.items():
        assert torch.equal(resumed.exported[name], tensor), name
    assert resumed.history == whole.history


# -- learning ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bright_or_dark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Studies whose report says whether the upper half of the image is bright."""
    root, out = tmp_path_factory.mktemp("halves"), tmp_path_factory.mktemp("dataset") / "halves"
    rng = np.random.default_rng(3)
    annotation: dict[str, list[dict[str, Any]]] = {}
    (root / "images").mkdir()
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        annotation[split] = []
        for number in range(count):
            name, bright = f"{split}{number}", number % 2 == 0
            pixels = rng.integers(0, 60, (40, 40)) + (150 if bright else 0) * (np.arange(40)[:, None] < 20)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{name}.png")
            report = "The lungs are clear." if bright else "There is a large effusion."
            annotation[split].append({"id": name, "report": report, "image_path": [f"{name}.png"]})
    (root / "annotation.json").write_text(json.dumps(annotation))
    assert main(["preprocess", "r2gen", str(root), str(out), "format=png", "--workers", "1"]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["full", "[X]"])
def test_it_learns_to_tell_images_apart(
    finetune: Any,
    bright_or_dark: Path,
    targets: str,
    no_java: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finetune(
        "run",
        f"data.root={bright_or_dark}",
        f"model.adapter.targets={targets}",
        "train.batch_size=4",
        "train.epochs=20",
        "train.lr=1e-2",
        "train.validate_every_epochs=20",
        "generation.max_new_tokens=16",
    )
    losses = run.series("train/loss")
    assert losses[0] > 4
    # Without the image one bit is left to guess in a report of about seven tokens: a loss of some 0.1.
    assert losses[-1] < 0.03
    assert main(["evaluate", "--model", str(run.directory), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scores"]["BLEU_4"] > 0.99
