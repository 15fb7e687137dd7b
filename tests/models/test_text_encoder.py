"""Text towers: made from nothing, from a directory, and those that cannot serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emrrg_cli.errors import RunError
from emrrg_cli.models.text_encoder import (
    build_scratch_text_encoder,
    load_text_encoder,
    load_text_tokenizer,
    train_text_tokenizer,
)
from emrrg_cli.recipe.alignment import ScratchTextSettings


@pytest.fixture(scope="module")
def tower(texts: list[str]) -> tuple[Any, Any]:
    """A tokenizer and a BERT of width 24 for texts of up to 20 tokens. Not to be changed."""
    tokenizer = train_text_tokenizer(texts, 320)
    settings = ScratchTextSettings(hidden_size=24, layers=2, heads=2, vocab_size=320)
    return tokenizer, build_scratch_text_encoder(settings, tokenizer, 20).eval()


def test_a_saved_tower_is_the_same_again(tower: tuple[Any, Any], texts: list[str], tmp_path: Path) -> None:
    tokenizer, model = tower
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = load_text_tokenizer(str(tmp_path))
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    loaded = load_text_encoder(str(tmp_path), None, 20)
    ids = torch.tensor([tokenizer.encode(texts[0])[:20]])
    same = [m.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state for m in (model, loaded)]
    assert torch.equal(*same)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in loaded.named_parameters()} - trained == {"pooler.dense.weight", "pooler.dense.bias"}
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_weights_in_half_precision_are_trained_in_fp32(tower: tuple[Any, Any], tmp_path: Path) -> None:
    import copy

    copy.deepcopy(tower[1]).half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_text_encoder(str(tmp_path), None, 20).parameters()} == {torch.float32}


def test_unseen_text_has_tokens(tower: tuple[Any, Any]) -> None:
    tokenizer, _ = tower
    assert tokenizer.decode(tokenizer.encode("Größe: 3 ✓"), skip_special_tokens=True) == "Größe: 3 ✓"


def test_missing_weights_matter_only_if_they_are_used(tower: tuple[Any, Any], tmp_path: Path) -> None:
    tower[1].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]  # as after masked language modelling
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    load_text_encoder(str(tmp_path), None, 20)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"BertModel is incomplete: encoder\.layer\.1\.output\.dense\.weight is missing"):
        load_text_encoder(str(tmp_path), None, 20)


def test_a_text_longer_than_the_positions_is_refused_at_once(tower: tuple[Any, Any], tmp_path: Path) -> None:
    tower[1].save_pretrained(tmp_path)
    with pytest.raises(RunError, match="BertModel gives no hidden states for a text of 21 tokens") as caught:
        load_text_encoder(str(tmp_path), None, 21)
    assert "data.max_text_tokens" in (caught.value.hint or "")


def test_a_decoder_is_accepted_and_an_encoder_decoder_is_not(make_llm: Any, tmp_path: Path) -> None:
    make_llm("qwen3").save_pretrained(tmp_path / "qwen")
    model = load_text_encoder(str(tmp_path / "qwen"), None, 64)
    assert all(p.requires_grad for p in model.parameters())
    import transformers

    config = transformers.T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(RunError, match="T5Model gives no hidden states"):
        load_text_encoder(str(tmp_path / "t5"), None, 64)


@pytest.mark.parametrize("load", [load_text_tokenizer, lambda name: load_text_encoder(name, None, 20)])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("emilyalsentzer/Bio_ClinicalBERT-not-here", "and could not be loaded from the hub"),
        ("./nowhere", "./nowhere: no such directory"),
        ("", "could be loaded from this directory"),
    ],
)
def test_an_unavailable_tower_is_one_message(load: Any, source: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        load(source or str(tmp_path))
    assert told in caught.value.message
    assert caught.value.hint is None or "model.text.name" in caught.value.hint
