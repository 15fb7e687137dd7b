"""Statistics of pairs, and the scores made of their sums, against pycocoevalcap called directly."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.evaluation.language import score
from emrrg_cli.scoring import scores as registry
from emrrg_cli.scoring.comparison import Corpus

WORDS = [
    "the",
    "lungs",
    "are",
    "clear",
    ".",
    "heart",
    "size",
    "is",
    "normal",
    "no",
    "effusion",
    "left",
    "right",
    "small",
]


def _texts(seed: int, count: int = 60) -> tuple[list[str], list[str]]:
    """Random reports of 0 to 30 words, many of them repeated within one report and between reports."""
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(count)]
    written = [draw.choice([*made, " ".join(draw.choices(WORDS, k=draw.randrange(1, 30)))]) for _ in made]
    written[3], written[7] = "", made[7]
    return made, written


def _pycocoevalcap(references: list[str], hypotheses: list[str]) -> dict[str, Any]:
    """Corpus scores, and ROUGE-L and CIDEr of each item."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {i: [text] for i, text in enumerate(references)}
    written = {i: [text] for i, text in enumerate(hypotheses)}
    bleu, _ = Bleu(4).compute_score(truth, written, verbose=0)
    _, rouge = Rouge().compute_score(truth, written)
    cider, each = Cider().compute_score(truth, written)
    return {"bleu": bleu, "rouge": rouge, "cider": cider, "each": each}


def _check(references: list[str], hypotheses: list[str]) -> None:
    wanted = _pycocoevalcap(references, hypotheses)
    pairs = Corpus(references).compare(references, hypotheses)
    bleu, rouge, cider = registry.Bleu(), registry.RougeL(), registry.Cider()
    assert bleu.combine(bleu.statistics(pairs).sum(axis=0), len(pairs)) == pytest.approx(wanted["bleu"], abs=1e-9)
    assert rouge.statistics(pairs)[:, 0] == pytest.approx(np.array(wanted["rouge"]), abs=1e-9)
    assert cider.statistics(pairs)[:, 0] == pytest.approx(np.array(wanted["each"]), abs=1e-9)
    mean = cider.combine(cider.statistics(pairs).sum(axis=0), len(pairs))
    assert mean == pytest.approx([wanted["cider"]], abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_sums_equal_pycocoevalcap(seed: int) -> None:
    _check(*_texts(seed))


def test_dealt_reports_equal_pycocoevalcap() -> None:
    references, hypotheses = _texts(9)
    order = np.random.default_rng(0).permutation(len(references))
    dealt = [hypotheses[i] for i in order]
    corpus = Corpus(references)
    corpus.compare(references, hypotheses)  # texts seen before change nothing
    cider = registry.Cider().statistics(corpus.compare(references, dealt))[:, 0]
    assert cider == pytest.approx(np.array(_pycocoevalcap(references, dealt)["each"]), abs=1e-9)


@pytest.mark.slow
def test_the_590_iu_pairs_equal_pycocoevalcap(shared_data: Path) -> None:
    rows = json.loads((shared_data / "iu_text" / "annotation.json").read_text())
    test, train = (
        # R2Gen's cleaning leaves two spaces in sequence in some, of which ROUGE-L counts the empty word.
        [clean_report(row["report"], "r2gen-iu") for row in rows[name]]
        for name in ("test", "train")
    )
    draw = random.Random(0)
    written = [draw.choice(train) for _ in test]
    assert any("  " in text for text in (*test, *written))
    _check(test, written)
    wanted, found = _pycocoevalcap(test, written), score(test, written, meteor=False)
    assert found["ROUGE_L"] == pytest.approx(np.mean(wanted["rouge"]), abs=1e-12)
    assert found["CIDEr"] == pytest.approx(wanted["cider"], abs=1e-12)
    assert [found[f"BLEU_{n}"] for n in range(1, 5)] == pytest.approx(wanted["bleu"], abs=1e-12)


def test_spaces_in_sequence_count_as_in_pycocoevalcap() -> None:
    references, hypotheses = _texts(3)
    draw = random.Random(3)
    more = [[text.replace(" ", draw.choice([" ", "  ", "   "])) for text in side] for side in (references, hypotheses)]
    more[1][5], more[0][6] = f" {more[1][5]}", f"{more[0][6]} "
    _check(*more)
    found, wanted = score(*more, meteor=False), _pycocoevalcap(*more)
    assert found["ROUGE_L"] == pytest.approx(np.mean(wanted["rouge"]), abs=1e-12)
    lines = [[text.replace(" ", "\n") for text in side] for side in more]  # other white space: words
    joined = [[" ".join(text.split()) for text in side] for side in more]
    assert score(*lines, meteor=False) == score(*joined, meteor=False)


def test_matches_of_all_pairs_are_those_of_each_pair() -> None:
    texts = [
        "the heart is large .",
        "the the the heart . the heart",
        "clear .",
        "",
        "the heart is large . no effusion .",
    ]
    pairs = [(truth, text) for text in texts for truth in texts]
    compared = Corpus(texts).compare([truth for truth, _ in pairs], [text for _, text in pairs])
    assert np.array_equal(Corpus(()).matches(texts), compared.matches.reshape(5, 5, 4))
