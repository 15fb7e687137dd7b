"""The plan: parameters to the last one, memory parts, proposals, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli import planning
from emrrg_cli.app import main
from emrrg_cli.recipe.load import load_recipe

TINY = ["model.encoder.d_model=32", "model.encoder.depth=3", "model.encoder.image_size=64", "data.max_report_tokens=20"]


def plan_of(*overrides: str, **options: Any) -> planning.Plan:
    return planning.plan(load_recipe("tiny/finetune", [*TINY, *overrides], stage="finetune"), **options)


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
        model = planning._meta_model(recipe.model, planning.llm_config(recipe.model))
        assert all(parameter.is_meta for parameter in model.parameters())
        parameters, trainable = planning._count(model)
        assert parameters["LoRA"] == trainable["LoRA"] == count
        assert trainable["LLM"] == trainable["encoder"] == 0
        assert parameters["LLM"] == 6_738_415_616  # Llama 2 7B


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
    sizes = []
    for quantization in ("none", "8bit", "4bit"):
        recipe = load_recipe("tiny/finetune", [*name, f"model.llm.quantization={quantization}"], stage="finetune")
        model = planning._meta_model(recipe.model, planning.llm_config(recipe.model))
        sizes.append(planning._weight_bytes(model, recipe, "bf16") / 2**30)
    assert sizes[0] == pytest.approx(12.55, abs=0.6)  # 6.74e9 parameters at 2 bytes, and the rest at 4
    assert sizes[0] > 1.7 * sizes[1] > 2.8 * sizes[2]


def test_what_does_not_fit_is_given_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = plan_of()
    assert roomy.fits
    assert roomy.proposals == []
    monkeypatch.setattr(planning, "_available_bytes", lambda device: roomy.peak - roomy.memory["activations"] // 2)
    tight = plan_of()
    assert not tight.fits
    assert any(proposal.startswith("train.micro_batch_size=") for proposal in tight.proposals)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny/finetune", *TINY, "--studies", "80", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps_per_epoch"] == 10
    assert result["seconds_per_epoch"] == pytest.approx(10 * result["seconds_per_step"])
    assert result["peak"] == sum(result["memory"].values())
    assert main(["plan", "tiny/finetune", *TINY]) == 0
    assert "fits" in capsys.readouterr().out


def test_an_unknown_llm_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny/finetune", f"model.llm.name={tmp_path}/none"]) == 1
    assert "config.json" in capsys.readouterr().err
