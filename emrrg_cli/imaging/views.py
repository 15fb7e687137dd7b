"""The names of projections."""

from __future__ import annotations

from emrrg_cli.console import printable
from emrrg_cli.vocabulary import UNKNOWN_VIEW

_LATERAL = ("LL", "RL", "L", "LAT")


def view_name(text: str) -> str:
    """A projection as datasets write it: upper case; `LATERAL` for either side; `unknown` for an empty text.

    Args:
        text: As a source or DICOM's View Position writes it: `PA`, `AP`, `LL`, `Lateral`, `Frontal`.
    """
    view = printable(text.strip()).upper()
    lateral = view in _LATERAL or view.startswith("LATERAL") or view.endswith(" LATERAL")
    return "LATERAL" if lateral else view or UNKNOWN_VIEW
