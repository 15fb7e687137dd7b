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
    """The tokenizer of a hub name or directory.

    Raises:
        RunError: when it cannot be had; says whether it was looked for on the hub or on this disk.
    """
    from transformers import AutoTokenizer

    try:
        check_model_directory(source)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever its reader met
        raise unavailable(source, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise RunError(f"{source}: this tokenizer has no end-of-sequence token, so a report could never end")
    return tokenizer


def load_llm(source: str, revision: str | None, dtype: torch.dtype, quantization: str = "none") -> PreTrainedModel:
    """A causal LM with its weights, from the hub, the local cache or a directory.

    Args:
        dtype: of the weights, or of the arithmetic on quantised ones.
        quantization: `none`, `8bit` or `4bit` (NF4, QLoRA arXiv 2305.14314), through bitsandbytes.

    Raises:
        RunError: when it cannot be had, or lacks weights that transformers would fill with noise.
        UsageError: when it is to be quantised and bitsandbytes is not there.
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
    except Exception as error:  # a broken file raises whatever its reader met
        raise unavailable(source, "LLM", error) from error
    if missing := sorted(loaded["missing_keys"]):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise RunError(f"{source}: this is no whole {type(llm).__name__}: {missing[0]} is missing{more}")
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
    # Weights are quantised where they are put, so they go to this process's device at once.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build_scratch_llm(settings: ScratchLLMSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small Llama with random weights for `tokenizer`."""
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
    """Puts dropout on the output of the attention and of the MLP of each decoder layer; it acts in training alone.

    Hooks rather than modules: the names of the weights stay those of the plain LLM.
    """
    if rate == 0:
        return

    def drop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, rate, module.training)

    for layer in llm.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def train_tokenizer(texts: Iterable[str], vocab_size: int, prompt: str = PUBLISHED_PROMPT) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on reports: no text is out of its vocabulary.

    Args:
        texts: the training reports, cleaned as they will be learned, and what else the prompts say.
        vocab_size: largest number of tokens, bytes and special tokens included.
        prompt: what stands around image and context, which the tokens are to fit too.
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
    """Drops the decoding defaults that an LLM brings along: a recipe's decoding is the whole of it."""
    from transformers import GenerationConfig

    llm.generation_config = GenerationConfig()
    return llm


def llm_record(settings: LLMSettings, llm: PreTrainedModel) -> dict[str, Any]:
    """How a run names an LLM that it does not hold: id, revision, commit, and a hash of its configuration.

    The same LLM has the same hash in another precision, under another name and with another transformers.
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
    """A hash over the size and 64 samples of each weight file of a directory; None for a hub name.

    Files of `torch.save` are hashed where there are no safetensors files, as transformers reads them only then.


    A hub model is pinned by its commit. Of local files the whole would take half a minute for a 7B model, at every
    start; samples all over a file tell apart models that share embeddings or norms, and find a cut file.
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
    """The error that says why a model could not be had, and whether it was looked for on the hub or on this disk.

    Args:
        source: hub name or directory, as the recipe names it by `key`.
        what: `LLM`, `tokenizer` or `text encoder`.
        error: what the loading raised.
    """
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).exists():
        return RunError(f"{source}: no {what} could be loaded from this directory: {first}")
    if source.startswith((".", "/", "~")):
        return RunError(f"{source}: no such directory", hint=f"It is to hold the {what} ({key}).")
    return RunError(
        f"the {what} {source!r} is neither a directory here nor could it be had from the hub: {first}",
        hint=f"Give a directory that holds it ({key}=PATH), or check the name, the network and your access.",
    )
