"""The stage 3 model: prompt, views, loss and generation, each against a literal computation for one study at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor

from emrrg_cli.datasets.report_dataset import IGNORE, Batch, Example, collate
from emrrg_cli.decoding.reference import generation_config
from emrrg_cli.models import adapters
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.build import set_trainable
from emrrg_cli.models.findings_prompt import FindingsPrompt
from emrrg_cli.models.hybrid_decoder import add_hybrid_layers, hybrid_parameters
from emrrg_cli.models.report_generator import (
    Bridge,
    ReportGenerator,
    encode_report,
)
from emrrg_cli.models.views import average_views, concatenate_views, pool_patches
from emrrg_cli.recipe.finetuning import GenerationSettings

MakeModel = Callable[..., ReportGenerator]
VIEWS = [2, 1, 3]
TEXTS = ["the heart is enlarged .", "the lungs are clear .", "no pneumothorax ."]


@pytest.fixture
def make_model(make_encoder: Callable[..., ArmEncoder], make_llm: Callable[..., Any], tokenizer: Any) -> MakeModel:
    """Makes a report generator with open gates whose reports depend on the image."""

    def make(
        visual_prompt: str = "full",
        views: str = "average",
        *,
        hybrid: bool = True,
        kind: str = "llama",
        image_size: int = 64,
        use_tokenizer: Any = None,
    ) -> ReportGenerator:
        encoder, llm = make_encoder(image_size=image_size), make_llm(kind)
        if hybrid:
            add_hybrid_layers(llm, 2)
        torch.manual_seed(1)
        model = ReportGenerator(encoder, llm, use_tokenizer or tokenizer, visual_prompt, views)
        with torch.no_grad():
            for name, parameter in hybrid_parameters(llm):
                if name.endswith("warmup"):
                    parameter.fill_(2.0)
                if name.endswith("gate.bias"):
                    parameter.fill_(0.5)
        return model.eval()

    return make


def _examples(texts: list[str], views: list[int] = VIEWS, size: int = 64) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    pixels = [torch.randint(0, 256, (count, size, size), dtype=torch.uint8, generator=generator) for count in views]
    return [Example(i, f"s{i}", image, texts[i % len(texts)]) for i, image in enumerate(pixels)]


def _batch(model: ReportGenerator, examples: list[Example], max_tokens: int | None = None) -> Batch:
    return collate(examples, partial(model.encode_report, max_tokens=max_tokens))


# -- a study alone, spelled out -------------------------------------------------------------------------------------


def _literal_pool(tokens: Tensor) -> Tensor:
    patches = [token for index, token in enumerate(tokens) if index != (len(tokens) - 1) // 2]
    grid = round(len(patches) ** 0.5)
    pooled = []
    for row in range(0, grid, 2):
        for column in range(0, grid, 2):
            cells = [
                patches[r * grid + c]
                for r in range(row, min(row + 2, grid))
                for c in range(column, min(column + 2, grid))
            ]
            pooled.append(torch.stack(cells).mean(0))
    pooled.insert(len(pooled) // 2, tokens[(len(tokens) - 1) // 2])
    return torch.stack(pooled)


def _literal_visual(model: ReportGenerator, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt tokens and all tokens of one study, `[p, hidden]` and `[m, hidden]`."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    every, prompt = [], []
    for view in pixels:
        image = torch.stack([(view.float() / 255 - mean[c]) / std[c] for c in range(3)])
        tokens = model.encoder(image[None])[0]
        every.append(tokens)
        prompt.append(_literal_pool(tokens) if model.visual_prompt == "pooled" else tokens)
    if model.views == "average":
        every, prompt = [torch.stack(every).mean(0)], [torch.stack(prompt).mean(0)]
    bridge = model.bridge

    def through(tokens: Tensor) -> Tensor:
        hidden = tokens @ bridge.proj.weight.T + bridge.proj.bias
        return F.layer_norm(hidden, hidden.shape[-1:], bridge.norm.weight, bridge.norm.bias, eps=1e-5)

    return through(torch.cat(prompt)), through(torch.cat(every))


def _literal_prompt(model: ReportGenerator, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    tokenizer, embed = model.tokenizer, model.llm.get_input_embeddings()
    prompt, every = _literal_visual(model, pixels)
    before = tokenizer.encode("Human: <Img>", add_special_tokens=False)
    if tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id, *before]
    question = "</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:"
    after = tokenizer.encode(question, add_special_tokens=False)
    embeddings = torch.cat([embed(torch.tensor(before)), prompt, embed(torch.tensor(after))])
    return embeddings, {"visual_tokens": every[None]} if model.hybrid else {}


def _literal_loss(model: ReportGenerator, example: Example, max_tokens: int | None = None) -> Tensor:
    embeddings, visual = _literal_prompt(model, example.pixels)
    tokens = model.tokenizer.encode(example.report, add_special_tokens=False)
    cut = max_tokens is not None and len(tokens) > max_tokens
    tokens = tokens[:max_tokens] if cut else [*tokens, model.tokenizer.eos_token_id]
    sequence = torch.cat([embeddings, model.llm.get_input_embeddings()(torch.tensor(tokens))])
    logits = model.llm(inputs_embeds=sequence[None], **visual).logits[0]
    labels = torch.tensor([IGNORE] * len(embeddings) + tokens)
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")


CASES = [
    pytest.param({}, id="average"),
    pytest.param({"views": "concat"}, id="concat"),
    pytest.param({"visual_prompt": "pooled"}, id="average-pooled"),
    pytest.param({"views": "concat", "visual_prompt": "pooled"}, id="concat-pooled"),
    pytest.param({"hybrid": False}, id="plain"),
    pytest.param({"hybrid": False, "views": "concat"}, id="plain-concat"),
    pytest.param({"views": "concat", "kind": "qwen3"}, id="qwen3-concat"),
    pytest.param({"views": "concat", "kind": "mistral"}, id="mistral-concat"),
    pytest.param({"image_size": 48, "views": "concat", "visual_prompt": "pooled"}, id="odd-grid"),
]


# -- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_loss_of_a_padded_batch_is_the_sum_of_literal_losses(
    case: dict[str, Any], make_model: MakeModel, texts: list[str]
) -> None:
    model = make_model(**case)
    examples = _examples(texts, size=case.get("image_size", 64))
    batch = _batch(model, examples)
    assert batch.labels is not None
    assert bool((batch.labels == IGNORE).any())  # reports of different length
    with torch.no_grad():
        loss, items = model(batch)
        literal = [_literal_loss(model, example) for example in examples]
    torch.testing.assert_close(loss, torch.stack(literal).sum(), rtol=1e-5, atol=1e-4)
    lengths = [len(model.tokenizer.encode(e.report, add_special_tokens=False)) + 1 for e in examples]
    assert int(items) == sum(lengths)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_padded_batch_are_the_sum_over_studies(
    case: dict[str, Any], make_model: MakeModel, texts: list[str]
) -> None:
    model = make_model(**case)
    examples = _examples(texts, size=case.get("image_size", 64))
    parameters = [*model.bridge_parameters(), ("patches", model.encoder.patch_embed.weight)]
    tensors = [parameter for _, parameter in parameters]
    whole = torch.autograd.grad(model(_batch(model, examples)).loss_sum, tensors)
    alone = [torch.autograd.grad(model(_batch(model, [example])).loss_sum, tensors) for example in examples]
    for (name, _), gradient, *singles in zip(parameters, whole, *alone, strict=True):
        total = sum(singles)
        assert float(gradient.abs().max()) > 0, name
        assert float((gradient - total).norm() / gradient.norm()) < 1e-4, name


@pytest.mark.parametrize("views", ["average", "concat"])
def test_loss_does_not_depend_on_padding(views: str, make_model: MakeModel, texts: list[str]) -> None:
    model = make_model(views=views)
    batch = _batch(model, _examples(texts))
    assert batch.labels is not None
    with torch.no_grad():
        before = model(batch)
        batch.labels = F.pad(batch.labels, (0, 9), value=IGNORE)
        after = model(batch)
    torch.testing.assert_close(after.loss_sum, before.loss_sum, rtol=1e-5, atol=1e-4)
    assert after.items == before.items


def test_loss_of_cut_reports(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model()
    examples = _examples(texts)
    lengths = [len(model.tokenizer.encode(example.report)) for example in examples]
    limit = sorted(lengths)[1]  # one is shorter, one fits exactly, one is cut
    with torch.no_grad():
        loss, items = model(_batch(model, examples, limit))
        literal = sum(_literal_loss(model, example, limit) for example in examples)
    torch.testing.assert_close(loss, literal, rtol=1e-5, atol=1e-4)
    assert int(items) == sum(n + 1 if n <= limit else limit for n in lengths)


def test_the_loss_sees_the_image_by_prompt_and_hybrid_layers(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model()
    examples = _examples(texts, [1])
    other = [Example(0, "s", 255 - examples[0].pixels, examples[0].report)]
    with torch.no_grad():
        assert abs(float(model(_batch(model, examples)).loss_sum - model(_batch(model, other)).loss_sum)) > 1e-2


@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_precision_llm(autocast: bool, make_model: MakeModel, texts: list[str]) -> None:
    model = make_model(views="concat", visual_prompt="pooled")
    examples = _examples(texts)
    with torch.no_grad():
        exact = model(_batch(model, examples)).loss_sum
    hybrid = {name for name, _ in hybrid_parameters(model.llm)}
    for name, parameter in model.llm.named_parameters():
        if name not in hybrid:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(_batch(model, examples)).loss_sum
        assert all(model.generate(_batch(model, examples).pixels, torch.tensor(VIEWS), _config()))
    assert loss.dtype == torch.float32
    assert float((loss.detach() - exact).abs() / exact) < 0.05
    loss.backward()
    assert all(bool(p.grad is not None and p.grad.any()) for _, p in model.bridge_parameters())
    assert all(model.generate(_batch(model, examples).pixels, torch.tensor(VIEWS), _config()))


def test_bf16_autocast(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model(views="concat")
    batch = _batch(model, _examples(texts))
    with torch.no_grad():
        exact = model(batch).loss_sum
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(batch).loss_sum
    assert ours.dtype == torch.float32
    assert 0 < float((ours - exact).abs() / exact) < 0.05


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_changes_no_gradient(
    lora: bool, make_model: MakeModel, make_encoder: Callable[..., ArmEncoder], texts: list[str]
) -> None:
    model = make_model(views="concat")
    model.encoder = make_encoder(drop_path=0.3)
    if lora:
        model.encoder = get_peft_model(model.encoder, adapters.encoder_lora(["X", "dt"], 2, 2.0))
        model.llm = get_peft_model(model.llm, adapters.llm_lora(["llm"], 2, 2.0))
        for _, parameter in model.bridge_parameters():
            parameter.requires_grad_(True)
    model.train()
    batch = _batch(model, _examples(texts))
    calls: list[str] = []
    adapters.plain(model.encoder).layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append("encoder"))
    adapters.plain(model.llm).model.layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append("llm"))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(batch).loss_sum.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert sorted(calls) == ["encoder", "llm"]
    model.set_gradient_checkpointing(True)
    calls.clear()
    checkpointed = gradients()
    assert sorted(calls) == ["encoder", "encoder", "llm", "llm"]
    assert set(plain) == set(checkpointed)
    assert any("cross.kv_proj" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)
    model.set_gradient_checkpointing(False)
    calls.clear()
    gradients()
    assert sorted(calls) == ["encoder", "llm"]


# -- text -----------------------------------------------------------------------------------------------------------


def test_the_prompt(make_model: MakeModel, tokenizer: Any, qwen_tokenizer: Any) -> None:
    model = make_model()
    assert model.before[0] == tokenizer.bos_token_id
    assert tokenizer.decode(model.before[1:]) == "Human: <Img>"
    assert tokenizer.decode(model.after) == (
        "</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:"
    )
    assert model.pad_token_id == tokenizer.pad_token_id == 0
    without = make_model(use_tokenizer=qwen_tokenizer)
    assert without.before == model.before[1:]
    assert without.after == model.after
    assert without.pad_token_id == qwen_tokenizer.eos_token_id == 2  # it has no padding token of its own


def test_prompt_embeddings_in_order(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model(views="concat", visual_prompt="pooled")
    batch = _batch(model, _examples(texts))
    with torch.no_grad():
        embeddings, mask, visual = model.prompt(batch.pixels, batch.views)
        for row, example in enumerate(_examples(texts)):
            literal, arguments = _literal_prompt(model, example.pixels)
            real = mask[row].bool()
            torch.testing.assert_close(embeddings[row][real], literal, rtol=1e-4, atol=1e-4)
            assert visual["visual_tokens"] is not None
            assert visual["visual_mask"] is not None
            tokens = visual["visual_tokens"][row][visual["visual_mask"][row]]
            torch.testing.assert_close(tokens, arguments["visual_tokens"][0], rtol=1e-4, atol=1e-4)


def test_without_hybrid_layers_the_llm_gets_no_visual_arguments(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model(hybrid=False)
    batch = _batch(model, _examples(texts))
    assert model.prompt(batch.pixels, batch.views)[2] == {}


@pytest.mark.parametrize("case", [{}, {"views": "concat"}], ids=str)
def test_a_tokenizer_without_bos_and_padding(
    case: dict[str, Any], make_model: MakeModel, qwen_tokenizer: Any, texts: list[str]
) -> None:
    model = make_model(kind="qwen2", use_tokenizer=qwen_tokenizer, **case)
    examples = _examples(texts)
    batch = _batch(model, examples)
    with torch.no_grad():
        literal = sum(_literal_loss(model, example) for example in examples)
        torch.testing.assert_close(model(batch).loss_sum, literal, rtol=1e-5, atol=1e-4)
    written = model.generate(batch.pixels, batch.views, _config())
    alone = [model.generate(e.pixels, torch.tensor([len(e.pixels)]), _config())[0] for e in examples]
    assert written == alone


def test_reports_end_with_eos_unless_they_are_cut(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model()
    tokens = model.tokenizer.encode(texts[0], add_special_tokens=False)
    eos = model.tokenizer.eos_token_id
    assert model.encode_report(texts[0]) == [*tokens, eos]
    assert model.encode_report(texts[0], len(tokens) + 1) == [*tokens, eos]
    assert model.encode_report(texts[0], len(tokens)) == [*tokens, eos]
    assert model.encode_report(texts[0], len(tokens) - 1) == tokens[:-1]
    assert model.encode_report(texts[0], 1) == tokens[:1]
    assert model.encode_report("", 5) == [eos]


def test_the_released_code_adds_no_end_to_a_full_report(tokenizer: Any, texts: list[str]) -> None:
    tokens, eos = tokenizer.encode(texts[0], add_special_tokens=False), tokenizer.eos_token_id
    encode = partial(encode_report, tokenizer, texts[0], end_at_limit=False)
    assert encode(len(tokens)) == tokens
    assert encode(len(tokens) + 1) == [*tokens, eos]
    assert encode(len(tokens) - 1) == tokens[:-1]


def test_a_text_in_place_of_the_end_token(make_model: MakeModel, texts: list[str]) -> None:
    """As the released code trains Qwen: token 0 first, the end in plain letters."""
    plain = make_model()
    model = ReportGenerator(plain.encoder, plain.llm, plain.tokenizer, begin_token_id=0, end_text="<end>")
    assert model.before == [0, *plain.before[1:]]
    tokens = plain.tokenizer.encode(texts[0], add_special_tokens=False)
    end = plain.tokenizer.encode("<end>", add_special_tokens=False)
    assert len(end) > 1
    assert model.encode_report(texts[0]) == tokens + end
    assert encode_report(plain.tokenizer, texts[0], len(tokens) + 1, end_at_limit=False, end_text="<end>") == [
        *tokens,
        end[0],
    ]
    assert model.decode([*tokens, *end, *tokens]) == texts[0]


def test_the_prompt_around_the_image_can_be_changed(make_model: MakeModel) -> None:
    plain = make_model()
    encode = partial(plain.tokenizer.encode, add_special_tokens=False)
    model = ReportGenerator(plain.encoder, plain.llm, plain.tokenizer, prompt="Film: <ImageHere>\nReport:")
    assert model.before == [plain.tokenizer.bos_token_id, *encode("Film: ")]
    assert model.after == encode("\nReport:")
    assert (model.before, model.after) != (plain.before, plain.after)
    bare = ReportGenerator(plain.encoder, plain.llm, plain.tokenizer, prompt="<ImageHere>\nReport:")
    bare.before = []  # as of a tokenizer without a beginning
    pixels = _examples(["a"], [1])[0].pixels
    embeddings, mask, _ = bare.prompt(pixels, torch.tensor([1]))
    assert embeddings.shape[1] == mask.shape[1] == 17 + len(bare.after)


def test_the_default_prompt_is_the_published_text(make_model: MakeModel) -> None:
    model = make_model()
    encode = partial(model.tokenizer.encode, add_special_tokens=False)
    assert model.before == [model.tokenizer.bos_token_id, *encode("Human: <Img>")]
    assert model.after == encode(
        "</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:"
    )


def test_decoding_omits_special_tokens(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model()
    for text in texts:
        assert model.decode(torch.tensor([*model.encode_report(text), 0, 0])) == text
    assert model.decode(model.tokenizer.encode("  a\n b ", add_special_tokens=False)) == "a b"
    assert model.decode([2, 0]) == ""


def test_decoding_keeps_the_spaces_before_full_stops(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Such a tokenizer draws them together where it is not told otherwise.
    model = make_model()
    decode = type(model.tokenizer).decode

    def cleaning(self: Any, tokens: Any, clean_up_tokenization_spaces: bool = True, **options: Any) -> str:
        text: str = decode(self, tokens, **options)
        return text.replace(" .", ".") if clean_up_tokenization_spaces else text

    monkeypatch.setattr(type(model.tokenizer), "decode", cleaning)
    tokens = model.tokenizer.encode("clear . no", add_special_tokens=False)
    assert model.decode(tokens) == "clear . no"


# -- image ----------------------------------------------------------------------------------------------------------


def test_a_pooled_prompt_of_the_published_size_has_50_tokens() -> None:
    tokens = torch.randn(2, 14 * 14 + 1, 8)
    pooled = pool_patches(tokens)
    assert pooled.shape == (2, 49 + 1, 8)
    torch.testing.assert_close(pooled, torch.stack([_literal_pool(one) for one in tokens]))
    assert torch.equal(pooled[:, 24], tokens[:, 98])  # the class token


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 21])
def test_pooling_any_grid(grid: int) -> None:
    tokens = torch.randn(3, grid * grid + 1, 4)
    pooled = pool_patches(tokens)
    assert pooled.shape == (3, ((grid + 1) // 2) ** 2 + 1, 4)
    torch.testing.assert_close(pooled, torch.stack([_literal_pool(one) for one in tokens]))


def test_averaging_views() -> None:
    tokens, views = torch.randn(6, 5, 4), torch.tensor([2, 1, 3])
    expected = torch.stack([tokens[:2].mean(0), tokens[2], tokens[3:].mean(0)])
    torch.testing.assert_close(average_views(tokens, views), expected)
    assert torch.equal(average_views(tokens, torch.ones(6, dtype=torch.long)), tokens)


def test_concatenating_views() -> None:
    tokens = torch.randn(6, 5, 4)
    joined, mask = concatenate_views(tokens, torch.tensor([2, 1, 3]))
    assert joined.shape == (3, 15, 4)
    assert mask is not None
    assert mask.sum(1).tolist() == [10, 5, 15]
    assert torch.equal(joined[0, :10], tokens[:2].flatten(0, 1))
    assert torch.equal(joined[1, :5], tokens[2])
    assert torch.equal(joined[2], tokens[3:].flatten(0, 1))
    assert torch.equal(mask, joined.abs().sum(-1) > 0)
    joined, mask = concatenate_views(tokens, torch.tensor([2, 2, 2]))
    assert mask is None
    assert torch.equal(joined, tokens.reshape(3, 10, 4))


def test_hybrid_layers_see_every_token_of_a_pooled_prompt(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model(visual_prompt="pooled", image_size=224)
    batch = _batch(model, _examples(texts, [1], size=224))
    with torch.no_grad():
        prompt, every, *masks = model.visual_tokens(batch.pixels, batch.views)
        full = make_model(image_size=224).visual_tokens(batch.pixels, batch.views)
    assert prompt.shape == (1, 50, 32)
    assert every.shape == (1, 197, 32)
    assert masks == [None, None]
    torch.testing.assert_close(every, full[0])
    assert full[0] is full[1]


def test_the_bridge_is_linear_and_norm() -> None:
    bridge = Bridge(6, 8)
    assert {name: tuple(p.shape) for name, p in bridge.named_parameters()} == {
        "proj.weight": (8, 6),
        "proj.bias": (8,),
        "norm.weight": (8,),
        "norm.bias": (8,),
    }
    assert bridge.norm.eps == 1e-5


# -- generation -----------------------------------------------------------------------------------------------------


def _config(**options: Any) -> Any:
    return generation_config(GenerationSettings(**({"num_beams": 1, "max_new_tokens": 10} | options)))()


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_generating_a_batch_equals_each_study_alone(
    case: dict[str, Any], beams: int, make_model: MakeModel, texts: list[str]
) -> None:
    model = make_model(**case)
    examples = _examples(texts, size=case.get("image_size", 64))
    pixels = torch.cat([example.pixels for example in examples])
    written = model.generate(pixels, torch.tensor(VIEWS), _config(num_beams=beams))
    alone = [model.generate(e.pixels, torch.tensor([len(e.pixels)]), _config(num_beams=beams))[0] for e in examples]
    assert written == alone
    assert len(set(written)) == 3


@pytest.mark.parametrize("case", CASES)
def test_greedy_reports_equal_a_literal_loop(case: dict[str, Any], make_model: MakeModel, texts: list[str]) -> None:
    model = make_model(**case)
    examples = _examples(texts, size=case.get("image_size", 64))
    pixels = torch.cat([example.pixels for example in examples])
    written = model.generate(pixels, torch.tensor(VIEWS), _config(min_new_tokens=10))
    for example, report in zip(examples, written, strict=True):
        with torch.no_grad():
            sequence, visual = _literal_prompt(model, example.pixels)
            tokens: list[int] = []
            for _ in range(10):
                logits = model.llm(inputs_embeds=sequence[None], **visual).logits[0, -1]
                logits[model.tokenizer.eos_token_id] = -torch.inf
                tokens.append(int(logits.argmax()))
                sequence = torch.cat([sequence, model.llm.get_input_embeddings()(torch.tensor(tokens[-1:]))])
        assert report == model.decode(tokens)


@pytest.mark.parametrize("beams", [1, 3])
def test_lengths_are_kept(beams: int, make_model: MakeModel, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    rows: list[Tensor] = []
    monkeypatch.setattr(model, "decode", lambda row: rows.append(row) or "")
    pixels = torch.cat([example.pixels for example in _examples(texts)])
    with torch.no_grad():
        model.llm.lm_head.weight[2] = 3 * model.llm.lm_head.weight.mean(0)  # an end that is likely now and then
    model.generate(pixels, torch.tensor(VIEWS), _config(num_beams=beams, min_new_tokens=7, max_new_tokens=9))
    assert len(rows) == 3
    assert all(7 <= int(((row != 2) & (row != 0)).sum()) <= 9 for row in rows)
    assert all(len(row) <= 9 for row in rows)


def test_generation_stops_at_eos(make_model: MakeModel, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    rows: list[Tensor] = []
    monkeypatch.setattr(model, "decode", lambda row: rows.append(row) or "")
    calls: list[int] = []

    def end_at_fourth(module: Any, arguments: Any, logits: Tensor) -> Tensor:
        calls.append(1)
        return logits.index_fill(-1, torch.tensor(2), 1e4 if len(calls) == 4 else -1e4)

    model.llm.lm_head.register_forward_hook(end_at_fourth)
    pixels = torch.cat([example.pixels for example in _examples(texts)])
    model.generate(pixels, torch.tensor(VIEWS), _config())
    assert [row.tolist()[3:] for row in rows] == [[2]] * 3


def test_sampling_follows_the_seed(make_model: MakeModel, texts: list[str]) -> None:
    model = make_model()
    pixels = torch.cat([example.pixels for example in _examples(texts)])
    config = partial(_config, do_sample=True, temperature=2.0)
    torch.manual_seed(0)
    one = model.generate(pixels, torch.tensor(VIEWS), config())
    other = model.generate(pixels, torch.tensor(VIEWS), config())
    torch.manual_seed(0)
    assert model.generate(pixels, torch.tensor(VIEWS), config()) == one != other


def test_decoding_options() -> None:
    settings = GenerationSettings(
        num_beams=4,
        min_new_tokens=5,
        max_new_tokens=50,
        repetition_penalty=1.5,
        length_penalty=2.0,
        no_repeat_ngram_size=3,
    )
    make = generation_config(settings)
    config = make()
    assert make() is not config
    found = (config.num_beams, config.min_new_tokens, config.max_new_tokens, config.do_sample)
    assert found == (4, 5, 50, False)
    assert (config.repetition_penalty, config.length_penalty, config.no_repeat_ngram_size) == (1.5, 2.0, 3)
    sampled = generation_config(GenerationSettings(num_beams=1, do_sample=True, temperature=0.7, top_p=0.8, top_k=20))()
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 0.7, 0.8, 20)
    assert generation_config(GenerationSettings(num_beams=1, do_sample=True))().top_k == 0  # not the library's 50


# -- what is trained ------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_stays_in_evaluation(make_model: MakeModel) -> None:
    model = make_model()
    model.encoder.requires_grad_(False)
    assert model.train() is model
    assert (model.training, model.encoder.training, model.llm.training) == (True, False, True)
    assert not model.encoder.layers[0].training
    next(model.encoder.parameters()).requires_grad_(True)
    model.train()
    assert model.encoder.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_frozen_encoder_adds_no_noise_to_the_loss(
    make_model: MakeModel, make_encoder: Callable[..., ArmEncoder], texts: list[str]
) -> None:
    model = make_model()
    model.encoder = make_encoder(drop_path=0.5)
    batch = _batch(model, _examples(texts))
    assert model.train()(batch).loss_sum != model(batch).loss_sum
    model.encoder.requires_grad_(False)
    assert torch.equal(model.train()(batch).loss_sum, model(batch).loss_sum)


def test_names_of_the_bridge_do_not_depend_on_adapters(make_model: MakeModel) -> None:
    model = make_model()
    before = dict(model.bridge_parameters())
    assert {"bridge.proj.weight", "llm.model.layers.0.self_attn.cross.warmup"} < set(before)
    assert len(before) == 4 + 2 * 4
    model.llm = get_peft_model(model.llm, adapters.llm_lora(["llm"], 2, 2.0))
    model.encoder = get_peft_model(model.encoder, adapters.encoder_lora(["X"], 2, 2.0))
    after = dict(model.bridge_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


# -- dropout of a frozen LLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_llm_has_no_dropout(make_model: MakeModel, checkpointing: bool) -> None:
    model = make_model()
    model.llm.config.attention_dropout = 0.5
    for layer in model.llm.model.layers:
        layer.self_attn.attention_dropout = 0.5
    set_trainable(model, encoder=False, llm=False)
    model.train()
    model.set_gradient_checkpointing(checkpointing)
    batch = _batch(model, _examples(TEXTS))
    first, second = model(batch).loss_sum, model(batch).loss_sum
    assert torch.equal(first, second)
    assert any(layer.training for layer in model.llm.model.layers) == checkpointing
    set_trainable(model, encoder=False, llm=True)
    model.train()
    assert not torch.equal(model(batch).loss_sum, model(batch).loss_sum)


def test_dropout_of_lora_stays_on_a_frozen_llm(make_model: MakeModel) -> None:
    model = make_model()
    model.llm = get_peft_model(model.llm, adapters.llm_lora(["llm"], 2, 2.0, 0.5))
    set_trainable(model, encoder=False, llm=False)
    model.train()
    on = [name for name, module in model.llm.named_modules() if module.training]
    assert on
    assert all("lora_dropout" in name for name in on)
    model.eval()
    assert not any(module.training for module in model.llm.modules())


# -- findings in the prompt -------------------------------------------------------------------------------------------


def test_findings_in_the_prompt_are_between_yes_and_no(make_model: MakeModel) -> None:
    model = make_model()
    plain_prompt, plain_mask, _ = model.prompt(*_pixels_and_views(model))
    names = ["Cardiomegaly", "Pleural Effusion"]
    model.add_findings_head(2, FindingsPrompt(model.tokenizer, names))
    with torch.no_grad():
        model.findings.evidence.weight.zero_()
        model.findings.evidence.bias.copy_(torch.tensor([40.0, 0.0]))  # certain, and even
    prompt, mask, _ = model.prompt(*_pixels_and_views(model))
    embed = model.llm.get_input_embeddings()
    yes, no, first, second = (
        embed(torch.tensor(model.tokenizer.encode(text, add_special_tokens=False)))
        for text in (" yes", " no", " cardiomegaly:", " pleural effusion:")
    )
    even = (yes.mean(dim=0) + no.mean(dim=0)) / 2
    told = torch.cat([first, yes.mean(dim=0)[None], second, even[None]])
    place = plain_prompt.shape[1] - len(model.after)
    for study in range(len(VIEWS)):
        assert torch.allclose(prompt[study, place : place + len(told)], told, atol=1e-6)
    rest = torch.cat([prompt[:, :place], prompt[:, place + len(told) :]], dim=1)
    assert torch.equal(rest, plain_prompt)
    assert mask.shape[1] == plain_mask.shape[1] + len(told)


def test_findings_in_the_prompt_do_not_train_their_head(make_model: MakeModel) -> None:
    model = make_model()
    model.add_findings_head(1, FindingsPrompt(model.tokenizer, ["Cardiomegaly"]))
    model.requires_grad_(True)
    batch = _batch(model, _examples(TEXTS))
    model(batch).loss_sum.backward()
    assert model.findings.evidence.weight.grad is None
    before = model(batch).loss_sum.item()
    with torch.no_grad():
        model.findings.evidence.bias.fill_(30.0)
    assert model(batch).loss_sum.item() != before


def test_with_a_threshold_findings_are_yes_or_no(make_model: MakeModel) -> None:
    model = make_model()
    embed = model.llm.get_input_embeddings()
    words = FindingsPrompt(model.tokenizer, ["Edema"], threshold=0.3)
    states = words(embed, torch.tensor([[-0.9], [-0.8]]))[:, -1]  # probabilities of .289 and .310
    yes, no = (embed(torch.tensor(ids)).mean(dim=0) for ids in words.words[:2])
    assert torch.allclose(states, torch.stack([no, yes]), atol=1e-6)


def test_no_finding_is_told_if_there_is_no_other(make_model: MakeModel) -> None:
    names = ["No Finding", "Edema", "Support Devices", "Granuloma"]
    prompt = FindingsPrompt(make_model().tokenizer, names, threshold=0.15)
    present = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    assert prompt.consistent(present).int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0]]
    assert present[0, 0]  # the argument is unchanged
    assert FindingsPrompt(make_model().tokenizer, ["Edema"]).consistent(present[:, :1]).equal(present[:, :1])


def test_in_training_the_prompt_has_the_labels(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.add_findings_head(2, FindingsPrompt(model.tokenizer, ["Edema", "Fracture"], labels_in_training=True))
    findings = torch.tensor([[1.0, 0.0], [math.nan, 1.0], [0.0, 0.0]])
    batch = replace(_batch(model, _examples(TEXTS)), findings=findings)
    of_findings = model.findings.loss_sum(model.encode(batch.pixels), batch.views, findings)
    trained = model.train()(batch).loss_sum - model.report_tokens * of_findings
    validated = model.eval()(batch).loss_sum  # by what the head predicts
    assert trained.item() != pytest.approx(validated.item(), abs=1e-3)
    embed, prompt = model.llm.get_input_embeddings(), model.findings_prompt
    certain = torch.tensor([[40.0, -40.0], [0.0, 40.0], [-40.0, -40.0]])
    assert torch.allclose(prompt(embed, certain), prompt(embed, torch.zeros(3, 2), findings), atol=1e-6)
    monkeypatch.setattr(model, "_known_findings", lambda batch: findings)
    assert model(batch).loss_sum.item() == pytest.approx(trained.item(), rel=1e-5)


def test_sampled_reports_learn_after_predicted_findings(make_model: MakeModel) -> None:
    model = make_model()
    model.add_findings_head(1, FindingsPrompt(model.tokenizer, ["Edema"], labels_in_training=True))
    batch = replace(_batch(model, _examples(TEXTS)), findings=torch.ones(3, 1))
    assert model.train()._known_findings(batch) is batch.findings
    assert model._known_findings(replace(batch, advantages=torch.zeros(3))) is None


def _pixels_and_views(model: ReportGenerator) -> tuple[Tensor, Tensor]:
    batch = _batch(model, _examples(TEXTS))
    return batch.pixels, batch.views


# -- context in the prompt --------------------------------------------------------------------------------------------


CONTEXTS: list[Any] = [{"indication": "cough"}, {}, {"indication": "the heart is enlarged", "age": "45 years"}]


def _with_contexts(model: ReportGenerator) -> tuple[Batch, list[Batch]]:
    """Three studies with contexts of different lengths, together and each alone."""
    examples = [replace(e, context=c) for e, c in zip(_examples(TEXTS), CONTEXTS, strict=True)]
    return _batch(model, examples), [_batch(model, [example]) for example in examples]


@pytest.mark.parametrize("views", ["average", "concat"])
def test_contexts_do_not_depend_on_the_batch(views: str, make_model: MakeModel) -> None:
    model = make_model(views=views)
    together, alone = _with_contexts(model)
    with torch.no_grad():
        losses = [model(batch).loss_sum for batch in alone]
        torch.testing.assert_close(model(together).loss_sum, torch.stack(losses).sum(), rtol=1e-5, atol=1e-4)
        bare = model(replace(together, contexts=[])).loss_sum
        assert abs(bare - model(together).loss_sum) > 1e-3
        # Without anything to tell of any study, the prompt is that of a model without context.
        assert torch.equal(model(replace(together, contexts=[{}, {}, {}])).loss_sum, bare)
    for beams in (1, 3):
        config = partial(_config, num_beams=beams)
        written = model.generate(together.pixels, together.views, config(), together.contexts)
        assert written == [model.generate(one.pixels, one.views, config(), one.contexts)[0] for one in alone]


def test_the_context_is_after_the_image_or_at_its_place(make_model: MakeModel) -> None:
    model = make_model()
    together, _ = _with_contexts(model)
    told = model.tokenizer.encode(" Indication: the heart is enlarged. Age: 45 years.", add_special_tokens=False)
    plain_prompt, _, _ = model.prompt(together.pixels, together.views)
    prompt, mask, _ = model.prompt(together.pixels, together.views, together.contexts)
    place = plain_prompt.shape[1] - len(model.after)
    embedded = model.llm.get_input_embeddings()(torch.tensor(told))
    assert torch.equal(prompt[2, place : place + len(told)], embedded)
    assert torch.equal(torch.cat([prompt[2, :place], prompt[2, place + len(told) :]]), plain_prompt[2])
    assert mask.sum(dim=1).tolist() == [len(row) for row in _told(model, plain_prompt.shape[1])]
    moved = ReportGenerator(
        model.encoder, model.llm, model.tokenizer, prompt="Film: <ImageHere> Known:<ContextHere>\nReport:"
    )
    moved.bridge = model.bridge
    prompt, _, _ = moved.eval().prompt(together.pixels, together.views, together.contexts)
    place = prompt.shape[1] - len(moved.after)
    assert torch.equal(prompt[2, place - len(told) : place], embedded)
    known = model.tokenizer.encode(" Known:", add_special_tokens=False)
    assert moved.between == known
    assert torch.equal(
        prompt[1, len(moved.before) + 17 :][: len(known)], model.llm.get_input_embeddings()(torch.tensor(known))
    )


def _told(model: ReportGenerator, prompt: int) -> list[list[int]]:
    texts = [" Indication: cough.", "", " Indication: the heart is enlarged. Age: 45 years."]
    return [[0] * prompt + (model.tokenizer.encode(text, add_special_tokens=False) if text else []) for text in texts]


# -- views told to the model ------------------------------------------------------------------------------------------


def test_views_have_an_effect_after_their_vector_is_trained(make_model: MakeModel) -> None:
    model = make_model()
    batch = _batch(model, _examples(TEXTS))
    told = replace(batch, projections=torch.tensor([1, 2, 0, 1, 1, 2]))
    swapped = replace(batch, projections=torch.tensor([2, 1, 0, 2, 2, 1]))
    with torch.no_grad():
        off = model(batch).loss_sum
        assert torch.equal(model(told).loss_sum, off)  # without the embedding the views are not looked at
        model.add_view_embedding()
        assert model.view_embedding is not None
        for views in (batch, told, swapped):
            assert torch.equal(model(views).loss_sum, off)
        model.view_embedding.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(2)))
        assert len({float(model(views).loss_sum) for views in (batch, told, swapped)}) == 3
        tokens, plain_tokens = model.encode(told.pixels, told.projections), model.encoder(_normalised(model, told))
        for place, projection in enumerate(told.projections.tolist()):
            expected = plain_tokens[place] + model.view_embedding[projection]
            torch.testing.assert_close(tokens[place], expected)
        assert torch.equal(model.encode(told.pixels), model.encode(told.pixels, torch.zeros(6, dtype=torch.long)))
        prompts = [model.prompt(told.pixels, told.views, (), some.projections)[0] for some in (told, swapped)]
    assert not torch.equal(*prompts)


def _normalised(model: ReportGenerator, batch: Batch) -> Tensor:
    return (batch.pixels[:, None].float() / 255 - model.mean) / model.std
