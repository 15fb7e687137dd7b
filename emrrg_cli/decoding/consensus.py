"""Consensus decoding: prompts for several samples of each study, of which `scoring.agreement` keeps one."""

from __future__ import annotations

from dataclasses import replace

from emrrg_cli.decoding.slots import Prompts


def several_samples(prompts: Prompts, samples: int) -> Prompts:
    """Returns the prompts with `samples` reports each, with keys `(key, number)` and different seeds."""
    keys = [(key, number) for key in prompts.keys for number in range(samples)]
    seeds = [_seed(seed, number, samples) for seed in prompts.seeds for number in range(samples)]
    return replace(prompts, keys=keys, seeds=seeds, copies=samples)


def _seed(seed: int, number: int, samples: int) -> int:
    # The upper half is the seed of the recipe, the lower half the number of the study.
    return (seed >> 32 << 32) + ((seed % 2**32) * samples + number) % 2**32
