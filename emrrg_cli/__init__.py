"""EMRRG: radiology reports from chest X-rays. Research software, not for diagnosis.

The public names below are loaded at first use, so that the command line starts without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emrrg_cli.data.report_text import clean_report
    from emrrg_cli.generation import Generator, load_generator
    from emrrg_cli.metrics.nlg import score
    from emrrg_cli.models.arm.pretrainer import load_pretrainer
    from emrrg_cli.models.transfer import load_encoder

__all__ = ["Generator", "clean_report", "load_encoder", "load_generator", "load_pretrainer", "score"]

_HOMES = {
    "Generator": "emrrg_cli.generation",
    "clean_report": "emrrg_cli.data.report_text",
    "load_encoder": "emrrg_cli.models.transfer",
    "load_generator": "emrrg_cli.generation",
    "load_pretrainer": "emrrg_cli.models.arm.pretrainer",
    "score": "emrrg_cli.metrics.nlg",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
