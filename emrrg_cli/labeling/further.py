"""Findings outside CheXpert's 14 observations that chest X-ray reports often name, read by plain phrases.

They are targets of the findings head and words of the prompt (`model.findings_set: extended`), not scores. In the
training reports of IU X-Ray they are as frequent as the 14: degenerative changes in 18 % of the reports, granulomas in
13 %, changes of the aorta in 10 %, hyperinflation in 8 %. Reports rarely name them if they are absent.
"""

from __future__ import annotations

import re
from functools import lru_cache

from emrrg_cli.labeling.events import split_sentences

_PHRASES = {
    "Hyperinflation": r"hyper-?(?:inflat|expan|lucen|aerat|disten)\w*|emphysem\w*|copd"
    r"|flatten\w+ (?:of )?(?:the )?(?:\w+ )?(?:hemi-?)?diaphragm\w*|obstructive (?:pulmonary|lung)",
    "Low Lung Volumes": r"low lung volumes?|hypo-?(?:inflat|expan|aerat|ventilat)\w*|(?:shallow|poor) inspir\w+"
    r"|(?:decreased|reduced|small|low|diminished) (?:lung )?volumes?",
    "Granuloma": r"granulom\w*|calcified (?:\w+ ){0,3}nod(?:e|ul)\w*|histoplasm\w*",
    "Degenerative Change": r"degenerat\w*|osteophyt\w*|spondyl\w*|osteoarthr\w*|arthritic|spur\w*"
    r"|arthro(?:sis|path\w+)",
    "Spinal Curvature": r"\w*scolio\w*|kypho\w*|curvature",
    "Aortic Change": r"tortuo\w*|ectat\w*|uncoil\w*|unfold\w*|atherosclero\w*|aort\w* (?:\w+ ){0,2}calcif\w*"
    r"|calcif\w+ (?:\w+ ){0,3}aort\w*",
    "Hiatal Hernia": r"hernia\w*",
    "Surgical Change": r"post-?(?:operative|surgical)\w*|sternotomy|cabg|mastectomy|cholecystectomy|resection",
    "Elevated Diaphragm": r"eventrat\w*|elevat\w+ (?:\w+ ){0,3}(?:hemi-?)?diaphragm\w*"
    r"|diaphragm\w* (?:\w+ ){0,2}elevat\w*",
}
FURTHER_FINDINGS = tuple(_PHRASES)
_PATTERNS = {name: re.compile(rf"\b(?:{phrases})") for name, phrases in _PHRASES.items()}
_ABSENT = re.compile(r"\b(?:no|without|negative|free|not|nor)\b(?! (?:\w+ )?change)")


def further_findings(text: str) -> set[str]:
    """Returns which of `FURTHER_FINDINGS` a report names, except those after a negation in the same sentence.

    Args:
        text: A report in English, raw or cleaned.
    """
    return {name for sentence in split_sentences(text) for name in _read_sentence(sentence)}


@lru_cache(maxsize=65_536)
def _read_sentence(sentence: str) -> tuple[str, ...]:
    found = ((name, pattern.search(sentence)) for name, pattern in _PATTERNS.items())
    return tuple(name for name, match in found if match and not _ABSENT.search(sentence, 0, match.start()))
