"""What stands in for an LLM in a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emrrg_cli.planning.llms import quantize


@pytest.mark.parametrize(("quantization", "class_name"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_projections_are_stored_as_in_bitsandbytes(quantization: str, class_name: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    llm: Any = LlamaForCausalLM(config).requires_grad_(False)
    embeddings = torch.randn(1, 5, 64, requires_grad=True)
    before = llm(inputs_embeds=embeddings).logits
    quantize(llm, quantization, torch.float32)
    layer = llm.model.layers[1]
    for projection in (layer.self_attn.q_proj, layer.mlp.down_proj):
        assert type(projection).__name__ == class_name
        assert projection.weight.element_size() == 1
        assert not projection.weight.requires_grad
    assert type(llm.lm_head) is torch.nn.Linear
    after = llm(inputs_embeds=embeddings).logits
    assert not torch.equal(after, before)
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > 0.9
    after.sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_an_llm_without_quantisation_is_unchanged() -> None:
    llm = torch.nn.Sequential(torch.nn.Linear(2, 2))
    quantize(llm, "none", torch.float32)
    assert type(llm[0]) is torch.nn.Linear
