"""The stage 2 model: its values and all its gradients against a literal one, in one piece and in many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emrrg_cli.datasets.align_dataset import PairBatch, collate_pairs
from emrrg_cli.datasets.report_dataset import Example
from emrrg_cli.models.alignment import Alignment, contrastive_losses, pool_text
from emrrg_cli.models.text_encoder import build_scratch_text_encoder, train_text_tokenizer
from emrrg_cli.recipe.alignment import ScratchTextSettings

REPORTS = [
    "the heart is enlarged . no pneumothorax .",
    "there is a left pleural effusion . the lungs are otherwise clear .",
    "clear .",
    "a nodule is seen in the right upper lobe .",
    "the lungs are clear . heart size is normal .",
    "the heart is enlarged .",
    "no acute findings .",
]
VIEWS = [1, 2, 1, 3, 1, 1, 2]


@pytest.fixture(scope="module")
def text_tokenizer() -> Any:
    return train_text_tokenizer(REPORTS, 320)


@pytest.fixture
def make_model(make_encoder: Any, text_tokenizer: Any) -> Callable[..., Alignment]:
    def make(pooling: str = "last", dropout: float = 0.0, drop_path: float = 0.0) -> Alignment:
        encoder = make_encoder(depth=3, image_size=32, drop_path=drop_path)
        torch.manual_seed(1)
        settings = ScratchTextSettings(hidden_size=24, layers=2, heads=2, vocab_size=320, dropout=dropout)
        text_encoder = build_scratch_text_encoder(settings, text_tokenizer, 16)
        with torch.no_grad():
            for parameter in text_encoder.parameters():  # away from an initialisation where all texts look alike
                parameter += 0.1 * torch.randn_like(parameter)
        return Alignment(encoder, text_encoder, text_tokenizer, dim=20, pooling=pooling, max_text_tokens=16)

    return make


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    pixels = [torch.randint(0, 256, (views, 32, 32), generator=generator, dtype=torch.uint8) for views in VIEWS]
    return [Example(i, f"s{i}", pixels[i], REPORTS[i]) for i in range(len(REPORTS))]


@pytest.fixture
def batch_of(examples: list[Example], text_tokenizer: Any) -> Callable[[Sequence[int]], PairBatch]:
    return lambda indices: collate_pairs([examples[i] for i in indices], text_tokenizer, 16)


def literal_embeddings(model: Alignment, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Study by study and view by view, as SPEC words it."""
    images, texts = [], []
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for example in examples:
        views = []
        for pixels in example.pixels:
            image = torch.stack([(pixels / 255 - mean[c]) / std[c] for c in range(3)])
            views.append(model.encoder(image[None])[0])  # [l + 1, d]
        mean_view = sum(views) / len(views)
        images.append(model.vision_proj(sum(token for token in mean_view) / len(mean_view)))
        tokens = model.tokenizer.encode(example.report)
        if len(tokens) > model.max_text_tokens:  # a cut one ends with the token of the end as well
            tokens = [*tokens[: model.max_text_tokens - 1], model.tokenizer.eos_token_id]
        ids = torch.tensor([tokens])
        hidden = model.text_encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        texts.append(model.text_proj(hidden[-1] if model.pooling == "last" else hidden.mean(dim=0)))
    return (
        torch.stack([image / image.square().sum().sqrt() for image in images]),
        torch.stack([text / text.square().sum().sqrt() for text in texts]),
    )


