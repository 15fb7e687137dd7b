"""The selective scan over several token orders: one function, several engines.

`reference` is plain PyTorch and the truth the others are tested against; `recompute` is the same loop with its gradient
written out, in a fraction of the memory. Both run anywhere. Engines are chosen once, when a model is built: by the
recipe (`model.scan`), by the environment (`EMRRG_SCAN`), or by what is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from torch import Tensor

from emrrg_cli.errors import UsageError
from emrrg_cli.models.scan.recompute import selective_scan_recompute
from emrrg_cli.models.scan.reference import directional_scan_reference

Scan = Callable[..., Tensor]

_ENGINES: dict[str, Scan] = {
    "reference": directional_scan_reference,
    "recompute": partial(directional_scan_reference, recurrence=selective_scan_recompute),
}


def available_engines() -> dict[str, str]:
    """Every engine by name, with `ok` or the reason why it cannot run here."""
    return dict.fromkeys(_ENGINES, "ok")


def choose_engine(requested: str = "auto", device_type: str | None = None) -> str:
    """The name of the engine to use.

    Args:
        requested: the recipe's `model.scan`; `EMRRG_SCAN` is stronger than `auto` and weaker than a name.
        device_type: `cpu` or `cuda`, for `auto`; `recompute` serves both.

    Raises:
        UsageError: for an engine that is unknown or cannot run here.
    """
    name = requested if requested != "auto" else os.environ.get("EMRRG_SCAN", "auto") or "auto"
    if name == "auto":
        return "recompute"
    state = available_engines().get(name)
    if state is None:
        raise UsageError(f"unknown scan engine {name!r}", hint=f"Engines here: {', '.join(_ENGINES)}, or auto.")
    if state != "ok":
        raise UsageError(f"the scan engine {name!r} cannot run here: {state}")
    return name


def get_scan(engine: str) -> Scan:
    """The scan function of an engine that `choose_engine` named; see `directional_scan_reference` for its shapes."""
    return _ENGINES[engine]
