"""The settings that `protocol` presets in a recipe of stage 3."""

from __future__ import annotations

from typing import Any

_NO_SAMPLING = {"do_sample": False, "temperature": 1.0, "consensus": None}
# A preset is weaker than keys in the same layer and stronger than the layers below.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # The settings of the published scores, from the released code for MIMIC-CXR and CheXpert Plus.
    "published": {
        "data": {"section": "report", "cleaning": "auto", "end_at_limit": False},
        "model": {"adapter": {"targets": "full"}},
        "generation": {
            "num_beams": 3,
            "min_new_tokens": 80,
            "max_new_tokens": 120,
            "repetition_penalty": 2.0,
            "length_penalty": 2.0,
            "beam_stop": "candidates",
            **_NO_SAMPLING,
        },
        "evaluation": {"references": "clipped", "tokenizer": "whitespace"},
    },
    # The paper's method, scored against whole references, with decoding that stops at the end of the report.
    "ours": {
        "data": {"section": "report", "cleaning": "auto", "end_at_limit": True},
        "model": {"adapter": {"targets": ["X"]}},
        "generation": {
            "num_beams": 3,
            "min_new_tokens": 0,
            "max_new_tokens": 120,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "beam_stop": "running",
            **_NO_SAMPLING,
        },
        "evaluation": {"references": "whole", "tokenizer": "whitespace"},
    },
}


def protocols_for(cleaning: str | None) -> dict[str, dict[str, Any]]:
    """Returns `PROTOCOLS` for a data set, identified by `data.cleaning`: IU X-Ray was decoded with other settings."""
    if cleaning != "r2gen-iu":
        return PROTOCOLS
    published = PROTOCOLS["published"]
    decoding = {"num_beams": 5, "min_new_tokens": 40, "max_new_tokens": 100}
    return PROTOCOLS | {"published": published | {"generation": published["generation"] | decoding}}
