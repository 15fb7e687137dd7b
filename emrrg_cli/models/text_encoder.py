"""The text tower of stage 2: any Hugging Face text encoder by hub name or directory, or a small BERT from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from emrrg_cli.errors import RunError
from emrrg_cli.models.foreign_files import check_model_directory
from emrrg_cli.models.llm import train_tokenizer, unavailable
from emrrg_cli.silence_libraries import no_loading_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emrrg_cli.recipe.alignment import ScratchTextSettings

_KEY = "model.text.name"


def load_text_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a hub name or directory.

    Raises:
        RunError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        check_model_directory(source)
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # a broken file raises errors of many types
        raise unavailable(source, "tokenizer", error, _KEY) from error


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a tokenizer as `train_tokenizer` does, with `<s>` before and `</s>` after each text, also if it is cut.

    All reports then have the same last token, which can represent the whole report, as `[SEP]` does in BERT.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = train_tokenizer(texts, vocab_size).backend_tokenizer
    bpe.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build_scratch_text_encoder(
    settings: ScratchTextSettings, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> PreTrainedModel:
    """Builds a small BERT (arXiv 1810.04805) with random weights for `tokenizer` and texts of up to `max_tokens`."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.hidden_size,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        max_position_embeddings=max_tokens,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    _freeze_idle(model, _influence(model, max_tokens))
    return model


def load_text_encoder(source: str, revision: str | None, max_tokens: int) -> PreTrainedModel:
    """Loads a text encoder with its weights in fp32, from the hub, the local cache or a directory.

    Args:
        max_tokens: Largest number of tokens of a text.

    Raises:
        RunError: It cannot be loaded, weights that its hidden states depend on are missing, or it cannot read texts of
            this length.
    """
    from transformers import AutoModel

    try:
        check_model_directory(source)
        with no_loading_bars():
            model, loaded = AutoModel.from_pretrained(
                source,
                revision=revision or "main",
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # a broken file raises errors of many types
        raise unavailable(source, "text encoder", error, _KEY) from error
    try:
        at_work = _influence(model, max_tokens)
    except Exception as error:  # an image model, an encoder-decoder, too few positions: each raises its own error
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"{source}: {type(model).__name__} gives no hidden states for a text of {max_tokens} tokens: {first}",
            hint=f"Set {_KEY} to a text encoder such as BERT, and data.max_text_tokens to at most its largest length.",
        ) from error
    if missing := sorted(set(loaded["missing_keys"]) & at_work):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise RunError(f"{source}: this {type(model).__name__} is incomplete: {missing[0]} is missing{more}")
    _freeze_idle(model, at_work)
    return model


def _influence(model: Any, max_tokens: int) -> set[str]:
    """Returns the names of the parameters that the hidden states of a text of `max_tokens` depend on."""
    tokens = torch.ones(1, max_tokens, dtype=torch.long)
    named = dict(model.named_parameters())
    was_training = model.training
    hidden = model.eval()(input_ids=tokens, attention_mask=tokens).last_hidden_state
    if hidden.shape[-1] != model.config.hidden_size:
        raise ValueError(f"their width is {hidden.shape[-1]}, but its configuration has {model.config.hidden_size}")
    gradients = torch.autograd.grad(hidden.sum(), list(named.values()), allow_unused=True)
    model.train(was_training)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _freeze_idle(model: Any, at_work: set[str]) -> None:
    """Freezes unused parameters such as BERT's pooler: several processes would wait for their gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in at_work
