"""The plan: parameters to the last one, memory parts, proposals, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli import planning
from emrrg_cli.app import main
from emrrg_cli.decoding.reports import load_generator
from emrrg_cli.errors import UsageError
from emrrg_cli.planning import prediction, sizes
from emrrg_cli.planning.llms import llm_config
from emrrg_cli.planning.trial import Step
from emrrg_cli.recipe.load import load_recipe
from tests.decoding.test_reports import run_dir

__all__ = ["run_dir"]

TINY = [
    "model.encoder.d_model=32",
    "model.encoder.depth=3",
    "model.encoder.image_size=64",
    "model.llm.scratch={hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, vocab_size: 320}",
    "data.max_report_tokens=20",
]


def plan_of(*overrides: str, **options: Any) -> planning.Plan:
    return planning.plan(load_recipe("tiny/finetune", [*TINY, *overrides], stage="finetune"), **options)


@pytest.mark.slow
def test_parameters_are_those_of_the_model() -> None:
    from emrrg_cli.models.build import assemble, build_encoder, fresh_llm
    from emrrg_cli.models.llm import train_tokenizer

    recipe = load_recipe(
        "tiny/finetune", [*TINY, "model.adapter.targets=[X]", "model.adapter.rank=4"], stage="finetune"
    )
    import torch

    tokenizer = train_tokenizer(["no effusion"], 300)
    recipe.model.llm.scratch.vocab_size = len(tokenizer)
    encoder = build_encoder(recipe.model.encoder)
    model = assemble(recipe.model, encoder, fresh_llm(recipe.model, tokenizer, torch.float32), tokenizer)
    result = planning.plan(recipe)
    assert sum(result.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert sum(result.trainable.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result.parameters["LoRA"] == 3 * 2 * 32 * 4
    assert result.trainable["encoder"] == 0


def test_published_counts() -> None:
    """LoRA_p(X) at rank 16 (SPEC: base 294,912; large 786,432), without a weight on disk or in memory."""
    for size, count in (("base", 294_912), ("large", 786_432)):
        recipe = load_recipe("mimic_cxr/finetune", [f"model.encoder.size={size}"], stage="finetune")
        model = sizes.meta_model(recipe.model, llm_config(recipe.model))
        assert all(parameter.is_meta for parameter in model.parameters())
        parameters, trainable = sizes.count_parameters(model)
        assert parameters["LoRA"] == trainable["LoRA"] == count
        assert trainable["LLM"] == trainable["encoder"] == 0
        assert parameters["LLM"] == 6_738_415_616  # Llama 2 7B


@pytest.mark.slow
def test_memory_grows_with_what_is_trained_and_with_the_batch() -> None:
    frozen, full = plan_of("model.adapter.targets=none"), plan_of("model.adapter.targets=full")
    assert full.memory["optimizer"] - frozen.memory["optimizer"] == 8 * full.parameters["encoder"]
    small, large = plan_of("train.batch_size=2"), plan_of("train.batch_size=16")
    assert large.memory["activations"] == pytest.approx(8 * small.memory["activations"], rel=0.05)
    assert plan_of("train.batch_size=16", "train.micro_batch_size=2").memory["activations"] == pytest.approx(
        small.memory["activations"], rel=0.05
    )


def test_quantisation_counts() -> None:
    name = ["model.llm.name=meta-llama/Llama-2-7b-chat-hf", "model.llm.frozen=true", "model.hybrid.every=null"]
    weights = []
    for quantization in ("none", "8bit", "4bit"):
        recipe = load_recipe("tiny/finetune", [*name, f"model.llm.quantization={quantization}"], stage="finetune")
        model = sizes.meta_model(recipe.model, llm_config(recipe.model))
        weights.append(sizes.weight_bytes(model, recipe, "bf16") / 2**30)
    assert weights[0] == pytest.approx(12.55, abs=0.6)  # 6.74e9 parameters at 2 bytes, and the rest at 4
    assert weights[0] > 1.7 * weights[1] > 2.8 * weights[2]


@pytest.mark.slow
def test_advice_is_given_if_training_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = plan_of()
    assert roomy.fits
    assert roomy.proposals == []
    monkeypatch.setattr(prediction, "available_bytes", lambda device: roomy.peak - roomy.memory["activations"] // 2)
    tight = plan_of()
    assert not tight.fits
    assert any(proposal.startswith("train.micro_batch_size=") for proposal in tight.proposals)


@pytest.mark.slow
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny/finetune", *TINY, "--studies", "80", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps_per_epoch"] == 10
    assert result["seconds_per_epoch"] == pytest.approx(10 * result["seconds_per_step"])
    assert result["peak"] == sum(result["memory"].values())
    assert main(["plan", "tiny/finetune", *TINY]) == 0
    assert "fits" in capsys.readouterr().out


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "measure", lambda *args, **options: Step(1.0, 0.0, 1.0, 1.0))
    monkeypatch.setattr(prediction, "seconds_per_study", lambda recipe, micro: 1.0)


@pytest.mark.usefixtures("no_trial")
def test_the_plan_counts_studies_as_training_does(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny_dataset, root, ignore=shutil.ignore_patterns("manifest.json"))
    arguments = ["plan", "tiny/finetune", *TINY, f"data.root={root}", "train.batch_size=2", "--json"]

    def steps(*more: str) -> int:
        assert main([*arguments, *more]) == 0
        return int(json.loads(capsys.readouterr().out)["steps_per_epoch"])

    assert (steps(), steps("data.limit=7"), steps("data.limit=50")) == (8, 3, 8)
    assert (steps("--studies", "40"), steps("--studies", "40", "data.limit=10")) == (20, 5)
    for file in root.glob("data/train-*"):
        file.unlink()
    assert main(arguments) == 1
    assert f"error: {root}: this dataset directory has no split named train\n" in capsys.readouterr().err
    assert main(["plan", "tiny/finetune", f"data.root={tmp_path / 'gone'}"]) == 2
    assert "no such dataset directory" in capsys.readouterr().err


def test_a_batch_that_the_training_would_refuse_is_not_planned() -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size=6 does not divide among 4 processes"):
        plan_of("train.batch_size=6", processes=4)
    with pytest.raises(UsageError, match=r"7 usable examples, fewer than train\.batch_size=8"):
        plan_of(studies=7)


@pytest.mark.usefixtures("no_trial")
def test_what_the_time_does_not_include_is_named(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny_dataset, root, ignore=shutil.ignore_patterns("manifest.json"))
    command = ["plan", "tiny/finetune", *TINY, "train={epochs: 3, batch_size: 2, select: loss}"]

    def planned(*more: str) -> list[str]:
        assert main([*command, *more]) == 0
        told = capsys.readouterr().out
        assert main([*command, *more, "--json"]) == 0
        missing: list[str] = json.loads(capsys.readouterr().out)["not_in_time"]
        time = next(line for line in told.splitlines() if line.startswith("time"))
        assert time.endswith(f"(3 epochs), without {', '.join(missing)}" if missing else "(3 epochs)")
        assert ("at least" in time) == bool(missing)
        return missing

    scores, given = "train.self_critical={after_epochs: 2}", f"data.root={root}"
    assert planned("--studies", "80", scores) == ["reading images", "validation", "self-critical training"]
    assert planned(given, scores) == ["validation", "self-critical training"]
    for file in root.glob("data/validation-*"):
        file.unlink()
    assert planned(given, "train.self_critical={after_epochs: 3}") == []


@pytest.mark.usefixtures("no_trial")
def test_the_time_of_all_steps_ends_where_the_schedule_does(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "tiny/finetune", *TINY, "train.epochs=3"]  # 1 s per step of 8

    def planned(*more: str) -> dict[str, Any]:
        assert main([*arguments, *more, "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    whole, cut, long = (planned("--studies", "80", f"train.max_steps={n}") for n in ("null", "12", "31"))
    assert [(r["steps_per_epoch"], r["total_steps"], r["seconds_total"]) for r in (whole, cut, long)] == [
        (10, 30, 30.0),
        (10, 12, 12.0),
        (10, 30, 30.0),
    ]
    unknown = planned("train.max_steps=12")
    assert (unknown["total_steps"], unknown["seconds_total"], unknown["seconds_per_epoch"]) == (None, None, None)
    for steps, told in (
        ("null", "at least 30 s for all 30 steps (3 epochs)"),
        ("12", "at least 12 s for all 12 steps (train.max_steps)"),
    ):
        assert main([*arguments, "--studies", "80", f"train.max_steps={steps}"]) == 0
        assert f"10 s per epoch of 10 steps, {told}, without " in capsys.readouterr().out
    assert any("does not reach" in note for note in planned("--studies", "80", "train.warmup_epochs=4")["notes"])


def test_the_views_of_a_study_are_those_that_are_used(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = []

    def measure(*arguments: Any, **options: Any) -> Step:
        views.append(options["views"])
        return Step(1.0, 0.0, 1.0, 1.0)

    monkeypatch.setattr(prediction, "measure", measure)
    monkeypatch.setattr(prediction, "seconds_per_study", lambda recipe, micro: 1.0)
    root = f"data.root={tiny_dataset}"
    plan_of()
    plan_of(views=3)
    plan_of("data.max_views=2", views=3)
    plan_of(root)
    plan_of(root, "data.max_views=1")
    plan_of(root, views=3)
    assert views == [1, 3, 2, 2, 1, 3]


def test_an_unknown_llm_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny/finetune", f"model.llm.name={tmp_path}/none"]) == 2
    assert "none: no such directory" in capsys.readouterr().err
    assert main(["plan", "tiny/finetune", f"model.llm.name={tmp_path}"]) == 1
    assert "config.json" in capsys.readouterr().err


def test_a_step_is_its_micro_batches_and_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(seconds=2.0, update=0.5, saved=1000.0, checkpointed=100.0)
    monkeypatch.setattr(prediction, "measure", lambda *args, **options: step)
    result = plan_of("train.batch_size=12", "train.micro_batch_size=3")
    assert result.seconds_loading is None
    assert result.seconds_per_step == result.seconds_computing == 4 * 2.0 + 0.5
    assert any("data.root=DIR" in note for note in result.notes)
    assert plan_of("train.batch_size=12", processes=4).seconds_per_step == 2.5
    kept = plan_of("train.gradient_checkpointing=true").memory["activations"]
    assert plan_of().memory["activations"] - kept == pytest.approx(prediction.HOLES * 900, abs=1)


def test_loading_and_computing_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    together = prediction._together
    assert together(2.0, 3.0, 0, "cuda") == 5.0  # one process does both
    assert together(2.0, 3.0, 4, "cuda") == 3.0
    assert together(4.0, 3.0, 4, "cuda") == 4.0
    assert together(4.0, 3.0, 4, "cpu") == 5.5  # half the cores load
    assert together(4.0, 3.0, 16, "cpu") == 7.0


def test_slow_loading_is_reported(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "measure", lambda *args, **options: Step(1.0, 0.0, 1.0, 1.0))
    monkeypatch.setattr(prediction, "seconds_per_study", lambda recipe, micro: 1.0)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    overrides = [f"data.root={tiny_dataset}", "train.batch_size=4"]
    quick = plan_of(*overrides, "data.workers=2").notes
    assert quick[0] == "reading images is the bottleneck; data.workers=8 would be fast enough"
    slow = plan_of(*overrides, "data.workers=8").notes
    assert slow[0] == "reading images is the bottleneck; preprocess them to a smaller size"


def test_gradients_and_the_optimizers_copy() -> None:
    gradients = sizes.gradients
    assert gradients(100, 1000, accumulates=False, device_type="cpu") == 0
    assert gradients(100, 1000, accumulates=True, device_type="cpu") == 100
    assert gradients(100, 30, accumulates=False, device_type="cpu") == 70
    assert gradients(100, 30, accumulates=False, device_type="cuda") == 170


CONSENSUS = ["generation.num_beams=1", "generation.do_sample=true", "generation.consensus=6"]


@pytest.mark.parametrize("changes", [[], CONSENSUS, ["generation.max_new_tokens=20", "generation.batch_size=5"]])
@pytest.mark.parametrize("joined", ["average", "concat"])
@pytest.mark.parametrize("prompt", ["full", "pooled"])
def test_bytes_of_reports_are_those_of_the_engine(
    run_dir: Path, tmp_path: Path, changes: list[str], joined: str, prompt: str
) -> None:
    import torch

    shutil.copytree(run_dir, tmp_path / "run")
    file = tmp_path / "run" / "recipe.yaml"
    text = file.read_text().replace("views: average", f"views: {joined}")
    file.write_text(text.replace("visual_prompt: full", f"visual_prompt: {prompt}"))
    generator = load_generator(tmp_path / "run", device="cpu", overrides=changes)
    assert (generator.model.views, generator.model.visual_prompt) == (joined, prompt)
    generator.generate_pixels([torch.zeros(2, 48, 48, dtype=torch.uint8)])
    assert generator.writer._engine is not None
    stored = sum(tensor.nbytes for tensor in generator.writer._engine.slots.cache.stores())
    recipe = generator.recipe
    each = sizes.report_bytes(generator.model, recipe, 2, generator.precision)
    assert sizes.reports_at_a_time(recipe.generation) * each == stored


def test_validation_counts_the_samples_of_consensus(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_trial", lambda work, parameters, report: (Step(1.0, 0.0, 1.0, 1.0), 0))
    monkeypatch.setattr(prediction, "seconds_per_study", lambda recipe, micro: 1.0)
    one, several = plan_of("generation.num_beams=1"), plan_of(*CONSENSUS)
    assert (one.reports_at_a_time, several.reports_at_a_time) == (8, 48)
    assert several.reports_bytes == 6 * one.reports_bytes
    training = several.memory["activations"] + several.memory["gradients"]
    assert several.memory["reports in validation"] == several.reports_bytes - training > 0
    assert "which writes 6 reports (generation.consensus) for each study: 48 reports at a time" in several.notes[-1]

    def proposals(less: float, *changes: str) -> list[str]:
        whole = plan_of(*CONSENSUS, *changes)
        available = (whole.peak - less * whole.reports_bytes) / 0.95
        with monkeypatch.context() as patch:
            patch.setattr(prediction, "available_bytes", lambda device: available)
            return plan_of(*CONSENSUS, *changes).proposals

    assert proposals(0.2) == ["generation.batch_size=6"]
    many = ("generation.batch_size=1", "generation.consensus=48")
    assert proposals(0.2, *many) == ["generation.batch_size=1 and a smaller generation.consensus"]
    assert plan_of("model.views=concat", views=2).reports_bytes > plan_of(views=2).reports_bytes
    assert plan_of("train.select=loss").reports_bytes == 0
    root = tmp_path / "copy"
    shutil.copytree(tiny_dataset, root, ignore=shutil.ignore_patterns("manifest.json", "validation-*"))
    assert plan_of(f"data.root={root}", "train.batch_size=2").reports_bytes == 0
