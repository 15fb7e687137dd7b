"""Cue words around findings: negation, doubt, history, requests, the states of organs, and the end of a scope.

Source: NegEx (Chapman et al., 2001), which has cues, their direction, and words that end their scope.
"""

from __future__ import annotations

_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|visible|evident|present|demonstrated|appreciated|noted|detected"
    r"|observed|found|suspected|apparent|shown|recogni[sz]ed|discerned|felt|redemonstrated|suggested)"
)
_ADVERB = (
    r"(?:(?:definitely|clearly|definitively|well|currently|significantly|again|also|otherwise|entirely"
    r"|completely|fully|totally|readily|now|grossly|radiographically) ){0,6}"
)
_EXCLUDE = r"(?:excluded?|exclusion|ruled out|rule out)"

# In order of priority: the first pattern that matches at a position wins.
CUES: tuple[tuple[str, str], ...] = (
    # Looks like a negation but is not; ends the scope of an earlier negation.
    (
        "affirm",
        r"not (?:entirely |completely )?without|not only"
        r"|no (?:\w+ ){0,2}?(?:change|changes|increase|progression|worsening|improvement)(?: (?:in|of"
        r"|since|from|to))?"
        r"|without (?:\w+ ){0,2}?(?:change|improvement)(?: of)?"
        r"|not (?:\w+ ){0,2}?(?:changed|resolved|cleared)"
        r"|(?:partial(?:ly)?|nearly|almost|mostly|incomplete(?:ly)?)(?: (?:complete(?:ly)?))? (?:resol\w+"
        r"|clear\w+)",
    ),
    # Doubt about the words before or after it.
    (
        "doubt_around",
        r"(?:can ?not|can't|cannot|could not|not|difficult to|hard to|unable to)(?: (?:be|to"
        rf"|been))? {_ADVERB}{_EXCLUDE}"
        r"|(?:may|might|could|can)(?: (?:also|still))?(?: be)? (?:present|persist|considered|exist)"
        r"|(?:is|are|remains?|be|as) (?:also )?(?:a )?(?:possible|possibilit\w+|suspected|questioned"
        r"|questionable|conceivable|considered)"
        r"|(?:is|are|be) (?:a |also a |another )?(?:consideration|concern|possibility)"
        r"|(?:is|are) in the differential|less likely",
    ),
    # Absence of the findings before it.
    (
        "absent_before",
        rf"(?:not|never)(?: been| be)? {_ADVERB}{_SEEN}"
        rf"|no longer(?: {_ADVERB}{_SEEN}|(?! (?:any|an?|the|evidence|signs?)\b))"
        r"|absent"
        r"|unlikely(?! to)|excluded|ruled out"
        r"|(?:not|less) (?:felt |thought )?(?:to be )?(?:likely|suspected)|none|(?:is|are|:) negative"
        r"|doubtful",
    ),
    # Absence of the findings on either side: "has resolved", "resolved effusion", "resolution of the effusion".
    (
        "resolved",
        r"(?:completely |interval |near ){0,6}(?:resolved|resolution(?: of)?|cleared|clearance of|clearing of)",
    ),
    ("removed", r"(?:interval )?(?:removed|removal(?: of)?|explanted|withdrawn)"),
    # Requests and limitations: the words after it are not findings.
    (
        "ignore",
        r"(?:evaluat\w+|assess\w*|correlat\w+|sensitivity|examin\w+|look|looking|screen\w*"
        r"|workup)(?: \w+){0,2}? (?:for|of)"
        r"|rule out|r/o|to (?:exclude|rule out|ensure|document|confirm|evaluate|assess)"
        r"|(?:if|given|clinical) (?:there )?(?:is )?(?:\w+ )?(?:concern|suspicion|suspect\w*)(?: (?:for"
        r"|of))?"
        r"|obscur(?:e|es|ing)|detecti\w+|until|if (?:\w+ )?(?:symptoms|suspected)",
    ),
    (
        "history",
        r"(?:known )?(?:past )?(?:history|hx|h/o)(?: (?:of|includes?))?|h/o|status[- ]?post|s/p|treated"
        r"|treatment (?:of|for)",
    ),
    # Absence of the findings after it.
    (
        "absent",
        r"no longer|no|without|not|negative for|absence of|lack of|free (?:of|from)|clear (?:of|from)|neither|nor"
        r"|rather than|cannot see|un ?likely to (?:be|represent)|denies|fails? to|non|excludes?|w/o",
    ),
    # Doubt about the findings after it.
    (
        "doubt",
        r"may|might|could|can(?= (?:be|represent|also|reflect))|possibl[ey]|possibilit\w+|questionabl[ey]"
        r"|question(?: of)?|query|suspicious|suspected|suspect|suspicion|suggest\w*|concern\w*|worrisome"
        r"|equivocal|potential(?:ly)?|perhaps|maybe|borderline|differential|consider(?:ed|ation)?|cannot"
        r"|indicat(?:e|es|ing|ive)|vague|rais\w+",
    ),
    ("versus", r"versus|vs\.?"),
    ("or", r"(?:and ?/? ?)?or"),
    ("and", r"and|as well as"),
    # End of a clause.
    (
        "stop",
        r"but|however|although|though|except|aside from|apart from|other than|yet|while|whereas|which"
        r"|there (?:is|are|has|have)|there's"
        r"|with(?<!consistent with)(?<!compatible with)(?<!associated with)(?<!comparison with)(?! respect)"
        r"|otherwise|status|despite|because|since|please|recommend\w*|then"
        r"|(?:this|these)(?= (?:is|are|may))|additionally",
    ),
    ("present", rf"(?:is|are|was|were|has been|have been) {_ADVERB}{_SEEN}"),
    ("verb", r"is|are|was|were|has|have|appears?|remains?|demonstrates?|shows?"),
    # Words that begin a new statement if the comma is missing, as in cleaned reports; `weak` ones may also be inside a
    # list ("no effusion, small pneumothorax or consolidation").
    (
        "strong",
        r"mild(?:ly)?|minimal(?:ly)?|stable|unchanged|persistent|residual|scattered|chronic|calcified"
        r"|increased|increasing|improved|degenerative|old|healed|likely|probabl[ey]|tortuous|low|again"
        r"|(?:the|this)(?! (?:or|and))",
    ),
    (
        "weak",
        r"small|tiny|trace|moderate(?:ly)?|bilateral|left|right|bibasilar|a|an|mid",
    ),
)

