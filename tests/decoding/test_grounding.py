"""Maps of sentences: against a literal computation, with planted attention, and by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emrrg_cli.decoding.grounding import ground_reports
from emrrg_cli.models.hybrid_decoder import add_hybrid_layers, decoder_layers, hybrid_parameters
from emrrg_cli.models.report_generator import ReportGenerator

VIEWS = torch.tensor([2, 1, 3])
REPORTS = [[5, 6, 7, 8, 2], [9, 4, 2], [7, 7, 8, 11, 12, 13]]
SENTENCES = [[0, 0, 1, 1, -1], [0, 0, -1], [0, 1, 1, 1, 2, 2]]
PATCHES = 16  # of images of 64 pixels

MakeModel = Callable[..., ReportGenerator]


@pytest.fixture
def make_model(make_encoder: Any, make_llm: Any, tokenizer: Any) -> MakeModel:
    def make(views: str = "average", kind: str = "llama", *, hybrid: bool = True, **options: Any) -> ReportGenerator:
        llm = make_llm(kind, **({"sliding_window": None} if kind == "mistral" else {}))
        if hybrid:
            add_hybrid_layers(llm, 2, **options)
        model = ReportGenerator(make_encoder(), llm, tokenizer, "pooled", views)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in hybrid_parameters(llm):
                if name.endswith("warmup"):
                    parameter.fill_(2.0)
                elif "gate" in name or "kv_proj" in name:
                    parameter.normal_(std=0.5)
        return model.eval()

    return make


def crosses(model: ReportGenerator) -> list[Any]:
    return [layer.self_attn.cross for layer in decoder_layers(model.llm) if hasattr(layer.self_attn, "cross")]


def pixels() -> Tensor:
    return torch.randint(0, 256, (6, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def literal(
    model: ReportGenerator, image: Tensor, report: list[int], sentences: list[int], context: Any = None
) -> list[Tensor]:
    """The maps `[views, l]` of one study: a forward pass a token, a loop over layers and heads."""
    embeddings, _, visual = model.prompt(image, torch.tensor([len(image)]), [context] if context else [])
    seen: list[tuple[Any, Any]] = []
    hooks = [
        cross.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs)))
        for cross in crosses(model)
    ]
    maps = [torch.zeros(0)] * (max(sentences) + 1)
    for place, number in enumerate(sentences):
        if number < 0:
            continue
        written = model.llm.get_input_embeddings()(torch.tensor([report[:place]], dtype=torch.long))
        seen.clear()
        model.llm(inputs_embeds=torch.cat([embeddings, written], 1), use_cache=False, **visual)
        for cross, (hidden, query, key, _, _) in seen:
            gate = abs((cross.warmup * torch.tanh(cross.gate(hidden[0, -1]))).item())
            for head in range(cross.heads):
                own = query[0, -1, head * cross.head_dim : (head + 1) * cross.head_dim]
                keys = key[0, head * cross.kv_heads // cross.heads]
                weights = (keys @ own / cross.head_dim**0.5).softmax(0) * gate / cross.heads
                maps[number] = weights + (maps[number] if len(maps[number]) else 0)
    for hook in hooks:
        hook.remove()
    found = []
    for weights in maps:
        per_view = weights.view(-1, PATCHES + 1)
        patches = torch.cat([per_view[:, : PATCHES // 2], per_view[:, PATCHES // 2 + 1 :]], 1)
        patches = patches.expand(len(image), -1)
        found.append(patches / patches.sum())
    return found


@pytest.mark.parametrize("views", ["average", "concat"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_maps_equal_a_loop_over_tokens_layers_and_heads(views: str, kind: str, make_model: MakeModel) -> None:
    model = make_model(views, kind)
    found = ground_reports(model, pixels(), VIEWS, REPORTS, SENTENCES)
    for image, report, sentences, maps in zip(
        torch.split(pixels(), VIEWS.tolist()), REPORTS, SENTENCES, found, strict=True
    ):
        expected = torch.stack(literal(model, image, report, sentences))
        assert maps.shape == (max(sentences) + 1, len(image), 4, 4)
        assert torch.allclose(maps.flatten(2), expected, atol=2e-6)
        assert torch.allclose(maps.sum((1, 2, 3)), torch.ones(len(maps)))
        assert expected.std() > 0.005


@pytest.mark.parametrize(("gate", "query"), [("attention", "before_rotary"), ("states", "after_rotary")])
def test_maps_of_other_kinds_of_hybrid_layers(gate: str, query: str, make_model: MakeModel) -> None:
    model = make_model(gate=gate, query=query)
    (maps,) = ground_reports(model, pixels()[:1], torch.tensor([1]), REPORTS[:1], SENTENCES[:1])
    expected = literal(model, pixels()[:1], REPORTS[0], SENTENCES[0])
    assert torch.allclose(maps.flatten(2), torch.stack(expected), atol=2e-6)


def test_the_context_in_the_prompt_counts(make_model: MakeModel) -> None:
    model = make_model("concat")
    contexts: list[Any] = [{"indication": "pain and fever"}, {}, {"indication": "no pain"}]
    found = ground_reports(model, pixels(), VIEWS, REPORTS, SENTENCES, contexts)
    without = ground_reports(model, pixels(), VIEWS, REPORTS, SENTENCES)
    for study, image in enumerate(torch.split(pixels(), VIEWS.tolist())):
        expected = literal(model, image, REPORTS[study], SENTENCES[study], contexts[study])
        assert torch.allclose(found[study].flatten(2), torch.stack(expected), atol=2e-6)
        assert torch.allclose(found[study], without[study], atol=2e-6) == (study == 1)


def plant(model: ReportGenerator, places: list[int], gates: list[float], strength: float = 40.0) -> None:
    """Each hybrid layer looks at one visual token of its own, whatever the text; its gate is a constant."""
    visual = torch.zeros(1, PATCHES + 1, 32)
    visual[0, :, :17] = torch.eye(17)
    model.join_views = lambda tokens, views: (visual[:, :4], visual, None, None)  # type: ignore[method-assign]
    layers = [layer for layer in decoder_layers(model.llm) if hasattr(layer.self_attn, "cross")]
    with torch.no_grad():
        for layer, place, gate in zip(layers, places, gates, strict=True):
            attention: Any = layer.self_attn
            layer.input_layernorm.weight.fill_(1)
            attention.q_proj.weight.zero_()
            attention.q_proj.bias.fill_(1)
            attention.cross.kv_proj.weight.zero_()
            attention.cross.kv_proj.weight[: attention.cross.kv_heads * attention.cross.head_dim, place] = strength
            attention.cross.gate.weight.zero_()
            attention.cross.gate.bias.fill_(torch.atanh(torch.tensor(gate)))
            attention.cross.warmup.fill_(1)


def planted_map(model: ReportGenerator) -> Tensor:
    (maps,) = ground_reports(model, pixels()[:1], torch.tensor([1]), REPORTS[:1], SENTENCES[:1])
    assert torch.allclose(maps[0], maps[1])
    return maps[0, 0]


def test_planted_attention_gives_the_planted_map(make_model: MakeModel) -> None:
    model = make_model(kind="qwen2")
    plant(model, [3, 8 + 1 + 5], [0.3, -0.6])  # the class token is at 8: patch 13
    found = planted_map(model)
    expected = torch.zeros(PATCHES)
    expected[3], expected[13] = 0.3 / 0.9, 0.6 / 0.9
    assert torch.allclose(found, expected.view(4, 4), atol=1e-6)


def test_a_closed_gate_gives_its_layer_no_weight(make_model: MakeModel) -> None:
    model = make_model(kind="qwen2")
    plant(model, [3, 6], [0.0, 0.01])
    assert planted_map(model).flatten().argmax() == 6
    assert planted_map(model)[1, 2] == pytest.approx(1)
    plant(model, [3, 6], [0.0, 0.0])
    assert planted_map(model).eq(0).all()


def test_attention_to_the_class_token_is_left_out(make_model: MakeModel) -> None:
    model = make_model(kind="qwen2")
    plant(model, [8, 5], [0.9, 0.1], strength=20.0)
    found = planted_map(model)
    assert found.sum() == pytest.approx(1)
    assert found.flatten().argmax() == 5


@pytest.mark.parametrize("views", ["average", "concat"])
def test_without_hybrid_layers_a_map_is_a_derivative(
    views: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How the log-probability changes when a patch's token is scaled, by finite differences."""
    model = make_model(views, hybrid=False).double()
    with torch.no_grad():
        tokens = model.encode(pixels()[:3].double())
    monkeypatch.setattr(model, "encode", lambda _, projections: tokens)
    counts, reports, sentences = torch.tensor([1, 2]), REPORTS[:2], SENTENCES[:2]
    found = ground_reports(model, pixels()[:3], counts, reports, sentences)

    @torch.no_grad()
    def given(changed: Tensor, study: int, number: int) -> float:
        embeddings, mask, _ = model.prompt_of(changed, counts)
        before = embeddings[study][mask[study].bool()][None]
        written = model.llm.get_input_embeddings()(torch.tensor([reports[study]]))
        out = model.llm(inputs_embeds=torch.cat([before, written], 1), use_cache=False).logits[0]
        logs = out[before.shape[1] - 1 : -1].log_softmax(-1)
        places = [place for place, own in enumerate(sentences[study]) if own == number]
        return sum(logs[place, reports[study][place]].item() for place in places)

    for study, number, views_of in ((0, 1, [0]), (1, 0, [1, 2])):
        expected = torch.zeros(len(views_of), PATCHES, dtype=torch.float64)
        for row, view in enumerate(views_of):
            for patch in range(PATCHES):
                place, ends = patch + (patch >= PATCHES // 2), []
                for step in (0.02, -0.02):
                    changed = tokens.clone()
                    changed[view, place] *= 1 + step
                    ends.append(given(changed, study, number))
                expected[row, patch] = abs(ends[0] - ends[1])
        expected /= expected.sum()
        assert torch.allclose(found[study][number].flatten(1), expected.float(), atol=1e-3)
        assert expected.std() > 0.01


def test_a_study_alone_has_the_same_maps(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emrrg_cli.decoding.grounding._STUDIES", 2)
    for hybrid in (True, False):
        model = make_model("concat", hybrid=hybrid)
        together = ground_reports(model, pixels(), VIEWS, REPORTS, SENTENCES)
        for study, image in enumerate(torch.split(pixels(), VIEWS.tolist())):
            one = slice(study, study + 1)
            (alone,) = ground_reports(model, image, VIEWS[one], REPORTS[one], SENTENCES[one])
            assert torch.allclose(alone, together[study], atol=2e-6)


def test_a_report_without_sentences_has_no_maps(make_model: MakeModel) -> None:
    for hybrid in (True, False):
        model = make_model(hybrid=hybrid)
        empty, full = ground_reports(model, pixels()[:2], torch.tensor([1, 1]), [[2], [5, 2]], [[-1], [0, -1]])
        assert (empty.shape, full.shape) == ((0, 1, 4, 4), (1, 1, 4, 4))
        (empty,) = ground_reports(model, pixels()[:1], torch.tensor([1]), [[2]], [[-1]])
        assert empty.shape == (0, 1, 4, 4)


def test_maps_in_bf16_are_those_in_fp32(make_model: MakeModel) -> None:
    for hybrid in (True, False):
        model = make_model(hybrid=hybrid)
        expected = ground_reports(model, pixels(), VIEWS, REPORTS, SENTENCES)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found = ground_reports(model, pixels(), VIEWS, REPORTS, SENTENCES)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert torch.allclose(ours, theirs, atol=0.03)
