"""Recall both ways, against a literal ranking, also where reports read alike."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emrrg_cli.evaluation.retrieval import KS, retrieval


def embeddings(n: int, noise: float, reports: list[str], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(n, 8, generator=generator), dim=1)
    texts = F.normalize(images + noise * torch.randn(n, 8, generator=generator), dim=1)
    for i, report in enumerate(reports):  # reports that read alike are embedded alike
        texts[i] = texts[reports.index(report)]
    return images, texts


def literal(images: Tensor, texts: Tensor, reports: list[str], k: int, *, alike: bool) -> tuple[float, float]:
    """Sorts every list, ties in random order, many times over."""
    n, draws = len(images), 400
    rng = random.Random(0)
    hits = [0, 0]
    for i in range(n):
        for way, scores in enumerate(((texts @ images[i]).tolist(), (images @ texts[i]).tolist())):
            if way == 0:
                scores = [scores[reports.index(report)] for report in reports]
            for _ in range(draws):
                order = sorted(range(n), key=lambda j: (-scores[j], rng.random()))[:k]
                found = any(reports[j] == reports[i] for j in order) if alike else i in order
                hits[way] += found
    return hits[0] / n / draws, hits[1] / n / draws


REPORTS = [*"abcdefghij", *"aaab", *"kk"]


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_recall_is_that_of_a_literal_ranking(chunk: int) -> None:
    images, texts = embeddings(16, 1.0, REPORTS)
    found = retrieval(images, texts, REPORTS, chunk)
    assert (found.studies, found.distinct) == (16, 11)
    for k in KS:
        strict = found.recall["image_to_text"][k], found.recall["text_to_image"][k]
        assert strict == pytest.approx(literal(images, texts, REPORTS, k, alike=False), abs=0.02)
        lenient = found.recall_lenient["image_to_text"][k], found.recall_lenient["text_to_image"][k]
        assert lenient == pytest.approx(literal(images, texts, REPORTS, k, alike=True), abs=0.02)
    assert 0.05 < found.recall["image_to_text"][1] < found.recall_lenient["image_to_text"][1] < 0.95
    every = [found.recall[way][k] for way in found.recall for k in KS]
    assert found.mean_recall == pytest.approx(sum(every) / 6)


def test_perfect_embeddings_reach_the_ceiling_and_no_more() -> None:
    images, texts = embeddings(16, 0.0, REPORTS)
    for i, report in enumerate(REPORTS):  # images of reports that read alike beside each other
        images[i] = F.normalize(images[REPORTS.index(report)] + 1e-3 * images[i], dim=0)
    found = retrieval(images, texts, REPORTS)
    assert found.recall_lenient["image_to_text"] == found.recall_lenient["text_to_image"] == dict.fromkeys(KS, 1.0)
    # a: 4 studies, b and k: 2 each, 8 alone.
    assert found.ceiling == pytest.approx({1: (1 + 1 + 1 + 8) / 16, 5: 1.0, 10: 1.0})
    assert found.recall["image_to_text"] == pytest.approx(found.ceiling)
    assert found.recall["text_to_image"] == pytest.approx(found.ceiling)
    alone = retrieval(images[:8], texts[:8], REPORTS[:8])
    assert alone.ceiling == dict.fromkeys(KS, 1.0)


def test_chance_is_the_mean_over_all_orders() -> None:
    reports = list("aabcde")
    found = retrieval(*embeddings(6, 1.0, reports), reports)
    orders = list(itertools.permutations(range(6)))
    for k in KS:
        strict = [i in order[:k] for order in orders for i in range(6)]
        lenient = [any(reports[j] == reports[i] for j in order[:k]) for order in orders for i in range(6)]
        assert found.chance[k] == pytest.approx(sum(strict) / len(strict))
        assert found.chance_lenient[k] == pytest.approx(sum(lenient) / len(lenient))


def test_rounding_does_not_rank_equal_reports() -> None:
    images, texts = embeddings(16, 0.0, REPORTS)
    shaken = texts + 1e-7 * torch.randn(texts.shape, generator=torch.Generator().manual_seed(1))
    found, again = retrieval(images, texts, REPORTS), retrieval(images, shaken, REPORTS)
    assert again.recall["image_to_text"] == found.recall["image_to_text"]


def test_many_studies_of_one_report() -> None:
    n = 3000
    images, texts = embeddings(n, 1.0, [])
    found = retrieval(images, texts, ["normal"] * n)
    assert found.distinct == 1
    assert found.recall["image_to_text"][1] == pytest.approx(1 / n)
    assert found.chance_lenient == dict.fromkeys(KS, 1.0)
