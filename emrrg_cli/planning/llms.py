"""Configurations and quantisation of LLMs, for models without real weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from emrrg_cli.errors import RunError
from emrrg_cli.models.foreign_files import check_model_directory
from emrrg_cli.models.llm import build_scratch_llm, can_quantize
from emrrg_cli.recipe.finetuning import ModelSettings

# LLMs of the shipped recipes, copied from their published config.json, so planning them needs no network.
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
    """Replaces the tokenizer: planning needs only the prompt's length, at about four characters per token."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return 3

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3] * math.ceil(len(text) / 4)


def llm_config(settings: ModelSettings) -> Any:
    """Returns the configuration of the LLM: a known one, or one from a directory, the cache or the hub.

    Raises:
        RunError: The configuration cannot be loaded.
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
    except Exception as error:  # a broken file can raise any error
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"cannot load the configuration of the LLM {settings.llm.name!r}: {first}",
            hint="Planning needs only its config.json: give a directory that contains it, or connect to the hub.",
        ) from error


def quantize(llm: Any, quantization: str, dtype: torch.dtype) -> None:
    """Quantises the linear layers of an LLM with bitsandbytes, in place. Does nothing if it is not installed.

    Args:
        llm: The LLM.
        quantization: `none`, `8bit` or `4bit`; the options are those of `emrrg_cli.models.llm.load_llm`.
        dtype: Compute dtype.
    """
    if quantization == "none" or not can_quantize():
        return
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, module in list(llm.named_modules()):
        if type(module) is not nn.Linear or module is llm.get_output_embeddings():
            continue
        shape, bias, device = (module.in_features, module.out_features), module.bias is not None, module.weight.device
        weight = module.weight.detach().cpu()  # quantised when it is moved to the device
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
    setattr(llm, f"is_loaded_in_{quantization}", True)  # PEFT reads this attribute to choose its layer classes
