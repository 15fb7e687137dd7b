"""Splits a MIMIC-CXR note into sections.

A note is dictated text broken into short lines. A heading is in capitals at the start of a line and ends in a colon:

     FINAL REPORT
     INDICATION:  ___F with cough.

     FINDINGS:  The lungs are clear.

     IMPRESSION:  No pneumonia.

Headings, their synonyms and the exceptional notes are taken from the section files published with the data set (Johnson
et al., MIMIC-CXR, Scientific Data 2019), so that texts can be compared. There is one difference: if a line has only a
heading, the section files miss a heading on the next line and add its text to the section above; this module reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache

_HEADING = re.compile(r" *([A-Z][A-Z ()/,-]*):(?:\s|$)")

_MEANINGS = {
    "conclusion": "impression",
    "findings and impression": "impression",
    "findings/impression": "impression",
    "finding": "findings",
    "reason for examination": "indication",
    "reason for exam": "indication",
    "clinical indication": "indication",
    "clinical information": "history",
    "pfi": "history",
    "exam": "examination",
    "type of examination": "examination",
    "reference exam": "comparison",
    "recommendation": "recommendations",
    "recommendation(s)": "recommendations",
    "wetread": "wet read",
}
# A heading that contains one of these means the same; the first match counts.
_MAIN = ("impression", "findings", "history", "comparison", "addendum")
# Headings are typed by hand: IMPRESSON, FINDGINGS, COMPARISION.
_MISSPELT = ("impression", "findings", "comparison", "indication")
# The text after the name of an examination, such as PA AND LATERAL VIEWS OF THE CHEST, is its findings.
_EXAMINATION = re.compile(
    r"chest|portable|bone window|ribs|two views|one view|frontal and|lateral and (?:pa|ap)"
    r"|(?:pa|ap) and lat|(?:frontal|pa|ap|lateral) view|frontal (?:semi-)?upright"
)

_CONCLUSIONS = ("findings", "impression")

# Notes whose conclusion is under another heading.
_MISPLACED = {
    50913680: "recommendations", 59363654: "examination", 59279892: "technique", 59768032: "recommendations",
    57936451: "indication", 50058765: "indication", 53356173: "examination", 53202765: "technique",
    50808053: "technique", 51966317: "indication", 50743547: "examination", 56451190: "note",
    59067458: "recommendations", 59215320: "examination", 55124749: "indication", 54365831: "indication",
    59087630: "recommendations", 58157373: "recommendations", 56482935: "recommendations",
    58375018: "recommendations", 54654948: "indication", 55157853: "examination", 51491012: "history",
}  # fmt: skip
# Notes without usable headings: first and last character of the conclusion; 0, 0: there is no conclusion.
_PLACES = {
    50525523: (201, 349), 57564132: (233, 554), 59982525: (313, 717), 53488209: (149, 475), 54875119: (234, 988),
    50196495: (59, 399), 56579911: (59, 218), 52648681: (292, 631), 59889364: (172, 453), 53514462: (73, 377),
    59505494: (59, 450), 53182247: (59, 412), 51410602: (47, 320), 56412866: (522, 822), 54986978: (59, 306),
    59003148: (262, 505), 57150433: (61, 394), 56760320: (219, 457), 59562049: (158, 348), 52674888: (145, 296),
    55258338: (192, 568), 59330497: (140, 655), 52119491: (179, 454),
    58235663: (0, 0), 50798377: (0, 0), 54168089: (0, 0), 53071062: (0, 0), 56724958: (0, 0), 54231141: (0, 0),
    53607029: (0, 0), 52035334: (0, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Note:
    """The sections of a note with their lines joined; "" for a missing section.

    `last_paragraph` is the text after the first paragraph of the last section, if the note has neither findings nor
    impression.
    """

    findings: str = ""
    impression: str = ""
    last_paragraph: str = ""
    indication: str = ""
    comparison: str = ""
    technique: str = ""


def read_note(text: str, study_id: int) -> Note:
    """Reads the sections of a note.

    If several sections have the same meaning, the last one counts; empty findings and impressions are ignored. In the
    exceptional notes of the section files, the conclusion becomes the impression.

    Args:
        text: The note, with its line breaks.
        study_id: Number of the study, as in `s50414267.txt`.
    """
    if study_id in _PLACES:
        start, end = _PLACES[study_id]
        return Note(impression=joined(text[start:end]))
    # The name of the examination as a title, with a colon and nothing after it, is not a findings section.
    sections = [(name, body) for name, body in split_note(text) if name not in _CONCLUSIONS or body.strip()]
    rest = ""
    if not any(name in _CONCLUSIONS for name, _ in sections):
        name, body = sections[-1]
        first, *others = re.split(r"\n\s*\n", body.rstrip())
        sections[-1], rest = (name, first), "\n\n".join(others)
    last = dict(sections)
    note = Note(
        findings=joined(last.get("findings", "")),
        impression=joined(last.get("impression", "")),
        last_paragraph=joined(rest),
        indication=joined(last.get("indication") or last.get("history", "")),
        comparison=joined(last.get("comparison", "")),
        technique=joined(last.get("technique", "")),
    )
    place = _MISPLACED.get(study_id, "")
    if elsewhere := joined(last.get(place, "")):
        # This section is the conclusion, so it is not context too.
        taken = {name: "" for name in ("indication", "technique") if getattr(note, name) == elsewhere}
        return replace(note, impression=elsewhere, last_paragraph="", **taken)
    return note


def split_note(text: str) -> list[tuple[str, str]]:
    """Returns meaning and text of each section, in order; the text before the first heading is the `preamble`."""
    sections: list[tuple[str, list[str]]] = [("preamble", [])]
    for line in text.splitlines():
        match = _HEADING.match(line)
        if match:
            sections.append((_meaning(match[1]), [line[match.end() :]]))
        else:
            sections[-1][1].append(line)
    return [(name, "\n".join(lines)) for name, lines in sections]


@lru_cache(maxsize=10_000)
def _meaning(heading: str) -> str:
    name = re.sub(r"\s*/\s*", "/", " ".join(heading.lower().split()))
    if name in _MEANINGS:
        return _MEANINGS[name]
    for main in _MAIN:
        if main in name:
            return main
    if " " not in name and (close := get_close_matches(name, _MISSPELT, n=1, cutoff=0.8)):
        return close[0]
    return "findings" if _EXAMINATION.search(name) else name


def joined(text: str) -> str:
    """Joins the lines of a paragraph by a space, and paragraphs by a line break."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n".join(filter(None, paragraphs))
