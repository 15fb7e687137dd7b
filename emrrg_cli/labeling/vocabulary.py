"""Phrases that mention an observation, and organs whose state ("enlarged", "clear") gives a label.

Patterns are lower case and match whole words. `XXXX` replaces a removed word in IU X-Ray, often "angle" or "vessels".
The misspellings occur in real reports. The assignment follows `policy`.
"""

from __future__ import annotations

_LOBE = r"(?:(?:left|right|upper|middle|lower|both|the) ){0,6}(?:lungs?|lobes?|lingula)"

# Matched first: phrases that look like a finding but are not.
NOISE: tuple[str, ...] = (
    r"pericardial (?:fat|effusions?)(?: or (?:pleural )?thickening)?",
    r"(?:soft[- ]tissue|laryngeal|subcutaneous|peripheral|leg|pedal|arm|facial|bone marrow) (?:o?edema"
    r"|swelling|infection)",
    r"o?edema of the (?:\w+ ){0,2}(?:soft tissues?|legs?|arms?|larynx|extremit\w+)",
    r"(?:mediastinal|breast|thyroid|soft[- ]tissue|neck|abdominal|hilar|chest wall|paratracheal"
    r"|adrenal|renal) (?:mass(?:es)?|nodules?|lesions?)",
    r"(?:thyroid|breast|prostate|colon|renal|skin) (?:cancer|carcinoma|malignancy|tumou?r)",
    r"body mass|mass effect|mass index|nipple shadows?(?: or nodules?)?",
    r"(?:bone|bony|osseous|metallic|metal|calcific|fat|contrast|barium|vascular"
    r"|soft[- ]tissue) (?:mineral )?(?:densit\w+|opaci\w+)",
    r"(?:demineralization|decreased bone) density|density of the bones?",
    r"(?:vertebra\w*|spin\w*|disc|disk)(?: body)? collapsed?|collapsed? (?:of )?(?:the |a )?(?:\w+ )?vertebra\w*",
    r"(?:pelvic|hip|femoral|wrist|ankle|foot|finger|knee|tibial) fractures?"
    r"|(?:impacted |displaced |and |rotated ){0,6}(?:subcapital )?fractures? (?:through|of|involving"
    r"|at) (?:\w+ ){0,4}?(?:femur|hip|scaphoid|metacarpal|wrist|ankle|tibia|fibula|pelvis|radius)"
    r"|subcapital fractures?",
    r"bone scars?|surgical scar\w*|skin scar\w*|valvular calcif\w+",
    r"nodal calcif\w+|nodular calcif\w+ of the (?:hil\w+|mediastin\w+)",
    r"lung volumes?|pleural lines?|(?:lung|septal|b|fissure|skin|azygos)[ -]lines?"
    r"|breast (?:implants?|prosthes[ie]s)|nipple markers?|lead point|heart valve calcif\w+"
    r"|valve calcif\w+",
    r"(?:ekg|ecg) leads? artifacts?|in line with|line of sight|costal cartilages?",
    r"(?:mid ?line|in ?line|air bronchograms?)",
)

