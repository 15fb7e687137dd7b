"""The selective scan over several token orders: one function, several engines.

`reference` is plain PyTorch; the other engines are tested against it. `recompute` is the same loop with an explicit
backward pass, which needs a fraction of the memory. Both run anywhere. `numba` is that loop compiled for the CPU, if
numba is installed. `triton` has our fused kernels for CUDA. `mamba_ssm` calls the kernels of the packages mamba-ssm and
causal-conv1d. The engine is chosen once, when a model is built: by the recipe (`model.scan`), by the environment
(`EMRRG_SCAN`), or by the hardware and the installed packages.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.errors import UsageError
from emrrg_cli.models.scan import numba_engine
from emrrg_cli.models.scan.recompute import selective_scan_recompute
from emrrg_cli.models.scan.reference import directional_scan_reference
from emrrg_cli.vocabulary import SCAN_ENGINES

Scan = Callable[..., Tensor]


def available_engines() -> dict[str, str]:
    """Returns every engine by name, with `ok` or the reason why it cannot run on this computer."""
    return {name: _state(name) for name in SCAN_ENGINES}


def choose_engine(requested: str = "auto", device_type: str | None = None) -> str:
    """Returns the name of the engine to use.

    Args:
        requested: `model.scan` of the recipe. `EMRRG_SCAN` is used instead if this is `auto`.
        device_type: `cpu` or `cuda`, for `auto`; None: `cuda` if there is a GPU.

    Raises:
        UsageError: The engine is unknown or cannot run on this computer.
    """
    name = requested if requested != "auto" else os.environ.get("EMRRG_SCAN", "auto") or "auto"
    if name == "auto":
        cuda = device_type == "cuda" if device_type is not None else torch.cuda.is_available()
        fastest = "triton" if cuda else "numba"
        return fastest if _state(fastest) == "ok" else "recompute"
    if name not in SCAN_ENGINES:
        raise UsageError(f"unknown scan engine {name!r}", hint=f"Engines: {', '.join(SCAN_ENGINES)}, or auto.")
    if (state := _state(name)) != "ok":
        raise UsageError(f"the scan engine {name!r} cannot run here: {state}")
    return name


def get_scan(engine: str) -> Scan:
    """Returns the scan function of an engine from `choose_engine`; for shapes see `directional_scan_reference`."""
    if engine == "reference":
        return directional_scan_reference
    if engine == "recompute":
        return _recompute
    if engine == "numba":
        return _numba
    if engine == "mamba_ssm":
        from emrrg_cli.models.scan.mamba_ssm_engine import directional_scan_mamba_ssm

        return directional_scan_mamba_ssm
    return _triton


_recompute = partial(directional_scan_reference, recurrence=selective_scan_recompute)
_numba = partial(directional_scan_reference, recurrence=numba_engine.selective_scan_numba)


def _triton(x: Tensor, *rest: Any) -> Tensor:
    from emrrg_cli.models.scan.triton_engine import directional_scan_triton

    # A model that was built for a GPU may be run on the CPU, in fp64 (to check gradients), or with a state size that
    # the kernels do not support.
    n = rest[-2].shape[-1]  # of A_log
    fused = (x.is_cuda or _interpreted()) and x.dtype != torch.float64 and n & (n - 1) == 0
    return directional_scan_triton(x, *rest) if fused else _recompute(x, *rest)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"  # kernels on CPU tensors, slowly: for tests


@cache
def _state(engine: str) -> str:
    if engine in ("reference", "recompute"):
        return "ok"
    if engine == "numba":
        return numba_engine.why_not()
    if engine == "mamba_ssm":
        from emrrg_cli.models.scan.mamba_ssm_engine import why_not

        return why_not()
    if find_spec("triton") is None:
        return "triton is not installed"
    return "ok" if torch.cuda.is_available() or _interpreted() else "no CUDA device"
