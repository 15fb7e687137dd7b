"""R2Gen's cleaning, by hand and against a second transcription of the rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from emrrg_cli.datasets.report_text import clean_report, cleaning_for, select_section
from emrrg_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " ."),
        ("   ", " ."),
        ("The heart is normal. No effusion.", "the heart is normal . no effusion ."),
        # Three passes of ".." -> ".": 8 stops become 4, 2, 1.
        ("Clear........ Heart normal.", "clear . heart normal ."),
        # 9 stops become 5, 3, 2; those two are then punctuation of the sentence "Clear." and its end.
        ("Clear......... Heart", "clear . heart ."),
        ("1. Normal heart. 2. Clear lungs. 3. No effusion.", "normal heart . clear lungs . no effusion ."),
        # " 2. " without a stop before it starts a sentence.
        ("Normal heart 2. Clear lungs", "normal heart . clear lungs ."),
        # "1. " goes wherever it stands, so " 11. " leaves " 1" and loses its sentence end.
        ("Stable 11. Clear", "stable 1clear ."),
        # ". 6. " is not in the rule: it is a sentence of its own.
        ("Heart normal. 6. Clear", "heart normal . 6 . clear ."),
        # Quotes go before the strip, punctuation after it, so only the second leaves a space at the front.
        ('Clear. " a', "clear . a ."),
        ("Clear. ? a", "clear .  a ."),
        # An empty sentence stays.
        ("Clear. . Heart", "clear .  . heart ."),
        ("Size: 5 < 6 > 4 = @ end", "size 5  6  4   end ."),
        (
            "T-spine (mild) [old] {x} a/b c\\d it's 50% & more; yes! 2^3 a_b a+b *",
            "t-spine mild old x ab cd its 50  more yes 23 ab ab  .",
        ),
        ("Line one.\nLine two.", "line one\nline two ."),
    ],
)
def test_iu_by_hand(text: str, expected: str) -> None:
    assert clean_report(text, "r2gen-iu") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " ."),
        ("\n \n", " ."),
        ("FINDINGS:\n The heart\nis  normal.", "findings : the heart is normal ."),
        ("Impression: clear", "impression : clear ."),
        # "FINDINGS:\n\n1. Clear" -> "FINDINGS: 1. Clear" -> "FINDINGS: Clear"
        ("FINDINGS:\n\n1. Clear.\n2. Normal.", "findings : clear . normal ."),
        # Underscores are halved seven times and the last one is punctuation; the spaces around it are not joined again.
        ("Comparison to ____ , unchanged", "comparison to   unchanged ."),
        # The range of the other variant: here < = > @ stay.
        ("5 < 6 = @", "5 < 6 = @ ."),
        # Eight passes halve 256 stops to one. Six passes halve 64 spaces to one, and 65 to two.
        ("a" + "." * 256 + " b", "a . b ."),
        ("a" + " " * 64 + "b", "a b ."),
        ("a" + " " * 65 + "b", "a  b ."),
    ],
)
def test_mimic_by_hand(text: str, expected: str) -> None:
    assert clean_report(text, "r2gen-mimic") == expected


def test_none_keeps_the_text() -> None:
    assert clean_report("  Heart: NORMAL.. 2. Clear \n", "none") == "Heart: NORMAL.. 2. Clear"


def test_unknown_style_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown cleaning style 'r2gen'") as error:
        clean_report("x", "r2gen")
    assert "r2gen-mimic" in str(error.value)


def _transcribed(text: str, iu: bool) -> str:
    """The rule once more, written as one chain of replacements and two regular expressions."""
    if iu:
        text = text.replace("..", ".").replace("..", ".").replace("..", ".")
    else:
        text = text.replace("\n", " ")
        text = text.replace("__", "_").replace("__", "_").replace("__", "_").replace("__", "_")
        text = text.replace("__", "_").replace("__", "_").replace("__", "_")
        text = text.replace("  ", " ").replace("  ", " ").replace("  ", " ")
        text = text.replace("  ", " ").replace("  ", " ").replace("  ", " ")
        text = text.replace("..", ".").replace("..", ".").replace("..", ".").replace("..", ".")
        text = text.replace("..", ".").replace("..", ".").replace("..", ".").replace("..", ".")
    text = text.replace("1. ", "")
    text = text.replace(". 2. ", ". ").replace(". 3. ", ". ").replace(". 4. ", ". ").replace(". 5. ", ". ")
    text = text.replace(" 2. ", ". ").replace(" 3. ", ". ").replace(" 4. ", ". ").replace(" 5. ", ". ")
    if not iu:
        text = text.replace(":", " :")
    delete = r"[.,?;*!%^&_+()\[\]{}:<=>@]" if iu else r"[.,?;*!%^&_+()\[\]{}]"
    cleaned = [re.sub(delete, "", re.sub(r"[\"/\\']", "", part).strip()) for part in text.strip().lower().split(". ")]
    return " . ".join(cleaned) + " ."


@pytest.mark.parametrize("folder", ["iu_text", "covid_chestxray"])
def test_equals_the_transcription_on_real_reports(shared_data: Path, folder: str) -> None:
    annotation = json.loads((shared_data / folder / "annotation.json").read_text())
    reports = [row["report"] for rows in annotation.values() for row in rows]
    assert len(reports) == {"iu_text": 2955, "covid_chestxray": 371}[folder]
    for report in reports:
        assert clean_report(report, "r2gen-iu") == _transcribed(report, iu=True)
        assert clean_report(report, "r2gen-mimic") == _transcribed(report, iu=False)


def test_equals_the_transcription_on_invented_reports() -> None:
    pieces = ["..", "1. ", " 2. ", ". 3. ", ". ", "__", "  ", "\n", ":", "<", "[", '"', "/", "A", "é", "-", "5. ", "?"]
    state = 1
    for _ in range(3000):
        text = ""
        for _ in range(12):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            text += pieces[(state >> 16) % len(pieces)]
        assert clean_report(text, "r2gen-iu") == _transcribed(text, iu=True), repr(text)
        assert clean_report(text, "r2gen-mimic") == _transcribed(text, iu=False), repr(text)


def test_cleaning_for() -> None:
    assert cleaning_for("iu_xray", "auto") == "r2gen-iu"
    assert cleaning_for("mimic_cxr", "auto") == "r2gen-mimic"
    assert cleaning_for("", "auto") == "r2gen-mimic"
    assert cleaning_for("iu_xray", "none") == "none"
    with pytest.raises(UsageError, match="unknown cleaning 'iu'"):
        cleaning_for("iu_xray", "iu")


def test_select_section() -> None:
    row = {"report": "R", "findings": "F.", "impression": "I."}
    assert [select_section(row, name) for name in ("report", "findings", "impression", "both")] == [
        "R", "F.", "I.", "F. I.",
    ]  # fmt: skip
    assert select_section({"report": None}, "report") == ""
    assert select_section({}, "both") == ""
    assert select_section({"findings": None, "impression": "I."}, "both") == "I."
    assert select_section({"findings": "F.", "impression": "  "}, "both") == "F."
    with pytest.raises(UsageError, match="unknown section"):
        select_section(row, "history")
