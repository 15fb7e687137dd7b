"""The language model: any Hugging Face causal LM by hub name or directory, or a small Llama from scratch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emrrg_cli.datasets.context import prompt_parts
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.foreign_files import check_model_directory
from emrrg_cli.silence_libraries import no_loading_bars
from emrrg_cli.vocabulary import PUBLISHED_PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emrrg_cli.recipe.finetuning import LLMSettings, ScratchLLMSettings

_SAMPLE_BYTES = 1 << 16


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a hub name or directory.

    Raises:
        RunError: It cannot be loaded. The message says whether the hub or the disk was searched.
    """
    from transformers import AutoTokenizer

    try:
        check_model_directory(source)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # a broken file raises errors of many types
        raise unavailable(source, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise RunError(f"{source}: this tokenizer has no end-of-sequence token, so a report could never end")
    return tokenizer


def load_llm(source: str, revision: str | None, dtype: torch.dtype, quantization: str = "none") -> PreTrainedModel:
    """Loads a causal LM with its weights, from the hub, the local cache or a directory.

    Args:
        dtype: dtype of the weights, or of the computation with quantised weights.
        quantization: `none`, `8bit` or `4bit` (NF4, QLoRA arXiv 2305.14314), through bitsandbytes.

    Raises:
        RunError: It cannot be loaded, or weights are missing, which transformers would initialise at random.
        UsageError: Quantization needs bitsandbytes, which is not installed.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if quantization != "none":
        options = {"quantization_config": _quantization(quantization, dtype), "device_map": {"": _own_device()}}
    try:
        check_model_directory(source)
        with no_loading_bars():
            llm, loaded = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision or "main",
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:  # a broken file raises errors of many types
        raise unavailable(source, "LLM", error) from error
    if missing := sorted(loaded["missing_keys"]):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise RunError(f"{source}: this {type(llm).__name__} is incomplete: {missing[0]} is missing{more}")
    return with_plain_decoding(llm)


def can_quantize() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def _quantization(name: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if not can_quantize():
        raise UsageError(
            f"model.llm.quantization={name} needs bitsandbytes, which is not installed",
            hint="pip install bitsandbytes, or set model.llm.quantization=none.",
        )
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _own_device() -> torch.device:
    # Weights are quantised on the device where they are loaded, so they are loaded on the device of this process.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build_scratch_llm(settings: ScratchLLMSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Builds a small Llama with random weights for `tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 4 * 2 // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return with_plain_decoding(LlamaForCausalLM(config))


def add_dropout(llm: Any, rate: float) -> None:
    """Adds dropout to the outputs of attention and MLP of each decoder layer, in training only.

    It uses hooks, not modules, so that the names of the weights do not change.
    """
    if rate == 0:
        return

    def drop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, rate, module.training)

    for layer in llm.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def train_tokenizer(texts: Iterable[str], vocab_size: int, prompt: str = PUBLISHED_PROMPT) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer on reports. It can encode any text.

    Args:
        texts: The training reports, cleaned as for training, and the contexts of the prompts.
        vocab_size: Largest number of tokens, bytes and special tokens included.
        prompt: Text around image and context; the tokenizer is also trained on it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*filter(None, prompt_parts(prompt)), *texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def with_plain_decoding(llm: Any) -> Any:
    """Removes the decoding defaults of an LLM, because only the recipe sets decoding options."""
    from transformers import GenerationConfig

    llm.generation_config = GenerationConfig()
    return llm


def llm_record(settings: LLMSettings, llm: PreTrainedModel) -> dict[str, Any]:
    """Returns the record of an LLM that is not stored in the run: name, revision, commit and hashes.

    The hash of the configuration does not depend on precision, name or version of transformers.
    """
    import hashlib
    import json

    config = json.dumps(_identity(llm.config.to_diff_dict()), sort_keys=True).encode()
    return {
        "name": settings.name,
        "revision": settings.revision,
        "commit": getattr(llm.config, "_commit_hash", None),
        "weights_fingerprint": _weights_fingerprint(settings.name),
        "config_sha256": hashlib.sha256(config).hexdigest(),
    }


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    passing = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "quantization_config")
    return {
        key: _identity(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in passing
    }


def _weights_fingerprint(source: str) -> str | None:
    """Returns a hash over the size and 64 samples of each weight file of a directory; None for a hub name.

    Files of `torch.save` are hashed only if there are no safetensors files, because transformers reads them only then.

    A hub model is identified by its commit. Hashing the whole files of a 7B model would take half a minute at every
    start. Samples from the whole file distinguish models that share embeddings or norms, and detect a truncated file.
    """
    import hashlib

    directory = Path(source)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for i in range(64):
                stream.seek(max(0, size - _SAMPLE_BYTES) * i // 63)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def unavailable(source: str, what: str, error: Exception, key: str = "model.llm.name") -> RunError:
    """Returns the error for a model that cannot be loaded. It says whether the hub or the disk was searched.

    Args:
        source: Hub name or directory, from the setting `key` of the recipe.
        what: `LLM`, `tokenizer` or `text encoder`.
        error: The error that the loading raised.
    """
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).exists():
        return RunError(f"{source}: no {what} could be loaded from this directory: {first}")
    if source.startswith((".", "/", "~")):
        return RunError(f"{source}: no such directory", hint=f"Set {key}=PATH to a directory with the {what}.")
    return RunError(
        f"the {what} {source!r} is not a local directory and could not be loaded from the hub: {first}",
        hint=f"Set {key}=PATH to a directory with the {what}, or check the name, the network and your access.",
    )