STATES: tuple[tuple[str, str], ...] = (
    (
        "borderline",
        r"(?:at )?borderline(?: (?:to )?(?:mild(?:ly)?|in size))?(?: (?:enlarged|enlargement(?: of)?|large"
        r"|prominent))?"
        r"|(?:(?:near|at|within|the) ){0,6}(?:upper|top)(?: limits?)?(?: of)? normal(?: (?:in"
        r"|for) size)? (?:or|to) (?:(?:mild|slight|borderline|minimal)(?:ly)? ){0,6}(?:enlarged|large"
        r"|cardiomegaly)",
    ),
    (
        "normal",
        r"(?:within |at |near |towards? |the ){0,6}(?:high|upper"
        r"|top)(?: limits?)?(?: of)?(?: the)? ?-?normal\w*(?: limits)?"
        r"|(?:with)?in (?:normal |the ){0,6}limits(?: of normal)?|within normal \w+"
        r"|normal(?:ly)?(?: (?:in|for|limits|size|and))?|unremarkable|non-?enlarged|nonenlarged|intact"
        r"|preserved|maintained|wnl|limits of normal",
    ),
    (
        "large",
        r"(?:(?:mild|moderate|marked|severe|slight|gross|mass|massive)(?:ly)? )?(?:enlarg\w+|large|big"
        r"|widen\w*|wide|dilat\w+|globular|increase(?:d)?(?= in (?:the )?(?:heart|cardiac|size))"
        r"|increased in size)",
    ),
    (
        "prominent",
        r"promin\w+|increased|increase|accentuat\w+|coarse\w*|thicken\w+|indistinct\w*|diffuse increase"
        r"|crowd\w+(?= and prom)|full(?:ness)?",
    ),
    ("abnormal", r"irregular\w*|abnormal"),
    ("congested", r"congest\w+|engorg\w+|redistribut\w+|cephali\w+|ill-?defined|distended|plethora"),
    ("blunted", r"blunt\w*|obliterat\w+"),
    ("clear", r"clear(?! (?:of|from))|sharp(?:ly)?|well[- ]aerated|free(?! (?:of|from))"),
    (
        "other",
        r"(?:hyper|hypo|under|over|well|poorly|normally)?[- ]?(?:inflat\w+|expan\w+|aerat\w+)|low|tortuous"
        r"|ectatic|calcif\w+|shift\w*|degenerat\w+|deviat\w+|obscured|elevated|hyperlucen\w+|emphysema\w*"
        r"|midline|volumes?|osteo\w+|atheroscl\w+",
    ),
)

NORMAL_REPORT = (
    r"\b(?:normal|unremarkable|clear|negative|intact|stable chest|within (?:normal )?limits"
    r"|no (?:\w+ ){0,2}?(?:acute|active|evidence|significant|abnormalit\w+|disease|find\w+))\b"
)
