"""Hybrid decoder layers: the plain LLM at first, the image afterwards, and the same thing with caches and beams."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emrrg_cli.errors import UsageError
from emrrg_cli.models.hybrid_decoder import CrossAttention, add_hybrid_layers, decoder_layers, hybrid_parameters
from emrrg_cli.models.hybrid_probe import check_hybrid_layers

KINDS = ["llama", "qwen2", "qwen3", "mistral"]
IDS = torch.tensor([[1, 40, 7, 203, 88, 12], [1, 9, 9, 310, 45, 77]])

MakeLLM = Callable[..., Any]


def _crosses(llm: Any) -> list[CrossAttention]:
    return [module for module in llm.modules() if isinstance(module, CrossAttention)]


def _awake(llm: Any) -> Any:
    """Gates opened, as after training; strong enough that the image decides what is written."""
    torch.manual_seed(5)
    with torch.no_grad():
        for cross in _crosses(llm):
            cross.warmup.fill_(2.0)
            cross.gate.bias.fill_(0.5)
            cross.kv_proj.weight.normal_(std=0.5)
    return llm


def _visual(studies: int = 2, tokens: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(studies, tokens, 32, generator=torch.Generator().manual_seed(seed))


def _hybrid(make_llm: MakeLLM, kind: str = "llama", every: int = 2, **options: Any) -> Any:
    llm = make_llm(kind, **options)
    add_hybrid_layers(llm, every)
    return llm


# -- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_hybrid_llm_equals_the_plain_one(kind: str, make_llm: MakeLLM) -> None:
    plain, hybrid = make_llm(kind), _hybrid(make_llm, kind, every=1)
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        assert torch.equal(hybrid(input_ids=IDS, visual_tokens=_visual()).logits, expected)
        assert torch.equal(hybrid(input_ids=IDS).logits, expected)
        # Awake it is another model with an image, and still the plain one without.
        _awake(hybrid)
        assert not torch.allclose(hybrid(input_ids=IDS, visual_tokens=_visual()).logits, expected, atol=1e-2)
        assert torch.equal(hybrid(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_after_one_step_the_logits_depend_on_the_image(kind: str, make_llm: MakeLLM) -> None:
    llm = _hybrid(make_llm, kind).requires_grad_(False)
    parameters = [parameter.requires_grad_() for _, parameter in hybrid_parameters(llm)]
    optimizer = torch.optim.SGD(parameters, lr=0.5)

    def difference() -> float:
        with torch.no_grad():
            one, other = (llm(input_ids=IDS, visual_tokens=_visual(seed=seed)).logits for seed in (3, 4))
        return float((one - other).abs().max())

    assert difference() == 0
    logits = llm(input_ids=IDS, visual_tokens=_visual()).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert all(bool(cross.warmup.grad) for cross in _crosses(llm))
    optimizer.step()
    assert difference() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_image_projection_gate_and_warmup(kind: str, make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm, kind))
    visual = _visual().requires_grad_()
    logits = llm(input_ids=IDS, visual_tokens=visual).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in hybrid_parameters(llm)} | {"visual": visual.grad}
    assert len(gradients) == 2 * 4 + 1
    assert all(grad is not None and bool(grad.any()) for grad in gradients.values())
    assert visual.grad is not None
    assert bool(visual.grad.abs().sum(-1).all())  # each token of each study


def _literal_cross_attention(attention: Any, hidden: Tensor, visual: Tensor, heads: int, kv_heads: int) -> Tensor:
    """What is added to the output of a self-attention, head by head. `hidden`, `visual` after the layer's norm."""
    cross, head_dim = attention.cross, attention.head_dim
    query = hidden @ attention.q_proj.weight.T
    if attention.q_proj.bias is not None:
        query = query + attention.q_proj.bias
    kv = visual @ cross.kv_proj.weight.T
    contexts = []
    for head in range(heads):
        q = query[..., head * head_dim : (head + 1) * head_dim]
        if hasattr(attention, "q_norm"):
            q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.q_norm.weight
        of = head // (heads // kv_heads)
        k = kv[..., of * head_dim : (of + 1) * head_dim]
        v = kv[..., (kv_heads + of) * head_dim : (kv_heads + of + 1) * head_dim]
        contexts.append(((q @ k.transpose(1, 2)) / math.sqrt(head_dim)).softmax(-1) @ v)
    gate = cross.warmup * torch.tanh(hidden @ cross.gate.weight.T + cross.gate.bias)
    return (gate * torch.cat(contexts, dim=-1)) @ attention.o_proj.weight.T


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),  # a bias on o_proj, which must be added once
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 6}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
    ids=str,
)
def test_attention_equals_a_literal_computation(kind: str, options: dict[str, Any], make_llm: MakeLLM) -> None:
    plain, llm = make_llm(kind, **options), _awake(_hybrid(make_llm, kind, every=1, **options))
    layers, plain_layers = decoder_layers(llm), decoder_layers(plain)
    visual = _visual(tokens=7)
    calls: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    for layer in layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out: calls.append((kwargs["hidden_states"], kwargs, out[0])), with_kwargs=True
        )
    with torch.no_grad():
        llm(input_ids=IDS, visual_tokens=visual, use_cache=False)
        assert len(calls) == len(layers) == 3
        for layer, plain_layer, (hidden, kwargs, out) in zip(layers, plain_layers, calls, strict=True):
            rest = {key: value for key, value in kwargs.items() if not key.startswith("visual_")}
            attended = plain_layer.self_attn(**rest)[0]
            normed = layer.input_layernorm(visual)
            heads, kv_heads = llm.config.num_attention_heads, llm.config.num_key_value_heads
            added = _literal_cross_attention(layer.self_attn, hidden, normed, heads, kv_heads)
            assert float(added.abs().max()) > 0.1
            torch.testing.assert_close(out, attended + added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_choices_of_the_released_code(kind: str, make_llm: MakeLLM) -> None:
    """Gate from the output of self-attention, queries after the rotary embedding: against a literal computation."""
    llm = make_llm(kind)
    add_hybrid_layers(llm, 1, gate="attention", query="after_rotary")
    _awake(llm)
    attention = decoder_layers(llm)[1].self_attn
    cross, heads, width = attention.cross, 4, attention.head_dim
    assert cross.gate.weight.shape == (1, heads * width)
    seen: dict[str, Any] = {}
    attention.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, out=out[0]), with_kwargs=True)
    inputs: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    visual = _visual()
    with torch.no_grad():
        llm(input_ids=IDS, visual_tokens=visual, use_cache=False)
        hidden, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
        query = attention.q_proj(hidden).view(2, 6, heads, width)
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        half = width // 2
        turned = torch.cat([-query[..., half:], query[..., :half]], dim=-1)
        query = query * cos[:, :, None] + turned * sin[:, :, None]
        key, value = cross.keys_and_values(decoder_layers(llm)[1].input_layernorm(visual))
        contexts = []
        for head in range(heads):
            weights = (query[:, :, head] @ key[:, head // 2].transpose(1, 2) / math.sqrt(width)).softmax(-1)
            contexts.append(weights @ value[:, head // 2])
        gate = cross.warmup * torch.tanh(inputs[0] @ cross.gate.weight.T + cross.gate.bias)
        added = (gate * torch.cat(contexts, dim=-1)) @ attention.o_proj.weight.T
        expected = attention.o_proj(inputs[0]) + added
    assert float(added.abs().max()) > 0.1
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choices", [{"gate": "attention"}, {"query": "after_rotary"}], ids=str)
def test_the_choices_decode_with_a_cache(choices: dict[str, str], make_llm: MakeLLM) -> None:
    llm = make_llm()
    add_hybrid_layers(llm, 2, **choices)
    _awake(llm)
    prompt, visual = _prompt(llm, 2), _visual()
    tokens = llm.generate(
        inputs_embeds=prompt, visual_tokens=visual, max_new_tokens=6, min_new_tokens=6, pad_token_id=0
    )
    for step in range(6):
        written = llm.get_input_embeddings()(tokens[:, :step])
        logits = llm(inputs_embeds=torch.cat([prompt, written], 1), visual_tokens=visual, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf
        assert torch.equal(logits.argmax(-1), tokens[:, step])


def test_query_norm_over_all_heads() -> None:
    """OLMoE norms the queries of all heads together."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=2,
        initializer_range=0.2,
    )
    llm = OlmoeForCausalLM(config).eval()
    add_hybrid_layers(llm, 1)
    _awake(llm)
    with torch.no_grad():
        one, other = (llm(input_ids=IDS, visual_tokens=_visual(seed=seed)).logits for seed in (3, 4))
    assert not torch.allclose(one, other)


def test_the_norm_of_the_layer_is_shared(make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm, every=1))
    layer = decoder_layers(llm)[0]
    with torch.no_grad():
        before = llm(input_ids=IDS, visual_tokens=_visual()).logits
        scaled = llm(input_ids=IDS, visual_tokens=7 * _visual()).logits
    torch.testing.assert_close(before, scaled, rtol=1e-3, atol=1e-3)  # an RMSNorm sees no scale
    assert layer.self_attn.__dict__["visual_norm"] is layer.input_layernorm
    moved = llm.to(torch.float64)
    assert layer.self_attn.__dict__["visual_norm"].weight.dtype == torch.float64
    with torch.no_grad():
        moved(input_ids=IDS, visual_tokens=_visual().double())


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (5, [0]), (8, [0])])
def test_every_kth_layer_from_the_first(every: int, expected: list[int], make_llm: MakeLLM) -> None:
    llm = make_llm(layers=5)
    assert add_hybrid_layers(llm, every) == expected
    assert [hasattr(layer.self_attn, "cross") for layer in decoder_layers(llm)] == [i in expected for i in range(5)]
    names = {name.split(".cross.")[0] for name, _ in hybrid_parameters(llm)}
    assert names == {f"model.layers.{i}.self_attn" for i in expected}


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_plain_llm_are_unchanged(kind: str, make_llm: MakeLLM) -> None:
    plain, hybrid = make_llm(kind), _hybrid(make_llm, kind)
    added = {name for name, _ in hybrid_parameters(hybrid)}
    assert set(hybrid.state_dict()) - added == set(plain.state_dict())
    assert {name.split(".cross.")[1] for name in added} == {"kv_proj.weight", "gate.weight", "gate.bias", "warmup"}
    result = hybrid.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == added
    assert type(hybrid).__name__ == type(plain).__name__  # what save_pretrained writes as the architecture
    assert isinstance(hybrid, type(plain))


def test_a_copy_is_an_independent_hybrid_llm(make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm))
    other = copy.deepcopy(llm)
    with torch.no_grad():
        expected = llm(input_ids=IDS, visual_tokens=_visual()).logits
        for layer in decoder_layers(llm):
            layer.input_layernorm.weight.zero_()
        assert torch.equal(other(input_ids=IDS, visual_tokens=_visual()).logits, expected)


# -- masks, precision, checkpointing --------------------------------------------------------------------------------


def test_masked_visual_tokens_are_not_seen(make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm))
    visual = _visual(tokens=6)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    changed = visual.clone()
    changed[1, 4:] = 50.0
    with torch.no_grad():
        unmasked = llm(input_ids=IDS, visual_tokens=visual).logits
        masked = llm(input_ids=IDS, visual_tokens=visual, visual_mask=mask).logits
        assert torch.equal(llm(input_ids=IDS, visual_tokens=changed, visual_mask=mask).logits, masked)
        torch.testing.assert_close(masked[0], unmasked[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(masked[1], unmasked[1], atol=1e-2)
        alone = llm(input_ids=IDS[1:], visual_tokens=visual[1:, :4]).logits
        torch.testing.assert_close(masked[1:], alone, rtol=1e-4, atol=1e-4)
        whole = llm(input_ids=IDS, visual_tokens=visual, visual_mask=torch.ones(2, 6, dtype=torch.long)).logits
        torch.testing.assert_close(whole, unmasked, rtol=1e-4, atol=1e-4)


def test_a_half_precision_llm_takes_fp32_visual_tokens(make_llm: MakeLLM) -> None:
    exact = _awake(_hybrid(make_llm))
    llm = make_llm().to(torch.bfloat16)
    add_hybrid_layers(llm, 2)
    _awake(llm)
    assert all(parameter.dtype == torch.float32 for _, parameter in hybrid_parameters(llm))
    visual = _visual().requires_grad_()
    logits = llm(input_ids=IDS, visual_tokens=visual).logits
    with torch.no_grad():
        expected = exact(input_ids=IDS, visual_tokens=_visual()).logits
    assert logits.dtype == torch.bfloat16
    assert float((logits.detach().float() - expected).norm() / expected.norm()) < 0.1
    logits.float().sum().backward()
    assert visual.grad is not None
    assert bool(visual.grad.any())
    with torch.no_grad():  # and an fp32 LLM takes half-precision visual tokens
        logits = exact(input_ids=IDS, visual_tokens=_visual().bfloat16()).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind: str, make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm, kind, every=1)).train()

    def gradients() -> tuple[list[Tensor], int]:
        calls: list[int] = []
        handle = decoder_layers(llm)[1].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        visual = _visual().requires_grad_()
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        logits = llm(input_ids=IDS, visual_tokens=visual, visual_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), IDS.flatten())
        result = torch.autograd.grad(loss, [visual, *(parameter for _, parameter in hybrid_parameters(llm))])
        handle.remove()
        return list(result), len(calls)

    plain, once = gradients()
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed, twice = gradients()
    assert (once, twice) == (1, 2)
    assert all(bool(one.any()) and torch.equal(one, other) for one, other in zip(plain, checkpointed, strict=True))


# -- generation -----------------------------------------------------------------------------------------------------


def _prompt(llm: Any, studies: int, length: int = 4) -> Tensor:
    """The same text for every study, so that reports differ by their images alone."""
    torch.manual_seed(2)
    embeddings: Tensor = llm.get_input_embeddings()(torch.randint(3, 320, (1, length))).detach()
    return embeddings.expand(studies, -1, -1)


def _generate(llm: Any, visual: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    from transformers import GenerationConfig

    prompt = _prompt(llm, len(visual))
    config = GenerationConfig(**({"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 2} | options))
    torch.manual_seed(0)
    with torch.no_grad():
        out: Tensor = llm.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long),
            generation_config=config,
            visual_tokens=visual,
            visual_mask=mask,
        )
    return out


def _generate_from_ids(llm: Any, visual: Tensor, **options: Any) -> tuple[Tensor, int]:
    """Also how often visual keys and values were formed."""
    from transformers import GenerationConfig

    calls: list[int] = []
    handles = [cross.kv_proj.register_forward_hook(lambda *args: calls.append(1)) for cross in _crosses(llm)]
    ids = torch.tensor([[1, 40, 7, 203]]).expand(len(visual), -1)
    config = GenerationConfig(**({"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 2} | options))
    with torch.no_grad():
        out: Tensor = llm.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, visual_tokens=visual
        )
    for handle in handles:
        handle.remove()
    return out, len(calls)


def _rows(tokens: Tensor) -> list[list[int]]:
    """Without the padding behind the end."""
    rows = []
    for row in tokens.tolist():
        while row and row[-1] == 0:
            row.pop()
        rows.append(row)
    return rows


DECODINGS = [
    pytest.param({"num_beams": 1}, id="greedy"),
    pytest.param({"num_beams": 3, "length_penalty": 2.0}, id="beams"),
    pytest.param({"num_beams": 4, "min_new_tokens": 6, "repetition_penalty": 2.0}, id="beams-penalised"),
]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_uncached(kind: str, decoding: dict[str, Any], make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm, kind))
    visual = _visual(studies=3)
    # By token ids: given embeddings, transformers turns the cache on whatever it is told.
    cached, calls = _generate_from_ids(llm, visual, use_cache=True, **decoding)
    uncached, more_calls = _generate_from_ids(llm, visual, use_cache=False, **decoding)
    assert torch.equal(cached, uncached)
    assert more_calls > calls == 2  # visual keys and values: once a hybrid layer, or at every step
    assert len({tuple(row) for row in cached.tolist()}) == 3  # the image decides what is written


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_decoding_equals_a_plain_loop(kind: str, make_llm: MakeLLM) -> None:
    """From embeddings, as reports are written: no cache, no `generate`, the whole sequence at every step."""
    llm = _awake(_hybrid(make_llm, kind))
    visual, mask = _visual(studies=2, tokens=6), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    generated = _generate(llm, visual, mask, min_new_tokens=12)
    sequence = _prompt(llm, 2)
    written: list[Tensor] = []
    with torch.no_grad():
        for _ in range(12):
            logits = llm(inputs_embeds=sequence, visual_tokens=visual, visual_mask=mask, use_cache=False).logits[:, -1]
            logits[:, 2] = -math.inf
            written.append(logits.argmax(-1))
            sequence = torch.cat([sequence, llm.get_input_embeddings()(written[-1])[:, None]], dim=1)
    assert torch.equal(generated, torch.stack(written, dim=1))


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_studies_equals_each_alone(kind: str, decoding: dict[str, Any], make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm, kind))
    visual = _visual(studies=3)
    batch = _rows(_generate(llm, visual, **decoding))
    alone = [_rows(_generate(llm, study[None], **decoding))[0] for study in visual]
    assert batch == alone
    order = [2, 0, 1]
    assert _rows(_generate(llm, visual[order], **decoding)) == [alone[i] for i in order]


@pytest.mark.parametrize("kind", KINDS)
def test_each_beam_is_scored_with_its_own_image(kind: str, make_llm: MakeLLM) -> None:
    """Every beam's score is the log-probability that the LLM, run on that beam alone, gives it."""
    from transformers import GenerationConfig

    llm = _awake(_hybrid(make_llm, kind))
    visual, beams, new = _visual(studies=2), 3, 6
    prompt = _prompt(llm, 2)
    config = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=1.0,
        pad_token_id=0,
        eos_token_id=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    mask = torch.ones(prompt.shape[:2], dtype=torch.long)
    with torch.no_grad():
        found = llm.generate(inputs_embeds=prompt, attention_mask=mask, generation_config=config, visual_tokens=visual)
        assert found.sequences.shape == (2 * beams, new)
        for row, (tokens, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
            study = row // beams
            embeddings = torch.cat([prompt[study], llm.get_input_embeddings()(tokens)])[None]
            logits = llm(inputs_embeds=embeddings, visual_tokens=visual[study][None]).logits[0, 3:-1]
            own = logits.log_softmax(-1).gather(1, tokens[:, None]).sum() / new
            torch.testing.assert_close(score, own, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.sequences[:beams], found.sequences[beams:])


@pytest.mark.parametrize("decoding", DECODINGS)
def test_masks_travel_with_their_studies(decoding: dict[str, Any], make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm))
    visual = _visual(studies=3, tokens=6)
    lengths = [6, 3, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    batch = _rows(_generate(llm, visual, mask, **decoding))
    alone = [_rows(_generate(llm, visual[i : i + 1, :n], **decoding))[0] for i, n in enumerate(lengths)]
    assert batch == alone


def test_a_generation_does_not_affect_the_next(make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm))
    first = _generate(llm, _visual(seed=3))
    second = _generate(llm, _visual(seed=4))
    assert not torch.equal(first, second)
    assert torch.equal(_generate(llm, _visual(seed=3)), first)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling(kind: str, make_llm: MakeLLM) -> None:
    llm = _awake(_hybrid(make_llm, kind))
    options = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    one = _generate(llm, _visual(), **options)
    assert torch.equal(_generate(llm, _visual(), **options), one)  # seeded
    assert not torch.equal(_generate(llm, _visual(), num_beams=1), one)
    assert not torch.equal(_generate(llm, _visual(seed=9), **options), one)


def test_a_mistyped_argument_is_still_refused(make_llm: MakeLLM) -> None:
    llm = _hybrid(make_llm)
    with pytest.raises(ValueError, match="visual_token"):
        llm.generate(input_ids=IDS, visual_token=_visual(), max_new_tokens=2)


# -- what does not fit ----------------------------------------------------------------------------------------------


def test_gpt2_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UsageError, match="GPT2LMHeadModel is not a decoder-only LLM with layers that have self_attn"):
        add_hybrid_layers(GPT2LMHeadModel(config), 2)


@pytest.mark.parametrize(
    ("name", "missing"), [("Phi3", "no q_proj"), ("Phi", "no o_proj"), ("Olmo2", "no input_layernorm")]
)
def test_layers_without_needed_modules_are_refused_by_name(name: str, missing: str) -> None:
    import transformers

    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**settings, **sizes)
    with pytest.raises(UsageError, match=missing) as raised:
        add_hybrid_layers(getattr(transformers, f"{name}ForCausalLM")(config), 1)
    assert "model.hybrid.every=null" in str(raised.value)


def test_a_layer_without_self_attention_is_refused(make_llm: MakeLLM) -> None:
    """Where attention and other mixers alternate."""
    llm = make_llm()
    del decoder_layers(llm)[2].self_attn
    with pytest.raises(UsageError, match="do not fit LlamaForCausalLM"):
        add_hybrid_layers(llm, 2)


@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
def test_families_that_drop_the_image_are_refused(name: str) -> None:
    import transformers

    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**settings, **sizes)
    with pytest.raises(UsageError, match="output does not depend on the image"):
        add_hybrid_layers(getattr(transformers, f"{name}ForCausalLM")(config), 1)


def test_a_family_whose_forward_pass_fails_is_refused() -> None:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = NanoChatConfig(vocab_size=50, hidden_size=32, intermediate_size=32, bos_token_id=1, **settings)
    with pytest.raises(UsageError, match="hybrid layers do not work in NanoChatForCausalLM: a forward pass"):
        add_hybrid_layers(NanoChatForCausalLM(config), 1)


def test_a_layer_that_cannot_be_trained_is_refused(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CrossAttention, "keys_and_values", _detached(CrossAttention.keys_and_values))
    with pytest.raises(UsageError, match=r"layer 0\.kv_proj\.weight gets no gradient"):
        add_hybrid_layers(make_llm(), 2)


def _detached(keys_and_values: Callable[..., Any]) -> Callable[..., Any]:
    def detached(self: CrossAttention, visual: Tensor) -> Any:
        key, value = keys_and_values(self, visual)
        return (key.detach() + 0 * visual.sum(), value.detach())

    return detached


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_does_not_change_the_llm(kind: str, make_llm: MakeLLM) -> None:
    plain = make_llm(kind).train()
    before = torch.get_rng_state()
    llm = _hybrid(make_llm, kind)
    llm.train()
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    check_hybrid_layers(llm, decoder_layers(llm), [0, 2])
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(before)
    assert all(module.training for module in llm.modules())
    assert len(decoder_layers(llm)) == llm.config.num_hidden_layers == 3
    assert all(cross.warmup.item() == 0 for cross in _crosses(llm))
    assert all(parameter.grad is None for parameter in llm.parameters())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, llm.state_dict()[name])


def test_the_probe_works_without_weights() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2))
        assert add_hybrid_layers(llm, 2) == [0]
