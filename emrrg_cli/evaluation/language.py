"""Language scores of generated reports: BLEU-1 to 4, ROUGE-L, METEOR and CIDEr, through pycocoevalcap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape

from emrrg_cli.console import err
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.evaluation.score_inputs import paired_texts
from emrrg_cli.scoring import meteor as java
from emrrg_cli.scoring.meteor import java_path
from emrrg_cli.scoring.scores import NAMES
from emrrg_cli.vocabulary import BLEU_NAMES, CIDER, METEOR, ROUGE_L, Tokenizer

__all__ = ["METRICS", "Tokenizer", "java_path", "require_java", "score"]


METRICS = NAMES

Texts = Iterable[str] | Iterable[Sequence[str]]

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
    references: Texts | Mapping[Any, str | Sequence[str]],
    hypotheses: Iterable[str] | Mapping[Any, str | Sequence[str]],
    tokenizer: Tokenizer = "whitespace",
    *,
    meteor: bool = True,
) -> dict[str, float | None]:
    """Score generated reports against reference reports.

    BLEU and METEOR are scores of the corpus; ROUGE-L (beta = 1.2) and CIDEr are means over the items. CIDEr weighs
    n-grams by how rare they are among the references given, so that it is 0 for a single item. An empty hypothesis
    counts as wrong; it is not left out.

    Args:
        references: For each item its report, or a list of reports that are all right: a list, column, array or
            generator of them, or a dictionary from ids, as in `{"study1": ["text"]}`.
        hypotheses: For each item the generated report, in the same order; with a dictionary of references, a
            dictionary with the same ids.
        tokenizer: `whitespace` compares the strings as they are, split at white space, as the published scores do;
            `ptb` applies the Penn Treebank tokenizer first, which lower-cases and drops punctuation, and needs Java.
        meteor: Compute METEOR, which needs Java and some seconds to start.

    Returns:
        `BLEU_1` to `BLEU_4`, `ROUGE_L` and `METEOR` from 0 to 1 and `CIDEr` from 0 to 10. `METEOR` is None where it
        was not asked for or cannot run; the reason is printed once on stderr.

    Raises:
        UsageError: Different numbers of items, ids that do not match, no items, an item that is no text, or references
            that are all empty.
        RunError: `ptb` was asked for and Java is missing or fails.

    Source: Chen et al., "Microsoft COCO Captions" (2015), whose evaluation code pycocoevalcap packages.
    """
    if tokenizer not in ("whitespace", "ptb"):
        raise UsageError(f"unknown tokenizer {tokenizer!r}", hint="Choose whitespace or ptb.")
    truth, written = paired_texts(references, hypotheses)
    truth, written = _tokenized(truth, written, tokenizer)
    if not any(text for texts in truth for text in texts):
        raise UsageError("every reference is empty: there is nothing to score against")
    scores: dict[str, float | None] = dict.fromkeys(METRICS)
    scores |= _without_java(truth, written)
    if meteor:
        scores[METEOR] = _meteor(truth, written)
    return scores


def tokenized(
    references: Sequence[str], hypotheses: Sequence[str], tokenizer: Tokenizer
) -> tuple[list[str], list[str]]:
    """Both sides as `score` compares them: words of the tokenizer with single spaces between."""
    truth, written = _tokenized([[text] for text in references], list(hypotheses), tokenizer)
    return [text for (text,) in truth], written


def _tokenized(truth: list[list[str]], written: list[str], tokenizer: Tokenizer) -> tuple[list[list[str]], list[str]]:
    if tokenizer == "ptb":
        return _ptb(truth, written)
    return [[_spaced(text) for text in texts] for texts in truth], [_spaced(text) for text in written]


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
        **dict(zip(BLEU_NAMES, map(float, bleu), strict=True)),
        ROUGE_L: sum(rouge) / len(rouge),
        CIDER: float(cider),
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
