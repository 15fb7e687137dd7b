"""Consensus decoding: of several sampled reports of a study, the one that agrees best with all of them.

The likeliest report is often an unusual one in a data set where most studies are normal and every report has its own
words. The report with the best expected score, if the samples were the references, has what most samples have.

Source: minimum Bayes risk decoding (Kumar and Byrne, NAACL 2004; Eikema and Aziz, COLING 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.scoring.reward import Reward


def several_samples(prompts: Prompts, samples: int) -> Prompts:
    """Returns the prompts with `samples` reports each, with keys `(key, number)` and seeds of their own."""
    keys = [(key, number) for key in prompts.keys for number in range(samples)]
    seeds = [_seed(seed, number, samples) for seed in prompts.seeds for number in range(samples)]
    return replace(prompts, keys=keys, seeds=seeds, copies=samples)


def _seed(seed: int, number: int, samples: int) -> int:
    # The seed of the recipe is in the upper half, the number of the study in the lower one.
    return (seed >> 32 << 32) + ((seed % 2**32) * samples + number) % 2**32


def most_agreed(texts: Sequence[str], scores: Mapping[str, float]) -> int:
    """Returns the number of the text with the highest mean score against all texts; the first of equals.

    Args:
        scores: weights by name, of `emrrg_cli.vocabulary.AGREEMENTS`.
    """
    different = list(dict.fromkeys(texts))
    hypotheses = [text for text in different for _ in texts]
    values = Reward((), scores)(list(texts) * len(different), hypotheses)
    best = int(np.reshape(values, (len(different), len(texts))).mean(axis=1).argmax())
    return texts.index(different[best])
