"""Language scores of generated reports: BLEU-1 to 4, ROUGE-L, METEOR and CIDEr, through pycocoevalcap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.markup import escape

from emrrg_cli.console import err
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.evaluation import meteor as java
from emrrg_cli.evaluation.meteor import java_path

__all__ = ["METRICS", "Tokenizer", "java_path", "require_java", "score"]

Tokenizer = Literal["whitespace", "ptb"]

METRICS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "METEOR", "CIDEr")

_NO_PTB = "the ptb tokenizer needs Java"
_NO_PTB_HINT = "Install a Java runtime (8 or newer), or use the whitespace tokenizer (evaluation.tokenizer=whitespace)."

# Reasons already told, so that a loop over epochs does not repeat them.
_warned: set[str] = set()


def require_java(tokenizer: Tokenizer, *, meteor: bool = False) -> None:
    """Says before long work, rather than at its end, that `score` will want a Java that is not there.

    Args:
        tokenizer: the one that `score` will be given.
        meteor: METEOR must not be None, as where a choice between models depends on it.

    Raises:
        RunError: no Java launcher is found, and `ptb` or METEOR needs it.
    """
    if java_path() is not None:
        return
    if tokenizer == "ptb":
        raise RunError(f"{_NO_PTB}: {java.MISSING}", hint=_NO_PTB_HINT)
    if meteor:
        raise RunError(
            f"the score METEOR needs Java: {java.MISSING}",
            hint="Install a Java runtime (8 or newer), or choose by other scores (train.score_weights).",
        )


def score(
    references: Sequence[str] | Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    tokenizer: Tokenizer = "whitespace",
    *,
    meteor: bool = True,
) -> dict[str, float | None]:
    """Score generated reports against reference reports.

    BLEU and METEOR are scores of the corpus; ROUGE-L (beta = 1.2) and CIDEr are means over the items. CIDEr weighs
    n-grams by how rare they are among the references given, so that it is 0 for a single item. An empty hypothesis
    counts as wrong; it is not left out.

    Args:
        references: For each item its report, or a list of reports that are all right.
        hypotheses: For each item the generated report, in the same order.
        tokenizer: `whitespace` compares the strings as they are, split at white space, as the published scores do;
            `ptb` applies the Penn Treebank tokenizer first, which lower-cases and drops punctuation, and needs Java.
        meteor: Compute METEOR, which needs Java and some seconds to start.

    Returns:
        `BLEU_1` to `BLEU_4`, `ROUGE_L` and `METEOR` from 0 to 1 and `CIDEr` from 0 to 10. `METEOR` is None where it
        was not asked for or cannot run; the reason is printed once on stderr.

    Raises:
        UsageError: Different numbers of items, no items, an item that is no text, or references that are all empty.
        RunError: `ptb` was asked for and Java is missing or fails.

    Source: Chen et al., "Microsoft COCO Captions" (2015), whose evaluation code pycocoevalcap packages.
    """
    if tokenizer not in ("whitespace", "ptb"):
        raise UsageError(f"unknown tokenizer {tokenizer!r}", hint="Choose whitespace or ptb.")
    truth, written = _checked(references, hypotheses)
    if tokenizer == "ptb":
        truth, written = _ptb(truth, written)
    else:
        truth = [[_spaced(text) for text in texts] for texts in truth]
        written = [_spaced(text) for text in written]
    if not any(text for texts in truth for text in texts):
        raise UsageError("every reference is empty: there is nothing to score against")
    scores: dict[str, float | None] = dict.fromkeys(METRICS)
    scores |= _without_java(truth, written)
    if meteor:
        scores["METEOR"] = _meteor(truth, written)
    return scores


def _checked(
    references: Sequence[str] | Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """References as lists, both sides checked, so that a mistake names the item and not a line of a library."""
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise UsageError("references and hypotheses must be lists of texts, not one text")
    if len(references) != len(hypotheses):
        raise UsageError(f"{len(references)} references for {len(hypotheses)} hypotheses: one of each is needed")
    if not hypotheses:
        raise UsageError("there is nothing to score: no references and no hypotheses")
    truth: list[list[str]] = []
    for index, (texts, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        if not isinstance(hypothesis, str):
            raise UsageError(f"hypothesis {index} is not a text but {type(hypothesis).__name__}")
        items = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Sequence) else []
        if not items or not all(isinstance(text, str) for text in items):
            raise UsageError(f"reference {index} must be a text or a list of texts with at least one entry")
        truth.append(items)
    return truth, list(hypotheses)


def _spaced(text: str) -> str:
    """The same words with single spaces: ROUGE-L splits at each space, the others at any white space."""
    return " ".join(text.split())


def _ptb(truth: list[list[str]], written: list[str]) -> tuple[list[list[str]], list[str]]:
    try:
        tokens = iter(java.ptb_tokenize([*(text for texts in truth for text in texts), *written]))
    except java.JavaFailure as failure:
        raise RunError(f"{_NO_PTB}: {failure}", hint=_NO_PTB_HINT) from failure
    return [[next(tokens) for _ in texts] for texts in truth], list(tokens)


def _without_java(truth: list[list[str]], written: list[str]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts = dict(enumerate(truth))
    res = {index: [text] for index, text in enumerate(written)}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    _, rouge = Rouge().compute_score(gts, res)
    cider, _ = Cider().compute_score(gts, res)
    # Two empty strings have an empty word in common there, which would count as a perfect report.
    rouge = [float(value) if text else 0.0 for value, text in zip(rouge, written, strict=True)]
    return {
        **{f"BLEU_{n}": float(value) for n, value in enumerate(bleu, start=1)},
        "ROUGE_L": sum(rouge) / len(rouge),
        "CIDEr": float(cider),
    }


def _meteor(truth: list[list[str]], written: list[str]) -> float | None:
    try:
        return java.meteor(truth, written)
    except java.JavaFailure as failure:
        reason = str(failure)
        if reason not in _warned:
            _warned.add(reason)
            err.print(f"[yellow]METEOR is left out:[/] {escape(reason)}", soft_wrap=True)
        return None