# (observations, patterns): mentions that count with any certainty.
MENTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Support Devices",),
        (
            r"(?:catheter|lead|wire|screw|rod|plate)s? (?:is |are |has )?(?:fractur\w*|broken)"
            r"|(?:fractured|broken|fractures? of(?: the)?) (?:\w+ ){0,3}?(?:leads?|wires?|screws?|rods?"
            r"|catheters?|sternotomy)",
        ),
    ),
    (("Pneumothorax", "Pleural Effusion"), (r"hydro-?pneumothora\w*|ha?emo-?pneumothora\w*",)),
    (
        ("Pneumothorax",),
        (r"p[ne]{1,2}umoth?[or]+a?[rtx]\w*|pneumothoax|pneumo-?thora\w*|ptx|pleural (?:or )?air(?: collections?)?",),
    ),
    (
        ("Pleural Effusion",),
        (
            r"(?:pleural |subpulmonic )?eff?u[sd]\w*n\w*|pleural fusion",
            r"(?:pleural|fissural|intrafissural)(?: \w+)? fluid(?: collections?)?",
            r"fluid (?:with)?in the (?:\w+ )?(?:\w+ )?(?:pleura\w*|fissures?|costophrenic)",
            r"ha?emothora\w*|hydrothora\w*|empyemas?",
        ),
    ),
    (
        ("Lung Lesion",),
        (
            r"nodular(?:[ -]\w+)? (?:opaci\w*|densit\w*|infiltrat\w*|lesions?|airspace disease)",
            r"nod(?:u|lu)l\w*|mass(?:es)?|mass-?like \w+|micronodul\w*",
            r"(?:lung|pulmonary|cavitary|cavitating|spiculated|parenchymal|suspicious) lesions?"
            r"|cavit(?:ary|ation)\w*",
            r"neoplas\w*|carcinoma\w*|tumou?rs?|malignan\w*|metasta\w*|(?:lung |bronchogenic )?cancer|lumps?",
        ),
    ),
    (
        ("Pleural Other",),
        (
            r"pleur\w+(?:[ -](?:based|parenchymal|and|or|apical|fluid|parenchyma|pericardial|calcified"
            r"|surface)){0,2}[ -](?:thick\w*|plaques?|plaquing|scar\w*|calcif\w*|fibro\w*|reaction|nodularity"
            r"|disease|irregularit\w*)",
            r"(?:calcif\w+|thicken\w+) (?:of |along )?(?:the )?(?:\w+ )?(?:pleura\w*|plaques?|fissures?)",
            r"(?:apical|apex)(?: pleural)? (?:cap\w*|thick\w+)|(?:fissur\w+|pleuroparenchymal) thick\w+",
            r"thick\w+ of (?:the )?(?:\w+ ){0,3}fissures?|fibrothorax|pleuroparenchymal \w+",
        ),
    ),
    (("Consolidation",), (r"consoli\w*",)),
    (
        ("Pneumonia",),
        (r"(?:broncho-?)?pn[eu]{1,2}m[ou]nia\w*|pneumonitis|pneumonic|infecti\w*|superinfection",),
    ),
    (("Atelectasis",), (r"at[ea]l[ea]c?t\w*|atelec\w*|collaps(?:e|ed)",)),
    (
        ("Edema",),
        (
            r"o?edemat?o?u?s?|chf|(?:congestive )?(?:heart|cardiac) failure|(?:cardiac )?decompensation",
            r"(?:(?:central|pulmonary|vascular|venous|perihilar|hilar|mild) ){0,6}congesti(?:on|ve)(?: (?:changes?"
            r"|failure))?",
            r"(?:vascular|venous|vessels?|vasculature|vascularity|pulmonary) (?:engorgement|redistribution"
            r"|prominence|indistinctness|cephalization|fullness)"
            r"|(?:prominence|engorgement|indistinctness|redistribution) of (?:the )?(?:central |pulmonary "
            r"|perihilar ){0,6}vascul\w+"
            r"|cephalization",
            r"(?:fluid|volume) overload\w*|kerley(?: b)? lines?",
        ),
    ),
    (
        ("Cardiomegaly",),
        (r"(?:bi-?ventricular |left ventricular |right ventricular )?card[io]*m[eo]g\w*", r"megacardia"),
    ),
    (
        ("Lung Opacity",),
        (
            r"(?:hazy |ill-defined |patchy |air-?space |air space |interstitial |alveolar ){0,6}opaci\w*",
            r"densit(?:y|ies)|infil\w*|air[ -]?space (?:dis\w+|process\w*|changes?|filling)|hazy|haziness|haze",
            r"interstitial (?:lung |pulmonary )?(?:diseases?|changes?|thick\w+|prominence|pattern|process\w*"
            r"|abnormalit\w+|fibro\w*|infiltrat\w*)"
            r"|(?:prominent|increased) interstiti\w+",
            r"(?:lung |pulmonary |parenchymal )?(?:scar(?:s|ring|red)?|fibro(?:sis|tic|nodular)(?: changes?)?)",
            r"reticul\w*(?:[- ]nodul\w*)?|cicatri\w+|stranding|ground[- ]glass|honeycomb\w*"
            r"|bronchiectasis with scarring",
            r"(?:peri)?-?bronch\w+ (?:wall )?(?:thick\w+|cuffing)|shadowing",
        ),
    ),
    (
        ("Fracture",),
        (
            r"(?:(?:rib|compression|old|healed|prior|remote|previous|clavic\w+) ){0,6}fractur\w*|fx"
            r"|broken (?:\d|(?:\w+ )?(?:ribs?|bones?|clavicles?))\w*|frx",
        ),
    ),
    (
        ("Support Devices",),
        (
            r"(?:picc|central|venous|subclavian|jugular|ij|cvc|midline|arterial"
            r"|cv)(?: venous)?(?: \w+)?[ -](?:lines?|catheters?|access)"
            r"|picc|lines?(?= (?:and|or) tubes?)|lines|(?:left|right) ij",
            r"(?:endotracheal|et|ng|nasogastric|enteric|feeding|tracheostomy|chest|thoracostomy|dobhoff"
            r"|orogastric|drainage|gastric)[ -]?(?:tubes?|drains?)"
            r"|tubes?|tubing|tracheostomy(?: cannula)?|pigtail",
            r"(?:\w*-?catheters?|cath|port-?a-?cath\w*|mediports?|chest ports?|infusion ports?|power ?port"
            r"|port|xxxx-a-xxxx|(?:chest|injection|infusion) xxxx(?= (?:\w+ ){0,8}?(?:tip|svc|vena)))",
            r"pace-?makers?|pacers?|pacing|aicd|icd|defibrillat\w+|stimulat\w+|generators?|leads?|loop recorder",
            r"(?:valve|valvular|aortic|mitral) (?:replacements?|prosthes\w+)|prosthe\w+"
            r"|(?:artificial|mechanical|aortic|mitral|heart|cardiac) valves?|annuloplasty|stents?"
            r"|grafts? markers?|cabg markers?|filter|shunt",
            r"(?:sternal|sternotomy|cerclage|median sternotomy) (?:xxxx|wires?|sutures?)|wires?|sutures?"
            r"|(?:surgical|cabg|vascular|cholecystectomy|metallic|bypass)? ?clips?|staples?"
            r"|(?:suture|staple) (?:lines?|material)",
            # Not plate-like atelectasis.
            r"hardware|arthroplast\w+"
            r"|(?:orthopedic |fixation |surgical )?(?:plates?(?![- ]like)|screws?|rods?|anchors?)"
            r"|(?:spine|spinal) fusion|internal fixation|septal occluder|neurostimulat\w+|surgical xxxx"
            r"|(?:surgical|posterior|anterior|cervical) fusion|surgical instruments?|embolization coils?"
            r"|coils?",
            r"(?:support|medical|implanted|monitoring|cardiac|assist|electronic) (?:devices?|apparatus)"
            r"|devices?|lvad|balloon pump|cannulas?|drains?|lap-?band|gastric band\w*|reservoir|electrodes?"
            r"|implants?",
        ),
    ),
)

