"""The language model: any Hugging Face causal LM by hub name or directory, or a small Llama from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emrrg_cli.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emrrg_cli.recipe.schema import LLMSettings, ScratchLLMSettings

# The two halves of the published prompt; the visual tokens stand between them.
PROMPT_BEFORE = "Human: <Img>"
PROMPT_AFTER = "</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:"


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or directory.

    Raises:
        RunError: when it cannot be had; says whether it was looked for on the hub or on this disk.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise _unavailable(source, error) from error
    if tokenizer.eos_token_id is None:
        raise RunError(f"{source}: this tokenizer has no end-of-sequence token, so a report could never end")
    return tokenizer


def load_llm(source: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM with its weights, from the hub, the local cache or a directory.

    Raises:
        RunError: when it cannot be had.
    """
    from transformers import AutoModelForCausalLM

    try:
        llm = AutoModelForCausalLM.from_pretrained(
            source, revision=revision or "main", dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise _unavailable(source, error) from error
    return with_plain_decoding(llm)


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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on reports: no text is out of its vocabulary.

    Args:
        texts: the training reports, cleaned as they will be learned.
        vocab_size: largest number of tokens, bytes and special tokens included.
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
    bpe.train_from_iterator([PROMPT_BEFORE, PROMPT_AFTER, *texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def with_plain_decoding(llm: Any) -> Any:
    """Drops the decoding defaults that an LLM brings along: a recipe's decoding is the whole of it."""
    from transformers import GenerationConfig

    llm.generation_config = GenerationConfig()
    return llm


def llm_record(settings: LLMSettings, llm: PreTrainedModel) -> dict[str, Any]:
    """How a run names an LLM that it does not hold: id, revision, commit, and a hash of its configuration."""
    import hashlib

    config = llm.config.to_json_string(use_diff=False).encode()
    return {
        "name": settings.name,
        "revision": settings.revision,
        "commit": getattr(llm.config, "_commit_hash", None),
        "weights_fingerprint": _weights_fingerprint(settings.name),
        "config_sha256": hashlib.sha256(config).hexdigest(),
    }


def _weights_fingerprint(source: str) -> str | None:
    """A hash over size, first and last MiB of each weight file of a directory; None for a hub name.

    A hub model is pinned by its commit. Of local files the whole would take half a minute for a 7B model, at every
    start; header and both ends tell apart any two models and any cut file.
    """
    import hashlib

    directory = Path(source)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def _unavailable(source: str, error: Exception) -> RunError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).exists() or source.startswith((".", "/", "~")):
        return RunError(f"{source}: no LLM could be loaded from this directory: {first}")
    return RunError(
        f"the LLM {source!r} is neither a directory here nor could it be had from the hub: {first}",
        hint="Give a directory that holds it (model.llm.name=PATH), or check the name, the network and your access.",
    )
