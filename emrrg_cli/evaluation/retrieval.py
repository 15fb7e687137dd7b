"""Retrieval of reports by image and of images by report: recall@k in both directions.

Several studies can have the same report. The report then does not identify the study, and two definitions of a hit
are common:

- strict (`recall`): only the study itself. Equal reports are tied; the expectation over random tie-breaking counts.
- lenient (`recall_lenient`): any study with the same report.
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
    """Recall over `studies` pairs, by direction (`image_to_text`, `text_to_image`) and `k`, each from 0 to 1.

    Attributes:
        studies: Number of studies.
        distinct: Number of different reports.
        recall: Strict recall.
        recall_lenient: Lenient recall.
        chance: Expected strict recall of a random order, the same in both directions.
        chance_lenient: Expected lenient recall of a random order, the same in both directions.
        ceiling: Highest possible strict recall; below 1 if several studies have the same report.
    """

    studies: int
    distinct: int
    recall: dict[str, dict[int, float]]
    recall_lenient: dict[str, dict[int, float]]
    chance: dict[int, float]
    chance_lenient: dict[int, float]
    ceiling: dict[int, float]

    @property
    def mean_recall(self) -> float:
        """Mean of strict recall@1, @5 and @10 in both directions."""
        return sum(sum(by_k.values()) for by_k in self.recall.values()) / (len(WAYS) * len(KS))


def retrieval(images: Tensor, texts: Tensor, reports: Sequence[object], chunk: int = 1024) -> Retrieval:
    """Ranks all reports for each image and all images for each report, by cosine similarity.

    Args:
        images: Image embeddings `[n, dim]`, L2-normalised.
        texts: Report embeddings `[n, dim]`, L2-normalised; row `i` belongs to the same study as row `i` of `images`.
        reports: The report of each study, or any value that is equal for equal reports.
        chunk: Number of rows of the similarity matrix in memory at a time.
    """
    n = len(images)
    numbers: dict[object, int] = {}
    kind = torch.tensor([numbers.setdefault(report, len(numbers)) for report in reports], device=images.device)  # [n]
    copies = torch.bincount(kind)[kind]  # [n], number of studies with the same report, including this one
    first = torch.full((len(numbers),), n, device=images.device)
    first = first.scatter_reduce(0, kind, torch.arange(n, device=images.device), "amin")
    # Equal reports share one embedding, because embeddings from batches of different width differ in the last bits.
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
        recall_lenient={way: _by_k(torch.cat(found).mean(dim=0)) for way, found in lenient.items()},
        chance=_by_k((ks / n).clamp(max=1)),
        chance_lenient={k: _any_of(copies.tolist(), n, k) for k in KS},
        ceiling=_by_k((ks / copies[:, None]).clamp(max=1).mean(dim=0)),
    )


def _expected(above: Tensor, level: Tensor) -> Tensor:
    """Returns the probability `[c, 3]` of a rank up to k, with `above` `[c]` better items and `level` `[c]` tied ones.

    `level` includes the item itself.
    """
    ks = torch.tensor(KS, device=above.device)
    return ((ks - above[:, None]) / level[:, None]).clamp(0, 1).double()


def _by_k(values: Tensor) -> dict[int, float]:
    return dict(zip(KS, values.tolist(), strict=True))


def _any_of(copies: list[int], n: int, k: int) -> float:
    """Returns the mean probability that a random order of `n` has one of `copies` equal studies among the first `k`."""
    k = min(k, n)
    return sum(times * (1 - comb(n - count, k) / comb(n, k)) for count, times in Counter(copies).items()) / n