# General findings: only their absence labels an observation ("no acute bony abnormality").
ABSENCES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Fracture",),
        (
            r"(?:bony|bone|osseous|skeletal|rib)(?: (?:structures?|thorax))? (?:abnormalit\w*|find\w+|injur\w+"
            r"|process\w*)",
        ),
    ),
    (("Pleural Effusion", "Pneumothorax"), (r"pleural (?:abnormalit\w*|process\w*)",)),
    (("Lung Opacity",), (r"(?:lung|pulmonary|parenchymal) (?:parenchymal )?abnormalit\w*",)),
)

_HEART = r"(?:heart|cardiac|cardio-?pericardial)"

# Organs; the predicates of `cues` give their state.
ORGANS: dict[str, tuple[str, ...]] = {
    "heart_and_mediastinum": (
        r"(?:cardio-?mediastin\w+|heart mediastin\w+|cardiac mediastinal)(?: silhouettes?| contours?| size)?",
    ),
    "heart": (rf"{_HEART}(?: (?:silhouettes?|size|shadow|contours?|xxxx|borders?))*", r"cardiac and"),
    "mediastinum": (
        r"(?:superior |upper )?mediastin(?:um|al)(?: (?:silhouettes?|contours?|structures?|xxxx|size|width))*",
    ),
    "vessels": (
        r"(?:pulmonary )?vascular engorgement(?= appears? with)"
        r"|(?:central |pulmonary |hilar ){0,6}(?:vascula\w+|vessels?)(?: (?:markings?|pattern|structures?"
        r"|pedicle))?"
        r"|pulmonary (?:xxxx|venous|veins?)|vascular margins?",
    ),
    "markings": (
        r"(?:interstitial|lung|pulmonary|broncho-?vascular|interstitium)(?: lung)? markings|markings|interstitium",
    ),
    "lungs": (rf"{_LOBE}(?: (?:fields?|bases?|apices|xxxx|parenchyma))?", r"pulmonary parenchyma|lung zones"),
    "pleural_spaces": (r"pleural (?:spaces?|cavit\w+|surfaces?)",),
    "costophrenic_angles": (
        r"(?:costo-?phrenic|costovertebral|cp|costodiaphragmatic)(?: (?:angles?|xxxx|sulc\w+|recess\w*"
        r"|sinus\w*))?"
        r"|sulc(?:us|i)",
    ),
    "bones": (
        r"(?:bony|osseous|skeletal)(?: (?:structures?|thorax|elements?|xxxx))+|skeleton|bones|ribs"
        r"|(?:bony|osseous) (?:chest|rib) (?:cage|wall)",
    ),
}

