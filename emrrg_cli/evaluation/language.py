"""Language scores of generated reports: BLEU-1 to BLEU-4, ROUGE-L, METEOR and CIDEr, computed by pycocoevalcap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.markup import escape

from emrrg_cli.console import err
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.evaluation.score_inputs import paired_texts
from emrrg_cli.scoring import meteor as java
from emrrg_cli.scoring.comparison import Corpus
from emrrg_cli.scoring.scores import NAMES, RougeL
from emrrg_cli.vocabulary import BLEU_NAMES, CIDER, METEOR, ROUGE_L, Tokenizer

Texts = Iterable[str] | Iterable[Sequence[str]]

_NO_PTB = "the ptb tokenizer needs Java"
_NO_PTB_HINT = "Install a Java runtime (8 or newer), or use the whitespace tokenizer (evaluation.tokenizer=whitespace)."

# Reasons already printed; evaluation after every epoch does not repeat them.
_warned: set[str] = set()


def require_java(tokenizer: Tokenizer, *, meteor: bool = False) -> None:
    """Checks before long work that `score` will find Java if it needs it.

    Args:
        tokenizer: The tokenizer that `score` will use.
        meteor: METEOR is required, for example because the best checkpoint is chosen by it.

    Raises:
        RunError: Java is not found, and `ptb` or METEOR needs it.
    """
    if java.java_path() is not None:
        return
    if tokenizer == "ptb":
        raise RunError(f"{_NO_PTB}: {java.MISSING}", hint=_NO_PTB_HINT)
    if meteor:
        raise RunError(
            f"the score METEOR needs Java: {java.MISSING}",
            hint="Install a Java runtime (8 or newer), or select by other scores (train.score_weights).",
        )


def score(
    references: Texts | Mapping[Any, str | Sequence[str]],
    hypotheses: Iterable[str] | Mapping[Any, str | Sequence[str]],
    tokenizer: Tokenizer = "whitespace",
    *,
    meteor: bool = True,
) -> dict[str, float | None]:
    """Scores generated reports against reference reports.

    BLEU and METEOR are computed over the corpus; ROUGE-L (beta = 1.2) and CIDEr are means over the items. CIDEr
    weights n-grams by how rare they are among the given references, so it is 0 for a single item. An empty hypothesis
    is scored as wrong, not skipped.

    Args:
        references: One report for each item, or a list of equally correct reports. Takes a list, column, array or
            generator, or a dictionary with ids, as in `{"study1": ["text"]}`.
        hypotheses: One generated report for each item, in the same order. If the references are a dictionary, a
            dictionary with the same ids.
        tokenizer: `whitespace` splits the unchanged strings at white space, as published scores do. `ptb` applies the
            Penn Treebank tokenizer, which lower-cases, removes punctuation, and needs Java.
        meteor: Compute METEOR, which needs Java and a few seconds to start.

    Returns:
        `BLEU_1` to `BLEU_4`, `ROUGE_L` and `METEOR` from 0 to 1, and `CIDEr` from 0 to 10. `METEOR` is None if it was
        not requested or cannot run; in the second case the reason is printed once on stderr.

    Raises:
        UsageError: The numbers of items or the ids differ, there are no items, an item is not a text, or all
            references are empty.
        RunError: The tokenizer is `ptb`, and Java is missing or fails.

    Source: Chen et al., "Microsoft COCO Captions" (2015), whose evaluation code pycocoevalcap packages.
    """
    if tokenizer not in ("whitespace", "ptb"):
        raise UsageError(f"unknown tokenizer {tokenizer!r}", hint="Choose whitespace or ptb.")
    truth, written = paired_texts(references, hypotheses)
    truth, written = _tokenized(truth, written, tokenizer)
    scores: dict[str, float | None] = dict.fromkeys(NAMES)
    scores |= _without_java(truth, written)
    if meteor:
        scores[METEOR] = _meteor(truth, written)
    return scores


def tokenized(
    references: Sequence[str], hypotheses: Sequence[str], tokenizer: Tokenizer
) -> tuple[list[str], list[str]]:
    """Returns references and hypotheses as `score` compares them: tokens separated by spaces.

    Raises:
        UsageError: There are references, and all are empty.
        RunError: The tokenizer is `ptb`, and Java is missing or fails.
    """
    truth, written = _tokenized([[text] for text in references], list(hypotheses), tokenizer)
    return [text for (text,) in truth], written


def _tokenized(truth: list[list[str]], written: list[str], tokenizer: Tokenizer) -> tuple[list[list[str]], list[str]]:
    if tokenizer == "ptb":
        truth, written = _ptb(truth, written)
    else:
        truth, written = [[_spaced(text) for text in texts] for texts in truth], [_spaced(text) for text in written]
    if truth and not any(text for texts in truth for text in texts):
        raise UsageError("every reference is empty, so there is nothing to compare with")
    return truth, written


def _spaced(text: str) -> str:
    """Joins the words by single spaces if they are separated by other white space than spaces.

    pycocoevalcap splits at any white space for BLEU and CIDEr, and at each single space for ROUGE-L. A text with
    spaces alone is left as it is, also with two in sequence, so that ROUGE-L equals the published one.
    """
    words = text.split()
    if not words:
        return ""
    return text if sum(map(len, words)) + text.count(" ") == len(text) else " ".join(words)


def _ptb(truth: list[list[str]], written: list[str]) -> tuple[list[list[str]], list[str]]:
    try:
        tokens = iter(java.ptb_tokenize([*(text for texts in truth for text in texts), *written]))
    except java.JavaFailure as failure:
        raise RunError(f"{_NO_PTB}: {failure}", hint=_NO_PTB_HINT) from failure
    return [[next(tokens) for _ in texts] for texts in truth], list(tokens)


def _without_java(truth: list[list[str]], written: list[str]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    gts = dict(enumerate(truth))
    res = {index: [text] for index, text in enumerate(written)}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    cider, _ = Cider().compute_score(gts, res)
    return {
        **dict(zip(BLEU_NAMES, map(float, bleu), strict=True)),
        ROUGE_L: _rouge_l(truth, written),
        CIDER: float(cider),
    }


def _rouge_l(truth: list[list[str]], written: list[str]) -> float:
    """Returns pycocoevalcap's ROUGE-L, without its table, a terabyte for two texts of a million characters.

    Two empty texts have 0, not 1. The best precision and the best recall may be those of different references.
    """
    texts = [(reference, text) for references, text in zip(truth, written, strict=True) for reference in references]
    pairs = Corpus(()).compare(*zip(*texts, strict=True))
    starts = np.cumsum([0, *map(len, truth[:-1])])
    best = (np.maximum.reduceat(ratio, starts) for ratio in RougeL().ratios(pairs))
    return float(RougeL().values(*best).mean())


def _meteor(truth: list[list[str]], written: list[str]) -> float | None:
    try:
        return java.meteor(truth, written)
    except java.JavaFailure as failure:
        reason = str(failure)
        if reason not in _warned:
            _warned.add(reason)
            err.print(f"[yellow]METEOR is skipped:[/] {escape(reason)}", soft_wrap=True)
        return None
