"""Configurations of LLMs, without their weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from emrrg_cli.errors import RunError
from emrrg_cli.models.foreign_files import check_model_directory
from emrrg_cli.models.llm import build_scratch_llm, can_quantize
from emrrg_cli.recipe.finetuning import ModelSettings

# The LLMs of the shipped recipes, so that planning needs no network. From their published config.json.
KNOWN_LLMS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-chat-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "Qwen/Qwen1.5-1.8B-Chat": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


class PlanTokenizer:
    """Stands in for a tokenizer: only the length of the prompt matters, about four characters a token."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return 3

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3] * math.ceil(len(text) / 4)


def llm_config(settings: ModelSettings) -> Any:
    """The LLM's configuration, without weights: known, local, cached or from the hub.

    Raises:
        RunError: when it cannot be had.
    """
    from transformers import AutoConfig

    if settings.llm.name == "scratch":
        tokenizer: Any = PlanTokenizer()
        with torch.device("meta"):
            config = build_scratch_llm(settings.llm.scratch, tokenizer).config
        config.vocab_size = settings.llm.scratch.vocab_size
        return config
    known = KNOWN_LLMS.get(settings.llm.name)
    if known is not None:
        return AutoConfig.for_model(**known)
    try:
        check_model_directory(settings.llm.name)
        return AutoConfig.from_pretrained(
            settings.llm.name, revision=settings.llm.revision or "main", trust_remote_code=False
        )
    except Exception as error:  # a broken file raises whatever its reader met
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"the configuration of the LLM {settings.llm.name!r} cannot be had: {first}",
            hint="Planning needs its config.json only: name a directory that holds one, or connect to the hub.",
        ) from error


def quantize(llm: Any, quantization: str, dtype: torch.dtype) -> None:
    """Quantise the projections of an LLM with bitsandbytes, in place. Without bitsandbytes, nothing changes.

    Args:
        quantization: `none`, `8bit` or `4bit`, with the options of `emrrg_cli.models.llm.load_llm`.
        dtype: of the arithmetic.
    """
    if quantization == "none" or not can_quantize():
        return
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, module in list(llm.named_modules()):
        if type(module) is not nn.Linear or module is llm.get_output_embeddings():
            continue
        shape, bias, device = (module.in_features, module.out_features), module.bias is not None, module.weight.device
        weight = module.weight.detach().cpu()  # is quantised where it is moved to
        if quantization == "8bit":
            held: Any = Linear8bitLt(*shape, bias, has_fp16_weights=False, threshold=6.0, device="meta")
            held.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            held = Linear4bit(*shape, bias, dtype, quant_type="nf4", device="meta")
            held.weight = Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=held
            )
        held.bias = module.bias
        llm.set_submodule(name, held.to(device))
    setattr(llm, f"is_loaded_in_{quantization}", True)  # PEFT chooses its layers by this
