"""Tiny towers and a tokenizer that the tests of the models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emrrg_cli.models.arm.encoder import ArmEncoder

TEXTS = [
    "the heart is enlarged . no pneumothorax .",
    "there is a left pleural effusion . the lungs are otherwise clear .",
    "the lungs are clear . heart size is normal . no acute findings .",
    "a nodule is seen in the right upper lobe .",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE with BOS, EOS and padding; 320 tokens. Not to be changed."""
    from emrrg_cli.models.llm import train_tokenizer

    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="session")
def qwen_tokenizer(tokenizer: Any) -> Any:
    """As Qwen's: neither BOS nor a padding token of its own."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., ArmEncoder]:
    """Makes encoders of width 32 on 64 x 64 images (17 tokens); equal seeds give equal weights."""

    def make(depth: int = 3, image_size: int = 64, drop_path: float = 0.0, seed: int = 0) -> ArmEncoder:
        torch.manual_seed(seed)
        encoder = ArmEncoder(32, depth, image_size=image_size, d_state=4, drop_path=drop_path)
        with torch.no_grad():
            # Away from the initialisation, where steps are so small that the state hardly counts.
            for name, parameter in encoder.named_parameters():
                if ".mixer." in name:
                    parameter += 0.2 * torch.randn_like(parameter)
                if name.endswith("dt_proj.bias"):
                    parameter += 4
        return encoder

    return make


@pytest.fixture(scope="session")
def make_llm() -> Callable[..., Any]:
    """Makes tiny causal LMs by architecture: width 32, 4 query and 2 key/value heads, spread-out random weights."""

    def make(kind: str = "llama", layers: int = 3, seed: int = 0, **options: Any) -> Any:
        import transformers

        from emrrg_cli.models.llm import with_plain_decoding

        names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
        settings: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,  # wide enough for outputs to depend on what went in
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_implementation": "sdpa",
        }
        if kind == "qwen3":
            settings["head_dim"] = 12  # not hidden_size / heads
        if kind == "mistral":
            settings["sliding_window"] = 8
        config = getattr(transformers, names[kind] + "Config")(**(settings | options))
        torch.manual_seed(seed)
        llm = getattr(transformers, names[kind] + "ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in llm.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter += 0.2 * torch.randn_like(parameter)
        return with_plain_decoding(llm).eval()

    return make
