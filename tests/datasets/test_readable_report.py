"""Reports as people read them."""

from __future__ import annotations

import pytest

from emrrg_cli.datasets.report_text import clean_report, readable_report


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the heart is normal . no effusion .", "The heart is normal. No effusion."),
        (" .", ""),
        ("", ""),
        ("clear lungs . . no effusion .", "Clear lungs. No effusion."),
        ("The PA view , e.g. here .", "The PA view, e.g. here."),
        ("a 1.2 cm nodule : stable ( old ) .", "A 1.2 cm nodule: stable ( old)."),
        ("is there an effusion ? no .", "Is there an effusion? No."),
    ],
)
def test_sentences_have_capitals_and_joined_points(text: str, shown: str) -> None:
    assert readable_report(text) == shown


def test_a_cleaned_report_reads_like_the_raw_one() -> None:
    raw = "Heart size is normal. Lungs are clear. No effusion."
    assert readable_report(clean_report(raw, "r2gen-iu")) == raw
