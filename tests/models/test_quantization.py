"""A frozen LLM in 4 and 8 bit with LoRA and hybrid layers; where bitsandbytes is installed."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from emrrg_cli.models.adapters import is_adapted
from emrrg_cli.models.build import assemble, build_encoder, load_model, save_static, save_trained
from emrrg_cli.models.llm import load_llm, train_tokenizer
from emrrg_cli.recipe.finetuning import ModelSettings

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_qlora_trains_saves_and_loads(quantization: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the heart is normal", "no effusion is seen"], 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    source = tmp_path / "llm"
    LlamaForCausalLM(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    settings = ModelSettings.model_validate(
        {
            "encoder": {"size": None, "d_model": 32, "depth": 1, "image_size": 32},
            "adapter": {"targets": ["X", "llm"], "rank": 4},
            "llm": {"name": str(source), "quantization": quantization},
            "hybrid": {"every": 1},
        }
    )
    llm = load_llm(str(source), None, torch.float32, quantization)
    assert "bitsandbytes" in type(llm.model.layers[0].self_attn.k_proj).__module__
    encoder = build_encoder(settings.encoder)
    run = tmp_path / "run"
    run.mkdir()
    save_static(run, settings, encoder, llm, tokenizer)
    device = llm.device  # the GPU where there is one
    model = assemble(settings, encoder, llm, tokenizer).to(device)
    lora = {name: p for name, p in model.named_parameters() if ".lora_B" in name and name.startswith("llm.")}
    pixels = torch.randint(0, 256, (2, 32, 32), dtype=torch.uint8, device=device)
    views = torch.tensor([1, 1], device=device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prompt, mask, visual = model.prompt(pixels, views)
    model.llm(inputs_embeds=prompt, attention_mask=mask, **visual).logits.square().sum().backward()
    assert lora
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.values())
    optimizer.step()
    model.eval()
    save_trained(run, settings, model)
    loaded = load_model(run, settings, torch.float32).to(device)
    assert is_adapted(loaded.llm)  # not merged into quantised weights
    with torch.no_grad():
        ours = model.llm(inputs_embeds=prompt, attention_mask=mask, **visual).logits
        theirs = loaded.llm(inputs_embeds=prompt, attention_mask=mask, **visual).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
