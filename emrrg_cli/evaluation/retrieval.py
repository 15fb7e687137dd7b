"""Retrieval of a report by its X-ray and of an X-ray by its report: recall@k both ways.

Reports of different studies may read alike. Then the report says nothing about which of them is meant, and the rules
differ in what counts as found:

- strict (`recall`): the study itself. Among reports that read alike the order is a draw, and its expectation counts.
- lenient (`recall_alike`): any study whose report reads the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

KS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Retrieval:
    """Recall over `studies` pairs, by way (`image_to_text`, `text_to_image`) and `k`, each from 0 to 1.

    `chance`, `chance_alike`: expectation of a random order, the same both ways. `ceiling`: the most that strict recall
    can be, less than 1 where reports read alike. `distinct`: how many different reports there are.
    """

    studies: int
    distinct: int
    recall: dict[str, dict[int, float]]
    recall_alike: dict[str, dict[int, float]]
    chance: dict[int, float]
    chance_alike: dict[int, float]
    ceiling: dict[int, float]

    @property
    def mean_recall(self) -> float:
        """Mean of strict recall@1, 5 and 10 both ways."""
        return sum(sum(by_k.values()) for by_k in self.recall.values()) / (len(WAYS) * len(KS))


def retrieval(images: Tensor, texts: Tensor, reports: Sequence[object], chunk: int = 1024) -> Retrieval:
    """Ranks all reports for each image and all images for each report, by cosine similarity.

    Args:
        images, texts: `[n, dim]`, of length 1; row `i` of both is a study.
        reports: what each study's report reads like; equal entries read alike.
        chunk: rows of the similarity matrix in memory at a time.
    """
    n = len(images)
    numbers: dict[object, int] = {}
    kind = torch.tensor([numbers.setdefault(report, len(numbers)) for report in reports], device=images.device)  # [n]
    alike = torch.bincount(kind)[kind]  # [n], studies whose report reads like this one's, itself included
    first = torch.full((len(numbers),), n, device=images.device)
    first = first.scatter_reduce(0, kind, torch.arange(n, device=images.device), "amin")
    # Reports that read alike get one embedding: a batch of another width leaves differences in the last bits.
    each = texts[first]  # [distinct, dim]
    strict: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    lenient: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    for start in range(0, n, chunk):
        rows = torch.arange(start, min(start + chunk, n), device=images.device)
        scores = (images[rows] @ each.T)[:, kind]  # [c, n]
        own = scores.gather(1, rows[:, None])
        above, level = (scores > own).sum(dim=1), (scores == own).sum(dim=1)
        strict["image_to_text"].append(_expected(above, level))
        lenient["image_to_text"].append(_expected(above, torch.ones_like(level)))

        scores = each[kind[rows]] @ images.T  # [c, n]
        own = scores.gather(1, rows[:, None])
        above, level = (scores > own).sum(dim=1), (scores == own).sum(dim=1)
        strict["text_to_image"].append(_expected(above, level))
        best = scores.masked_fill(kind[rows, None] != kind, -torch.inf).amax(dim=1, keepdim=True)
        lenient["text_to_image"].append(_expected((scores > best).sum(dim=1), torch.ones_like(level)))
    ks = torch.tensor(KS, device=images.device)
    return Retrieval(
        studies=n,
        distinct=len(numbers),
        recall={way: _by_k(torch.cat(found).mean(dim=0)) for way, found in strict.items()},
        recall_alike={way: _by_k(torch.cat(found).mean(dim=0)) for way, found in lenient.items()},
        chance=_by_k((ks / n).clamp(max=1)),
        chance_alike={k: _any_of(alike.tolist(), n, k) for k in KS},
        ceiling=_by_k((ks / alike[:, None]).clamp(max=1).mean(dim=0)),
    )


def _expected(above: Tensor, level: Tensor) -> Tensor:
    """Probability `[c, 3]` to be among the first k, with `above` `[c]` ahead and `level` (itself included) drawing."""
    ks = torch.tensor(KS, device=above.device)
    return ((ks - above[:, None]) / level[:, None]).clamp(0, 1).double()


def _by_k(values: Tensor) -> dict[int, float]:
    return dict(zip(KS, values.tolist(), strict=True))


def _any_of(alike: list[int], n: int, k: int) -> float:
    """Mean chance that at least one of `alike` studies is among the first `k` of `n` in random order."""
    k = min(k, n)
    return sum(times * (1 - comb(n - count, k) / comb(n, k)) for count, times in Counter(alike).items()) / n
