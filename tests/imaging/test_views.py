"""The one vocabulary of views."""

from __future__ import annotations

import pytest

from emrrg_cli.imaging.views import projection, view_name

FRONTAL = ("PA", "AP", "ap", "Frontal", "AP LLD", "LLD", "RLD", "PA RLD", "AP AXIAL", "LORDOTIC", "postero-anterior",
           "Lateral decubitus", "DECUBITUS LATERAL LEFT", "Left lateral decub", "LAT DECUB", "DECUB", "Decub. right",
           "LEFT LATERAL DECUBITUS", "R lat decub", "AP erect", "LATDECUB",
           "LEFTDECUBITUS")  # fmt: skip
LATERAL = ("LL", "RL", "L", "Lateral", "LAT", "left lateral", "XTABLE LATERAL", "Cross-table lateral",
           "dorsal decubitus", "VENTRAL DECUBITUS", "lateral, left", "Cross table decubitus",
           "decubitus, dorsal", "X-table decubitus")  # fmt: skip
OBLIQUE = ("LAO", "RAO", "LPO", "RPO", "LLO", "RLO", "Oblique", "Left anterior oblique", "lateral oblique",
           "SWIMMERS")  # fmt: skip
UNKNOWN = ("", "unknown", "ERECT", "4", "CHEST")


@pytest.mark.parametrize(
    ("view", "kind"),
    [
        *((view, "frontal") for view in FRONTAL),
        *((view, "lateral") for view in LATERAL),
        *((view, "oblique") for view in OBLIQUE),
        *((view, "unknown") for view in UNKNOWN),
    ],
)
def test_projection(view: str, kind: str) -> None:
    assert projection(view) == kind
    assert projection(view_name(view)) == kind


def test_view_name() -> None:
    assert view_name(" lld ") == "LLD"
    assert view_name("Lateral  decubitus") == "LATERAL DECUBITUS"
    assert view_name("xtable lateral") == view_name("RL") == "LATERAL"
    assert view_name("") == "unknown"