def literal_loss_sum(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Pair by pair."""
    total = torch.zeros((), device=images.device)
    b = len(images)
    similar = [[(images[i] * texts[j]).sum() * logit_scale.exp() for j in range(b)] for i in range(b)]
    for i in range(b):
        to_texts = torch.stack([similar[i][j].exp() for j in range(b)]).sum().log() - similar[i][i]
        to_images = torch.stack([similar[j][i].exp() for j in range(b)]).sum().log() - similar[i][i]
        total = total + (to_texts + to_images) / 2
    return total


def gradients(model: Alignment) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    # Some are nothing but rounding: a bias on all keys changes no attention.
    rounding = 1e-8 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= relative * float(gradient.abs().max()) + rounding, name


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_values_and_gradients_equal_a_literal_implementation(
    make_model: Any, examples: list[Example], batch_of: Any, pooling: str
) -> None:
    model = make_model(pooling)
    images, texts = literal_embeddings(model, examples)
    expected = literal_loss_sum(images, texts, model.logit_scale)
    expected.backward()
    by_hand = gradients(model)
    output = model(batch_of(range(7)))
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (int(output.items), expected.item() > 1) == (7, True)
    output.loss_sum.backward()
    assert_same_gradients(gradients(model), by_hand, 1e-5)
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, _ in model.named_parameters()} - by_hand.keys() == idle
    assert all("pooler" in name for name in idle)


def test_every_parameter_counts(make_model: Any, batch_of: Any) -> None:
    model = make_model()
    model(batch_of(range(7))).loss_sum.backward()
    zero = [name for name, gradient in gradients(model).items() if not gradient.any()]
    # A bias on all keys changes no attention; position and token tables have rows that no text uses, but not all.
    assert [name for name in zero if not name.endswith("key.bias")] == []


@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5), (2, 2, 2, 1), (1,) * 7])
def test_cached_gradients_are_those_of_one_batch(make_model: Any, batch_of: Any, sizes: tuple[int, ...]) -> None:
    model = make_model().train()
    whole = model(batch_of(range(7))).loss_sum
    whole.backward()
    expected = gradients(model)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    prepared = model.cache_gradients([batch_of(range(s, s + n)) for s, n in zip(starts, sizes, strict=True)])
    assert [int(output.items) for output in map(model, prepared)] == list(sizes)
    total = 0.0
    for part in prepared:
        output = model(part)
        output.loss_sum.backward()
        total += output.loss_sum.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    assert_same_gradients(gradients(model), expected, 1e-5)


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_cached_gradients_meet_the_same_noise_twice(
    make_model: Any, batch_of: Any, examples: list[Example], device: str
) -> None:
    model = make_model(dropout=0.3, drop_path=0.8).train().to(device)
    parts = [batch_of(indices).to(torch.device(device)) for indices in ([0, 1, 2], [3, 4, 5, 6])]
    torch.manual_seed(11)
    images, texts = (torch.cat(both) for both in zip(*(model.embed(part) for part in parts), strict=True))
    after = torch.rand(3), torch.rand(3, device=device)
    expected = literal_loss_sum(images, texts, model.logit_scale)
    expected.backward()
    by_hand = gradients(model)
    torch.manual_seed(11)
    prepared = model.cache_gradients(parts)
    outputs = []
    for part in prepared:
        outputs.append(model(part).loss_sum)
        outputs[-1].backward()
    # As many numbers were drawn as for one pass.
    assert all(map(torch.equal, (torch.rand(3), torch.rand(3, device=device)), after))
    assert sum(output.item() for output in outputs) == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model), by_hand, 1e-5 if device == "cpu" else 1e-4)
    quiet, _ = make_model().train().to(device).embed(parts[0])
    assert not torch.allclose(quiet, images[:3], atol=1e-3)  # the noise was no small one


def test_the_scale_is_clamped_and_can_come_back(make_model: Any, batch_of: Any) -> None:
    model = make_model()
    images, texts = (embeddings.detach() for embeddings in model.embed(batch_of(range(7))))
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    near = torch.nn.functional.normalize(images[:1] + 0.05 * (images - images[:1]), dim=1)  # all close to the first
    for above in (0.5, 0.0, -0.5):
        with torch.no_grad():
            model.logit_scale.fill_(math.log(100) + above)
        scale = min(100.0, 100 * math.exp(above))
        # Pairs that do not match: a smaller scale is better, and the gradient says so wherever the scale is.
        wrong = model.contrast(images, texts)
        assert torch.allclose(wrong.losses, contrastive_losses(images, texts, scale))
        assert wrong.scale > 1
        # Pairs that do, among others nearby: a larger one would be better, and only below the limit is that said.
        right = model.contrast(near, near)
        assert torch.allclose(right.losses, contrastive_losses(near, near, scale))
        assert (right.scale == 0) if above >= 0 else (right.scale < -1e-3)


def test_a_gradient_step_brings_the_scale_back(make_model: Any, batch_of: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100) + 0.2)
    optimizer = torch.optim.SGD([model.logit_scale], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(batch_of(range(7))).loss_sum.backward()
        optimizer.step()
    assert model.logit_scale.item() < math.log(100)


def test_pooling_takes_the_last_real_token_on_any_padding_side() -> None:
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    left = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
    one = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]])
    assert torch.equal(pool_text(hidden, right, "last"), torch.stack([hidden[0, 1], hidden[1, 3]]))
    assert torch.equal(pool_text(hidden, left, "last"), torch.stack([hidden[0, 3], hidden[1, 3]]))
    assert torch.equal(pool_text(hidden, one, "last"), torch.stack([hidden[0, 0], hidden[1, 1]]))
    assert torch.allclose(pool_text(hidden, right, "mean"), torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]))
    assert torch.allclose(pool_text(hidden, left, "mean"), torch.stack([hidden[0, 2:].mean(0), hidden[1, 3]]))


def test_an_embedding_does_not_depend_on_the_batch(make_model: Any, batch_of: Any) -> None:
    model = make_model().eval()
    images, texts = model.embed(batch_of(range(7)))
    assert images.norm(dim=1).tolist() == pytest.approx([1.0] * 7)
    for index in range(7):
        image, text = model.embed(batch_of([index]))
        assert torch.allclose(image[0], images[index], atol=1e-6)
        assert torch.allclose(text[0], texts[index], atol=1e-6)
    assert (texts @ texts.T).fill_diagonal_(0).max() < 0.999  # and they differ


def test_a_frozen_text_tower_is_deterministic_in_training(make_model: Any, batch_of: Any) -> None:
    model = make_model(dropout=0.5)
    batch = batch_of([0, 1])
    model.train()
    assert not torch.equal(*(model.embed_texts(batch.input_ids, batch.attention_mask) for _ in range(2)))
    model.text_encoder.requires_grad_(False)
    model.train()
    assert torch.equal(*(model.embed_texts(batch.input_ids, batch.attention_mask) for _ in range(2)))
    assert model.encoder.training


def test_recomputation_in_the_backward_pass_changes_no_gradient(make_model: Any, batch_of: Any) -> None:
    model = make_model().train()
    model(batch_of(range(7))).loss_sum.backward()
    expected = gradients(model)
    model.set_gradient_checkpointing(True)
    model(batch_of(range(7))).loss_sum.backward()
    assert_same_gradients(gradients(model), expected, 1e-6)


def test_half_precision_keeps_the_loss_in_fp32(make_model: Any, batch_of: Any) -> None:
    model = make_model()
    expected = model(batch_of(range(7))).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        image, _ = model.embed(batch_of(range(7)))
        output = model(batch_of(range(7)))
    assert (image.dtype, output.loss_sum.dtype) == (torch.float32, torch.float32)
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=0.05)


def test_an_unknown_pooling_is_refused(make_model: Any) -> None:
    with pytest.raises(ValueError, match="pooling must be last or mean, got first"):
        make_model("first")


# -- films with labels and no report ----------------------------------------------------------------------------------


def _mixed(examples: list[Example], text_tokenizer: Any, indices: Sequence[int]) -> PairBatch:
    """Studies 1, 3 and 4 have labels in place of their reports; nobody knows some of the others' findings."""
    labels = torch.zeros(23)
    labels[3], labels[5:] = 1.0, math.nan
    films = {1, 3, 4}
    chosen = [replace(examples[i], report=".", findings=labels) if i in films else examples[i] for i in indices]
    return collate_pairs(chosen, text_tokenizer, 16, findings=True, labelled=True)


def _with_head(model: Alignment) -> Alignment:
    from emrrg_cli.models.findings_head import FindingsHead

    torch.manual_seed(6)
    model.findings = FindingsHead(model.encoder.d_model, 14)
    model.findings.weight = 0.7
    return model.train()


def test_films_without_report_are_not_in_the_contrastive_loss(
    make_model: Callable[..., Alignment], examples: list[Example], text_tokenizer: Any, batch_of: Any
) -> None:
    model = _with_head(make_model())
    count = len(examples)
    pairs = [i for i in range(count) if i not in (1, 3, 4)]
    batch = _mixed(examples, text_tokenizer, range(count))
    loss_sum, items = model(batch)
    (loss_sum / items).backward()
    found = gradients(model)
    # The mean over the pairs of the contrast of pairs alone, and the mean over all films of the findings' loss.
    alone = batch_of(pairs)
    image, text = model.embed(alone)
    contrast = contrastive_losses(image, text, model.logit_scale.clamp(max=math.log(100)).exp()).mean()
    assert model.findings is not None
    assert batch.findings is not None
    findings = model.findings.loss_sum(model.encode(batch.pixels), batch.views, batch.findings) / count
    expected = contrast + findings
    torch.testing.assert_close(loss_sum / items, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    assert_same_gradients(found, gradients(model), 1e-4)
    assert int(items) == count


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 3, 2], [4, 2]])
def test_accumulated_mixed_batches_equal_the_whole(
    sizes: list[int], make_model: Callable[..., Alignment], examples: list[Example], text_tokenizer: Any
) -> None:
    model = _with_head(make_model())
    order, total = [0, 1, 2, 3, 5, 4], sum(sizes)  # in [1, 3, 2] the last part has one pair, in [2, 2, 2] each has
    whole_loss, whole_items = model(_mixed(examples, text_tokenizer, order))
    (whole_loss / whole_items).backward()
    expected = gradients(model)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    parts = [_mixed(examples, text_tokenizer, order[s : s + n]) for s, n in zip(starts, sizes, strict=True)]
    total_loss = 0.0
    for part in model.cache_gradients(parts):
        loss, _ = model(part)
        (loss / total).backward()
        total_loss += float(loss.detach()) / total
    assert total_loss == pytest.approx(float(whole_loss / whole_items), rel=1e-5)
    assert_same_gradients(gradients(model), expected, 1e-4)


def test_a_batch_without_reports_trains_only_the_head(
    make_model: Callable[..., Alignment], examples: list[Example], text_tokenizer: Any
) -> None:
    model = _with_head(make_model())
    loss, items = model(_mixed(examples, text_tokenizer, [1, 3, 4]))
    (loss / items).backward()
    found = gradients(model)
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    touched = {name.split(".")[0] for name, gradient in found.items() if gradient.abs().max() > 0}
    assert touched == {"encoder", "findings"}
