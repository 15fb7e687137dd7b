"""Consensus decoding: prompts for several samples of each study, of which `scoring.agreement` keeps one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.decoding.slots import Prompts


def draw_findings(probabilities: Tensor, seeds: Sequence[int], draws: int) -> Tensor:
    """Draws findings for several prompts of each study; a finding is in a share of them that is near its probability.

    Args:
        probabilities: `[b, findings]`.
        seeds: one per study; the draws of a study do not depend on other studies.

    Returns:
        bool `[b, draws, findings]`.
    """
    limits = []
    for seed in seeds:  # one limit in each of `draws` equal intervals, in random order
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(draws, probabilities.shape[1], generator=generator).argsort(dim=0)
        limits.append((order + torch.rand(order.shape, generator=generator)) / draws)
    return torch.stack(limits).to(probabilities.device) < probabilities[:, None]


def interleaved(made: Sequence[Prompts]) -> Prompts:
    """Joins prompts of the same studies, so that the prompts of a study are in sequence."""

    def join(name: str) -> Any:
        parts = [getattr(prompts, name) for prompts in made]
        return None if parts[0] is None else torch.stack(parts, dim=1).flatten(0, 1)

    return replace(made[0], **{name: join(name) for name in ("embeddings", "mask", "visual_tokens", "visual_mask")})


def several_samples(prompts: Prompts, samples: int) -> Prompts:
    """Returns prompts with `samples` reports for each study, with keys `(key, number)` and different seeds.

    A study may have several prompts in sequence; each gets an equal part of the samples.
    """
    keys = [(key, number) for key in prompts.keys for number in range(samples)]
    seeds = [_seed(seed, number, samples) for seed in prompts.seeds for number in range(samples)]
    return replace(prompts, keys=keys, seeds=seeds, copies=len(keys) // len(prompts.embeddings))


def _seed(seed: int, number: int, samples: int) -> int:
    # The upper half is the seed of the recipe, the lower half the number of the study.
    return (seed >> 32 << 32) + ((seed % 2**32) * samples + number) % 2**32
