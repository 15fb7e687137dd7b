"""Computes where the model looks in the images when it writes each sentence, in one pass over finished reports.

The maps describe the model, not the truth: attention to a place does not prove a finding there, and the encoder mixes
its tokens, so the token of a patch also has information about other patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.decoding.teacher_forcing import read_reports
from emrrg_cli.models.adapters import plain
from emrrg_cli.models.hybrid_decoder import CrossAttention, decoder_layers
from emrrg_cli.models.report_generator import Contexts, ReportGenerator

Tokens = Sequence[Sequence[int]]
_STUDIES = 4  # studies at a time if gradients are computed


def ground_reports(
    model: ReportGenerator,
    pixels: Tensor,
    views: Tensor,
    reports: Tokens,
    sentences: Tokens,
    contexts: Contexts = (),
    projections: Tensor | None = None,
) -> list[Tensor]:
    """Computes maps of where the model looks when it writes each sentence.

    With hybrid layers, a map is their cross-attention to the patches at the positions that predict the sentence's
    tokens, averaged over tokens, layers and heads, weighted by the size of the gate; a closed gate has no weight. If
    the model averages the views of a study, all views get the same map. Without hybrid layers, a map is the influence
    of each patch on the sentence's log-probability, to first order (gradient times the encoder's token).

    Args:
        model: the model, in evaluation mode.
        pixels: uint8 `[n, size, size]`, the views of all studies in sequence, on the model's device.
        views: int64 `[b]`, views of each study, which sum to `n`.
        reports: tokens of each of `b` reports.
        sentences: number of the sentence of each token, or -1.
        contexts: context of each study; empty: no study has any.
        projections: int64 `[n]`, indices into `VIEW_TOKENS`; None: all unknown.

    Returns:
        For each study fp32 `[sentences, views, grid, grid]` on the CPU, row by row from the top left. Each sentence's
        map sums to 1 over views and patches, or is 0 everywhere if no gate is open.
    """
    ground = _by_attention if model.hybrid else _by_gradient
    with torch.no_grad():
        tokens = model.encode(pixels, projections)
    maps = ground(model, tokens, views, contexts, reports, sentences)
    found = []
    for study, (weights, numbers) in enumerate(zip(maps, sentences, strict=True)):
        count = max(numbers, default=-1) + 1
        patches = _without_class_token(weights[:count].clamp(min=0))  # [count, v, l]
        patches = patches[:, : int(views[study])]
        grid = round(patches.shape[-1] ** 0.5)
        total = patches.sum((1, 2), keepdim=True)
        found.append((patches / total.clamp(min=1e-20)).view(*patches.shape[:2], grid, grid).cpu())
    return found


def _without_class_token(weights: Tensor) -> Tensor:
    # [..., l + 1] -> [..., l]
    middle = (weights.shape[-1] - 1) // 2
    return torch.cat([weights[..., :middle], weights[..., middle + 1 :]], dim=-1)


# -- with hybrid layers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _by_attention(
    model: ReportGenerator, tokens: Tensor, views: Tensor, contexts: Contexts, reports: Tokens, sentences: Tokens
) -> Tensor:
    # tokens [n, l + 1, d] -> [b, sentences, v, l + 1]
    embeddings, mask, visual = model.prompt_of(tokens, views, contexts)
    prompts = Prompts([], [], embeddings, mask, visual["visual_tokens"], visual["visual_mask"])
    chosen = _sentence_tokens(sentences, embeddings.device)  # [b, s, t]
    written = chosen.shape[-1]
    parts: list[Tensor] = []

    def keep(cross: CrossAttention, inputs: tuple[Any, ...]) -> None:
        hidden, query, key, _, visual_mask = inputs
        # The position before a token predicts it.
        hidden, query = (states[:, -written - 1 : -1] for states in (hidden, query))
        gates = cross.gates(hidden).float().abs().transpose(1, 2)  # [b, 1, t]
        with torch.autocast(query.device.type, enabled=False):
            parts.append((chosen * gates) @ cross.weights(query, key, visual_mask).mean(1))

    with _watched(model.llm, keep):
        read_reports(model.llm, prompts, reports, model.pad_token_id, logits=1)
    total = torch.stack(parts).sum(0)  # [b, s, m]
    if model.views == "average":
        return total[:, :, None].expand(-1, -1, int(views.max()), -1)
    return total.view(*total.shape[:2], int(views.max()), -1)


@contextmanager
def _watched(llm: Any, keep: Any) -> Iterator[None]:
    crosses = (getattr(layer.self_attn, "cross", None) for layer in decoder_layers(plain(llm)))
    hooks = [cross.register_forward_pre_hook(keep) for cross in crosses if cross is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sentence_tokens(sentences: Tokens, device: torch.device) -> Tensor:
    # [b, s, t], 1 if a token belongs to a sentence
    longest, most = max(map(len, sentences)), max(max(numbers, default=-1) for numbers in sentences) + 1
    padded = torch.tensor([[*numbers, *[-1] * (longest - len(numbers))] for numbers in sentences])
    return (padded[:, None] == torch.arange(most)[:, None]).float().to(device)


# -- without --------------------------------------------------------------------------------------------------------


def _by_gradient(
    model: ReportGenerator, tokens: Tensor, views: Tensor, contexts: Contexts, reports: Tokens, sentences: Tokens
) -> Tensor:
    # tokens [n, l + 1, d] -> [b, sentences, v, l + 1]; a few studies at a time, because all states are kept
    counts: list[int] = views.tolist()
    most = max(max(numbers, default=-1) for numbers in sentences) + 1
    found = tokens.new_zeros(len(reports), most, max(counts), tokens.shape[1], dtype=torch.float32)
    groups = torch.split(tokens, counts)
    for first in range(0, len(reports), _STUDIES):
        part = slice(first, first + _STUDIES)
        own = torch.cat(groups[part])
        saliency = _saliency(model, own, views[part], contexts[part], reports[part], sentences[part])
        for study, weight in enumerate(torch.split(saliency, counts[part], dim=1), start=first):
            found[study, : len(weight), : weight.shape[1]] = weight
    return found


@torch.enable_grad()
def _saliency(
    model: ReportGenerator, tokens: Tensor, views: Tensor, contexts: Contexts, reports: Tokens, sentences: Tokens
) -> Tensor:
    # tokens [n, l + 1, d] -> [sentences, n, l + 1], each study's sentences in its own views
    tokens = tokens.detach().requires_grad_()
    embeddings, mask, _ = model.prompt_of(tokens, views, contexts)
    chosen = _sentence_tokens(sentences, embeddings.device)
    written = chosen.shape[-1]
    prompts = Prompts([], [], embeddings, mask)
    logits = read_reports(model.llm, prompts, reports, model.pad_token_id, logits=written + 1)[:, :-1].float()
    ids = torch.tensor([[*row, *[0] * (written - len(row))] for row in reports]).to(logits.device)
    given = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # [b, t]
    found = tokens.new_zeros(chosen.shape[1], *tokens.shape[:2], dtype=torch.float32)
    for number in range(len(found)):  # a report depends only on the tokens of its own study
        wanted = (given * chosen[:, number]).sum()
        (gradient,) = torch.autograd.grad(wanted, tokens, retain_graph=number + 1 < len(found))
        found[number] = (gradient.float() * tokens.detach().float()).sum(-1).abs()
    return found
