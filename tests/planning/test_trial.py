"""The trial: what it extrapolates is what the whole model has, and what it does where memory is short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from emrrg_cli.models.build import assemble, build_encoder, fresh_llm
from emrrg_cli.planning import trial
from emrrg_cli.planning.llms import PlanTokenizer, llm_config
from emrrg_cli.planning.sizes import reports_per_study
from emrrg_cli.planning.trial import _SavedBytes, _Trial
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.runtime import make_accelerator

TINY = [
    "model.encoder.d_model=32",
    "model.encoder.depth=7",
    "model.encoder.image_size=64",
    "model.llm.scratch.hidden_size=32",
    "model.llm.scratch.layers=8",
    "model.llm.scratch.vocab_size=300",
    "data.max_report_tokens=12",
]


def recipe_of(*overrides: str) -> FinetuneRecipe:
    return load_recipe("tiny/finetune", [*TINY, *overrides], stage="finetune")


def trial_of(recipe: FinetuneRecipe, precision: str = "fp32", further: int = 2) -> _Trial:
    return _Trial(recipe, llm_config(recipe.model), make_accelerator(precision, 0), 1, further)


class Tokenizer(PlanTokenizer):
    """Of the vocabulary that the recipe asks for."""

    def __len__(self) -> int:
        return 300


@pytest.mark.parametrize("every", ["null", "1", "3"])
@pytest.mark.parametrize("targets", ["full", "[X]"])
def test_saved_bytes_are_those_of_the_whole_model(every: str, targets: str) -> None:
    recipe = recipe_of(f"model.hybrid.every={every}", f"model.adapter.targets={targets}")
    small = trial_of(recipe)
    step = small.whole(2, 2, lambda text: None)
    tokenizer: Any = Tokenizer()
    llm = fresh_llm(recipe.model, tokenizer, torch.float32)
    whole = assemble(recipe.model, build_encoder(recipe.model.encoder), llm, tokenizer).train()
    counter = _SavedBytes(whole)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        whole(small._batch(2))
    # Stochastic depth is on all blocks of the trial but the first, and on all but the first two of the model.
    assert step.saved == pytest.approx(counter.total, rel=0.01)
    assert step.seconds > 0
    assert step.update > 0


def test_a_trial_keeps_only_the_parts_it_measures() -> None:
    small = trial_of(recipe_of("model.hybrid.every=3"))
    assert small.missing == {"encoder block": 6, "hybrid decoder layer": 2, "decoder layer": 5}

    def held() -> tuple[int, int, int]:
        module: Any = small.module
        layers = module.llm.get_decoder().layers
        hybrids = sum(hasattr(layer.self_attn, "cross") for layer in layers)
        return len(module.encoder.layers), hybrids, len(layers) - hybrids

    small._keep(None)
    assert held() == (1, 1, 0)
    small._keep("encoder block")
    assert held() == (3, 1, 0)
    small._keep("hybrid decoder layer")
    assert held() == (1, 3, 0)
    small._keep("decoder layer")
    assert held() == (1, 1, 2)
    # 1 for the rest, 2 a block, 3 a hybrid layer, 5 a plain one.
    figures = {None: 6.0, "encoder block": 10.0, "hybrid decoder layer": 12.0, "decoder layer": 16.0}
    assert small._extrapolate(figures) == 1 + 7 * 2 + 3 * 3 + 5 * 5


@pytest.mark.parametrize("kind", ["qwen2", "smollm3"])
def test_a_trial_may_have_more_layers_than_a_small_llm(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, vocab_size=300, num_hidden_layers=5, pad_token_id=0, **sizes)
    assert config.layer_types
    small = _Trial(recipe_of("model.hybrid.every=4"), config, make_accelerator("fp32", 0), 1, 4)
    assert len(small.hybrid_layers) + len(small.plain_layers) == 6
    assert small._time(1)["seconds"] > 0


def test_memory_of_self_critical_training_counts_every_report() -> None:
    recipe = recipe_of("train.self_critical={samples: 3, cross_entropy: 0.1}")
    small, alone = trial_of(recipe), trial_of(recipe_of())
    tokenizer: Any = Tokenizer()
    llm = fresh_llm(recipe.model, tokenizer, torch.float32)
    whole = assemble(recipe.model, build_encoder(recipe.model.encoder), llm, tokenizer).train()
    counter = _SavedBytes(whole)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        whole(small._batch(2, 4))
    saved = small.whole(2, 2, lambda text: None).saved
    assert saved == pytest.approx(counter.total, rel=0.01)
    assert saved > alone.whole(2, 2, lambda text: None).saved
    assert reports_per_study(recipe_of("train.self_critical={samples: 3, cross_entropy: 0}")) == 3


def test_memory_of_a_large_batch_is_extrapolated() -> None:
    """Under autocast the copies of the weights are counted once, whatever the studies."""
    recipe = recipe_of("train.precision=bf16", "model.encoder.depth=2")
    small = trial_of(recipe, "bf16")
    small._keep(None)
    counter = _SavedBytes(small.module)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        small.model(small._batch(6))
    assert small._saved(None, 6) == pytest.approx(counter.total, rel=0.01)
    assert 3 * small._saved(None, 2) > 1.05 * counter.total


def test_a_trial_counts_the_memory_of_few_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan must fit on a machine on which the training does not."""
    small, sizes = trial_of(recipe_of("model.encoder.depth=1")), []
    batch = small._batch
    monkeypatch.setattr(small, "_batch", lambda micro, reports=1: sizes.append(micro) or batch(micro, reports))
    assert small._saved(None, 64) > 20 * small._saved(None, 2)
    assert max(sizes) == 3


def test_checkpointing_is_timed_as_it_is_trained() -> None:
    small = trial_of(recipe_of("train.gradient_checkpointing=true", "model.encoder.depth=2"))
    step = small.whole(1, 1, lambda text: None)
    assert small.module.encoder.gradient_checkpointing
    assert small.module.llm.is_gradient_checkpointing
    assert step.checkpointed < step.saved


@pytest.mark.slow
def test_the_trial_is_smaller_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []

    class Full:
        def __init__(self, recipe: Any, config: Any, accelerator: Any, views: int, further: int) -> None:
            self.further = further

        def whole(self, micro: int, size: int, report: Any) -> str:
            tried.append((size, self.further))
            if size > fits:
                raise torch.cuda.OutOfMemoryError
            return "measured"

    monkeypatch.setattr(trial, "_Trial", Full)
    gpu = SimpleNamespace(device=torch.device("cuda"), free_memory=lambda: None)

    def measure() -> Any:
        return trial.measure(recipe_of(), None, gpu, micro=6, views=1, llm_parameters=0, report=lambda text: None)

    fits = 2
    assert measure() == "measured"
    assert tried == [(6, 4), (3, 1), (1, 1)]
    fits = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measure()
