"""Sections of MIMIC-CXR notes: headings, their meanings, what stands in for them, the notes that follow no rule."""

from __future__ import annotations

import pytest

from emrrg_cli.ingest.sources.mimic_note import Note, read_note, split_note


def _note(*lines: str) -> str:
    return "\n ".join(("                                 FINAL REPORT", *lines)) + "\n"


def test_the_usual_note() -> None:
    text = _note(
        "EXAMINATION:  CHEST (PA AND LAT)", "", "INDICATION:  ___F with cough  // ? pneumonia", "",
        "TECHNIQUE:  Chest PA and lateral", "", "COMPARISON:  ___.", "", "FINDINGS: ", "", "The lungs are clear.  The",
        "heart is not enlarged.", "", "No effusion.", "", "IMPRESSION:  No acute", "disease.",
    )  # fmt: skip
    assert read_note(text, 1) == Note(
        findings="The lungs are clear. The heart is not enlarged.\nNo effusion.",
        impression="No acute disease.",
        indication="___F with cough // ? pneumonia",
        comparison="___.",
        technique="Chest PA and lateral",
    )
    assert [name for name, _ in split_note(text)] == [
        "preamble", "examination", "indication", "technique", "comparison", "findings", "impression",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("heading", "section"),
    [
        ("IMPRESSION", "impression"),
        ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("FINDINGS/ IMPRESSION", "impression"),
        ("FINAL IMPRESSION", "impression"),
        ("IMPRESSON", "impression"),
        ("IMPRSSION", "impression"),
        ("FINDING", "findings"),
        ("FINDGINGS", "findings"),
        ("FINIDNGS", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PA AND LATERAL VIEWS OF THE CHEST", "findings"),
        ("PORTABLE AP UPRIGHT", "findings"),
        ("AP AND LATERAL", "findings"),
        ("CHEST (PORTABLE AP)", "findings"),
        ("COMPARISION", "comparison"),
        ("REFERENCE EXAM", "comparison"),
        ("CLINICAL HISTORY", "history"),
        ("CLINICAL INFORMATION", "history"),
        ("PFI", "history"),
        ("REASON FOR EXAM", "indication"),
        ("INDICATIONS", "indication"),
        ("EXAMINATION", "examination"),
        ("TYPE OF EXAMINATION", "examination"),
        ("RECOMMENDATION(S)", "recommendations"),
        ("WETREAD", "wet read"),
        ("ADDENDUM", "addendum"),
        ("NOTIFICATION", "notification"),
        ("TECHNIQUE", "technique"),
    ],
)
def test_meanings_of_headings(heading: str, section: str) -> None:
    assert [name for name, _ in split_note(_note(f"{heading}:  Text."))] == ["preamble", section]


@pytest.mark.parametrize(
    "line",
    ["Findings: not in capitals.", "The IMPRESSION: is not at the start.", "IMPRESSION without a colon",
     "TIME 10:30, no heading.", "1. FINDINGS: a number before."],
)  # fmt: skip
def test_lines_that_are_not_headings(line: str) -> None:
    assert [name for name, _ in split_note(_note("INDICATION:  Cough.", line))] == ["preamble", "indication"]


@pytest.mark.parametrize("indent", ["", " ", "  ", "   "])
def test_headings_may_be_indented(indent: str) -> None:
    # The section files' own expression takes any number of spaces into the name, and strips it.
    text = _note("INDICATION:  Cough.", f"{indent}FINDINGS:", "The lungs are clear.", f"{indent}IMPRESSION:  Nothing.")
    assert read_note(text, 1) == Note("The lungs are clear.", "Nothing.", indication="Cough.")


def test_the_last_non_empty_section_counts() -> None:
    text = _note("IMPRESSION:  First.", "", "FINDINGS:  Old.", "", "IMPRESSION:  Second.", "", "CHEST, TWO VIEWS:", "")
    assert read_note(text, 1) == Note(findings="Old.", impression="Second.")
    # A title like a finding, with nothing of its own.
    text = _note("CHEST, PA LATERAL:", "", "INDICATION:  Cough.", "", "FINDINGS:  Clear.")
    assert read_note(text, 1) == Note(findings="Clear.", indication="Cough.")


def test_headings_on_consecutive_lines() -> None:
    text = _note("INDICATION:", "FINDINGS:", "Clear.", "IMPRESSION:", "Normal.")
    assert read_note(text, 1) == Note(findings="Clear.", impression="Normal.")


def test_the_last_paragraphs_replace_missing_findings() -> None:
    text = _note("CHEST RADIOGRAPH", "", "INDICATION:  Cough, ___.", "", "COMPARISON:  ___.", "",
                 "As compared to the previous radiograph, no", "change.", "", "No effusion.")  # fmt: skip
    assert read_note(text, 1) == Note(
        last_paragraph="As compared to the previous radiograph, no change.\nNo effusion.",
        indication="Cough, ___.",
        comparison="___.",
    )
    # A finding that is only a title, at the end, is not the last section.
    text = _note("HISTORY: ", "", "Fall.", "", "No fracture.", "", "CHEST, TWO VIEWS: ", "")
    assert read_note(text, 1) == Note(last_paragraph="Fall.\nNo fracture.")
    # Without any heading: what follows the title.
    assert read_note(_note("", "Clear lungs."), 1) == Note(last_paragraph="Clear lungs.")
    assert read_note(_note("Clear lungs."), 1) == Note()
    assert read_note(_note("INDICATION:  Cough."), 1) == Note(indication="Cough.")
    assert read_note("", 1) == Note()


def test_history_replaces_a_missing_indication() -> None:
    assert read_note(_note("HISTORY:  Fall.", "FINDINGS:  Clear."), 1).indication == "Fall."
    assert read_note(_note("HISTORY:  Fall.", "INDICATION:  Pain.", "FINDINGS:  Clear."), 1).indication == "Pain."


def test_notes_with_their_conclusion_elsewhere() -> None:
    text = _note("INDICATION:  Cough.", "", "RECOMMENDATION(S):  Follow-up of the nodule.")
    moved = _note("INDICATION:  Stable nodule, no effusion.", "", "TECHNIQUE:  Chest PA.")
    assert read_note(moved, 57936451) == Note(impression="Stable nodule, no effusion.", technique="Chest PA.")
    assert read_note(text, 50913680).impression == "Follow-up of the nodule."
    assert read_note(text, 50913681) == Note(indication="Cough.")
    # Once more by its place in the text, and the notes that have none.
    text = " " * 201 + "Stable " + "x" * 200
    assert read_note(text, 50525523) == Note(impression="Stable " + "x" * 141)
    assert read_note(_note("FINDINGS:  A wrong exam."), 58235663) == Note()


def test_line_ends_of_any_system() -> None:
    text = _note("FINDINGS:", "", "Clear.", "IMPRESSION:  Normal.")
    for end in ("\r\n", "\r"):
        assert read_note(text.replace("\n", end), 1) == read_note(text, 1)
