"""Hard sentences, their labels fixed from the written policy before the labeler existed.

The first version of the labeler read 60 of the 60 development and 59 of the 60 held-out sentences right. One author
wrote policy, sentences and labeler, so this says that the labeler follows its policy, not that it reads any report.
"""

from __future__ import annotations

from types import ModuleType

import pytest

from emrrg_cli.labeling import label_report

_SIGNS = {"positive": "+", "negative": "-", "uncertain": "?"}


def _wrong(sentences: tuple[tuple[str, str], ...], codes: dict[str, str]) -> list[str]:
    """Sentences read differently than fixed, with what was read."""
    wrong = []
    for text, expected in sentences:
        labels = label_report(text)
        read = {code + _SIGNS[label] for code, name in codes.items() if (label := labels[name])}
        if read != set(expected.split()):
            wrong.append(f"{text} Expected {expected!r}, read {sorted(read)}")
    return wrong


@pytest.mark.parametrize(("part", "allowed"), [("DEVELOPMENT", 0), ("HELD_OUT", 5)])
def test_read_as_the_policy_says(hard_sentences: ModuleType, part: str, allowed: int) -> None:
    sentences = getattr(hard_sentences, part)
    assert len(sentences) == 60
    wrong = _wrong(sentences, hard_sentences.CODES)
    assert len(wrong) <= allowed, "\n".join(wrong)


def test_parts_share_no_sentence(hard_sentences: ModuleType) -> None:
    texts = [text for text, _ in hard_sentences.DEVELOPMENT + hard_sentences.HELD_OUT]
    assert len(set(texts)) == 120
