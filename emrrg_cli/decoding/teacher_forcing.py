"""Reads finished reports again: one forward pass over prompts and reports, for many studies at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.models.adapters import plain

_LARGEST = 1 << 28  # logits in memory at a time


def read_reports(llm: Any, prompts: Prompts, reports: Sequence[Sequence[int]], pad: int, *, logits: int) -> Tensor:
    """Runs a forward pass over prompts followed by their reports.

    Args:
        llm: causal LM in evaluation mode.
        prompts: prompts of `b` studies, `p` tokens each.
        reports: tokens of each report, at most `t`.
        pad: token that fills shorter reports.
        logits: number of last positions that get logits; the states of all positions are computed.

    Returns:
        `[b, logits, vocabulary]`; the position before a token predicts it.
    """
    embeddings = prompts.embeddings
    longest = max(map(len, reports))
    rows = [[*tokens, *[pad] * (longest - len(tokens))] for tokens in reports]
    real = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in reports]
    written = llm.get_input_embeddings()(torch.tensor(rows).to(embeddings.device))
    mask = torch.cat([prompts.mask, torch.tensor(real).to(prompts.mask)], dim=1)
    visual: dict[str, Tensor | None] = {}
    if prompts.visual_tokens is not None:
        visual = {"visual_tokens": prompts.visual_tokens, "visual_mask": prompts.visual_mask}
    found: Tensor = llm(
        inputs_embeds=torch.cat([embeddings, written.to(embeddings.dtype)], dim=1),
        attention_mask=mask,
        position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=logits,
        **visual,
    ).logits
    return found


@torch.no_grad()
def token_log_probabilities(
    llm: Any, prompts: Prompts, reports: Sequence[Sequence[int]], pad: int
) -> list[list[float]]:
    """Computes the log-probability of each token of finished reports, before decoding options.

    Args: as in `read_reports`.

    Returns:
        One list per study, as long as its report.
    """
    found: list[list[float]] = []
    longest = max(map(len, reports))
    size = max(1, _LARGEST // ((longest + 1) * plain(llm).config.get_text_config(decoder=True).vocab_size))
    for first in range(0, len(reports), size):
        some = reports[first : first + size]
        part = prompts.rows(first, first + len(some))
        logits = read_reports(llm, part, some, pad, logits=max(map(len, some)) + 1)[:, :-1].float()
        for row, tokens in zip(logits, some, strict=True):
            ids = torch.tensor(tokens).to(row.device)[:, None]
            given = row[: len(tokens)].gather(1, ids)[:, 0] - row[: len(tokens)].logsumexp(-1)
            found.append(given.tolist())
    return found
