"""EMRRG: radiology reports from chest X-rays. Research software, not for diagnosis.

The public names below are loaded at first use, so that the command line starts without torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Set before torch is imported: otherwise its threads keep a core busy while they wait for each other. Beside other
# programs, a step of a small model would take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Also before torch: on recent GPUs it prefers the attention of cuDNN, which compiles for some 30 ms on each new shape,
# and shapes change with every batch. The first name is for torch 2.9, the second for 2.10 and newer.
os.environ.setdefault("TORCH_CUDNN_SDPA_PREFERRED", "0")
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

if TYPE_CHECKING:
    from emrrg_cli.datasets.report_text import clean_report
    from emrrg_cli.decoding.reporter import Reporter
    from emrrg_cli.decoding.reports import Generator, load_generator
    from emrrg_cli.errors import EmrrgError, RunError, UsageError
    from emrrg_cli.evaluation.language import score
    from emrrg_cli.imaging.base import ImageError
    from emrrg_cli.imaging.read import read_image
    from emrrg_cli.labeling.labeler import label_report
    from emrrg_cli.models.arm.pretrainer import load_pretrainer
    from emrrg_cli.models.transfer import load_encoder

__all__ = [
    "EmrrgError",
    "Generator",
    "ImageError",
    "Reporter",
    "RunError",
    "UsageError",
    "clean_report",
    "label_report",
    "load_encoder",
    "load_generator",
    "load_pretrainer",
    "read_image",
    "score",
]

_HOMES = {
    "EmrrgError": "emrrg_cli.errors",
    "Generator": "emrrg_cli.decoding.reports",
    "ImageError": "emrrg_cli.imaging.base",
    "Reporter": "emrrg_cli.decoding.reporter",
    "RunError": "emrrg_cli.errors",
    "UsageError": "emrrg_cli.errors",
    "clean_report": "emrrg_cli.datasets.report_text",
    "label_report": "emrrg_cli.labeling.labeler",
    "load_encoder": "emrrg_cli.models.transfer",
    "load_generator": "emrrg_cli.decoding.reports",
    "load_pretrainer": "emrrg_cli.models.arm.pretrainer",
    "read_image": "emrrg_cli.imaging.read",
    "score": "emrrg_cli.evaluation.language",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