# organ -> {state: the labels it gives}
STATES: dict[str, dict[str, dict[str, str]]] = {
    "heart": {
        "normal": {"Cardiomegaly": "negative"},
        "large": {"Cardiomegaly": "positive"},
        "borderline": {"Cardiomegaly": "uncertain"},
    },
    "mediastinum": {
        "normal": {"Enlarged Cardiomediastinum": "negative"},
        "large": {"Enlarged Cardiomediastinum": "positive"},
        "prominent": {"Enlarged Cardiomediastinum": "positive"},
        "borderline": {"Enlarged Cardiomediastinum": "uncertain"},
    },
    "vessels": {
        "normal": {"Edema": "negative"},
        "prominent": {"Edema": "positive"},
        "congested": {"Edema": "positive"},
    },
    "markings": {
        "normal": {"Lung Opacity": "negative"},
        "prominent": {"Lung Opacity": "positive"},
        "large": {"Lung Opacity": "positive"},
        "abnormal": {"Lung Opacity": "positive"},
    },
    "lungs": {
        "normal": {"Lung Opacity": "negative", "Consolidation": "negative"},
        "clear": {"Lung Opacity": "negative", "Consolidation": "negative"},
    },
    "pleural_spaces": {
        "normal": {"Pleural Effusion": "negative", "Pneumothorax": "negative"},
        "clear": {"Pleural Effusion": "negative", "Pneumothorax": "negative"},
        "blunted": {"Pleural Effusion": "uncertain"},
    },
    "costophrenic_angles": {
        "normal": {"Pleural Effusion": "negative"},
        "clear": {"Pleural Effusion": "negative"},
        "blunted": {"Pleural Effusion": "uncertain"},
    },
    "bones": {
        "normal": {"Fracture": "negative"},
        "clear": {"Fracture": "negative"},
    },
}
STATES["heart"]["prominent"] = STATES["heart"]["large"]
STATES["heart_and_mediastinum"] = {
    state: STATES["heart"][state] | STATES["mediastinum"][state]
    for state in ("normal", "large", "prominent", "borderline")
}
