"""The only table of the names of views and their projections."""

from __future__ import annotations

import re

from emrrg_cli.console import printable
from emrrg_cli.vocabulary import LATERAL_VIEW, UNKNOWN_VIEW, VIEW_TOKENS, Projection

# Terms of DICOM's View Position (PS3.3 C.8.1.1) and of MIMIC-CXR, and words. The beam decides: in a decubitus film on
# the left or right side, it goes from front to back, so the film is frontal; if the patient lies on the back or the
# front, it goes from side to side. `POSTERO` and `ANTERO` begin `postero-anterior` and its reverse.
_OBLIQUE = {"OBLIQUE", "OBL", "LAO", "RAO", "LPO", "RPO", "LLO", "RLO", "SWIMMERS", "SWIMMER"}
_DECUBITUS_ON_A_SIDE = {"LLD", "RLD"}
_FROM_THE_SIDE = {"DORSAL", "VENTRAL", "SUPINE", "PRONE", "CROSS", "TABLE", "XTABLE", "CROSSTABLE", "HORIZONTAL"}
_FRONTAL = {
    *("PA", "AP", "FRONTAL", "POSTEROANTERIOR", "ANTEROPOSTERIOR", "POSTERO", "ANTERO", "LORDOTIC"),
    *("POSTERIOR", "ANTERIOR"),
}
_IN_PATH = re.compile(r"/view\d+_(frontal|lateral)\.\w+$")
_LATERAL = {"LATERAL", "LAT", "LL", "RL", "L", "LLAT", "RLAT", "XTABLE", "CROSSTABLE", "LATEROMEDIAL", "MEDIOLATERAL"}


def projection(view: str) -> Projection:
    """Returns the projection of a view by its name; the order of the words does not matter.

    - A name with any word for oblique is oblique: `LAO`, `LEFT ANTERIOR OBLIQUE`, `RLO`.
    - Decubitus (`LLD`, `LATERAL DECUBITUS`, `DECUB LEFT`) is frontal, unless it is dorsal, ventral or cross-table.
    - Otherwise the first known word decides: `PA`, `AP AXIAL` frontal; `LL`, `XTABLE LATERAL` lateral.
    - A name without such a word is `unknown`.
    """
    words = [word for word in re.split(r"[^A-Z]+", view.upper()) if word]
    if any(word in _OBLIQUE for word in words):
        return "oblique"
    if any(word in _DECUBITUS_ON_A_SIDE for word in words):
        return "frontal"
    if any("DECUB" in word for word in words):
        return "lateral" if any(word in _FROM_THE_SIDE for word in words) else "frontal"
    for word in words:
        if word in _FRONTAL:
            return "frontal"
        if word in _LATERAL:
            return "lateral"
    return "unknown"


def view_token(view: str) -> int:
    """Returns the index into `VIEW_TOKENS` of a view by its name."""
    found = projection(view)
    return VIEW_TOKENS.index(found) if found in VIEW_TOKENS else 0


def view_of_path(path: str) -> str:
    """Returns the view in the name of a file, such as CheXpert's `view1_frontal.jpg`; "" if it has none."""
    match = _IN_PATH.search(path.replace("\\", "/"))
    return view_name(match[1]) if match else ""


def view_name(text: str) -> str:
    """Returns a view as datasets store it: upper case; `LATERAL` for all lateral views; `unknown` for an empty text.

    Args:
        text: As a source or DICOM's View Position writes it: `PA`, `AP`, `LL`, `Lateral`, `Frontal`.
    """
    view = " ".join(printable(text.strip()).upper().split())
    return LATERAL_VIEW if projection(view) == "lateral" else view or UNKNOWN_VIEW
