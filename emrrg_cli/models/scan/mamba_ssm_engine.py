"""The directional scan with the kernels of mamba-ssm and causal-conv1d, all directions in one grouped call."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def directional_scan_mamba_ssm(
    x: Tensor,
    z: Tensor,
    order: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:
    """Computes `reference.directional_scan_reference` (shapes there) for fp32, bf16 and fp16 on CUDA."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, z = x.to(dtype), z.to(dtype)
    selective_scan_fn, causal_conv1d_fn = _functions()
    dtype = x.dtype
    b, length, d = x.shape
    k, _, width = conv_weight.shape
    rank, n = dt_weight.shape[2], A_log.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        u = x.transpose(1, 2)[:, :, order]  # [b, d, K, l]
        u = u.transpose(1, 2).reshape(b, k * d, length)
        weight, bias = conv_weight.to(dtype).reshape(k * d, width), conv_bias.to(dtype).reshape(k * d)
        u = causal_conv1d_fn(u, weight, bias, activation="silu")
        projected = torch.einsum("bkdl,kjd->bkjl", u.view(b, k, d, length), projection.to(dtype))
        low, B, C = projected[:, :, :rank], projected[:, :, rank : rank + n], projected[:, :, rank + n :]
        dt = torch.einsum("bkrl,kdr->bkdl", low, dt_weight.to(dtype)).reshape(b, k * d, length)
        A = -torch.exp(A_log.float()).view(k * d, n)
        y = selective_scan_fn(
            u,
            dt,
            A,
            B.contiguous(),
            C.contiguous(),
            D.float().reshape(-1),
            delta_bias=dt_bias.float().reshape(-1),
            delta_softplus=True,
        )
        back = order.argsort(dim=1)[None, :, None, :].expand(b, -1, d, -1)
        y = y.view(b, k, d, length).gather(3, back).mean(dim=1, dtype=torch.float32).transpose(1, 2)
        out: Tensor = (y * F.silu(z.float())).to(dtype)
        return out


def why_not() -> str:
    """Returns `ok`, or the reason why the packages cannot be used on this computer."""
    missing = [name for name in ("mamba_ssm", "causal_conv1d") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _functions()
    except Exception as error:  # a package built for another torch raises errors of many types
        return f"cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return "ok"


def _functions() -> tuple[Any, Any]:
    # mamba_ssm's __init__ imports complete language models and their dependencies, which the kernels do not need.
    if "mamba_ssm" not in sys.modules and (spec := find_spec("mamba_ssm")) and spec.submodule_search_locations:
        package = ModuleType("mamba_ssm")
        package.__path__ = [str(Path(folder)) for folder in spec.submodule_search_locations]
        sys.modules["mamba_ssm"] = package
        try:
            scan = import_module("mamba_ssm.ops.selective_scan_interface")
        finally:
            del sys.modules["mamba_ssm"]
    else:
        scan = import_module("mamba_ssm.ops.selective_scan_interface")
    conv = import_module("causal_conv1d")
    return scan.selective_scan_fn, conv.causal_conv1d_fn
