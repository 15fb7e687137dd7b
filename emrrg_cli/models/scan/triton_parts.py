"""Parts shared by the forward and the backward pass of the Triton scan: launches, index maps, products, first steps."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime import driver

from emrrg_cli.models.scan import kernels

TOKENS, WIDE = 16, 128  # tile size, in tokens and channels


def product(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    # The batched matrix product in fp32, added to `total` if it is given.
    if a.dtype == torch.float32 or (a.is_cuda and _WIDE_PRODUCTS):
        wide: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
        return torch.bmm(a, b, **wide) if total is None else torch.baddbmm(total, a, b, **wide, out=total)
    result = torch.bmm(a, b).float()
    return result if total is None else total.add_(result)


_WIDE_PRODUCTS = hasattr(torch.ops.aten.baddbmm, "dtype_out")  # from torch 2.8


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tiles(d: int, length: int, rows: int) -> tuple[int, int, int]:
    return (ceil_div(d, WIDE), ceil_div(length, TOKENS), rows)


# The keys are the tensors themselves: the order of an encoder never changes.
_maps: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakIdKeyDictionary()


def index_maps(order: Tensor) -> tuple[Tensor, Tensor]:
    # The order and its inverse, [K, l] int32: the step at which a direction visits a token.
    if (known := _maps.get(order)) is not None:
        return known
    steps = torch.arange(order.shape[1], device=order.device, dtype=torch.int32).expand(order.shape)
    maps = order.to(torch.int32), torch.empty_like(order, dtype=torch.int32).scatter_(1, order.long(), steps)
    _maps[order] = maps
    return maps


def convolved(launch: Launcher, x: Tensor, order: Tensor, weights: Sequence[Tensor]) -> Tensor:
    # `u` in the order of each direction, [K, b * l, d].
    conv_weight, conv_bias, *_ = weights
    b, length, d = x.shape
    directions, _, taps = conv_weight.shape
    u = x.new_empty(directions, b * length, d)
    launch(
        kernels.conv_forward, (ceil_div(d, WIDE), ceil_div(length, 2 * TOKENS), directions * b),
        x, order, conv_weight, conv_bias, u, b, length, d, W=taps, T=2 * TOKENS, C=WIDE, num_warps=2,
    )  # fmt: skip
    return u


def projected(
    launch: Launcher,
    u: Tensor,
    weights: Sequence[Tensor],
    keep_low: bool = False,
    cleared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Returns the other inputs of the recurrence: with `keep_low`, the low-rank input of dt [K, b * l, r] (else dt); dt
    # after softplus [K, b * l, d]; B and C [K, b * l, 2 n] in fp32. Fills `cleared`, of the size of BC, with zeros.
    _, _, projection, dt_weight, dt_bias, A_log, _ = weights
    directions, rows, d = u.shape
    rank, n = dt_weight.shape[2], A_log.shape[2]
    proj = product(u, projection.mT)
    dt = torch.empty_like(u)
    low = u.new_empty(directions, rows, rank) if keep_low else dt
    BC = torch.empty(directions, rows, 2 * n, dtype=torch.float32, device=u.device)
    launch(
        kernels.dt_forward, (ceil_div(d, 128), ceil_div(rows, 64), directions),
        proj, dt_weight, dt_bias, low, dt, BC, BC if cleared is None else cleared, rows, d, rank, proj.shape[2],
        N=n, M=64, C=128, R=max(16, 1 << (rank - 1).bit_length()), LOW=keep_low, CLEAR=cleared is not None,
    )  # fmt: skip
    return low, dt, BC


_configurations: dict[tuple[Any, ...], int] = {}
_launches: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


class Launcher:
    """Launches kernels with less time on the host than Triton: `launch(kernel, grid, *arguments, **constants)`.

    For a small kernel, the host needs more time than the device. A kernel is compiled for types, sizes and alignment of
    its arguments. Here they are checked once for all kernels of a pass; after the first launch, pointers are passed as
    numbers.

    Args:
        tensors: The input tensors of the pass, for the whole batch; the first is on the device to launch on. All other
            tensors must be parts of their batch, or be allocated during the pass, so that they are aligned.
        flags: Other values that the types of the arguments depend on.
    """

    def __init__(self, tensors: Sequence[Tensor], *flags: int) -> None:
        device = tensors[0].device
        found = [(tensor.dtype, tensor.shape, tensor.data_ptr() % 16) for tensor in tensors]
        key = (device.index, *flags, *found)
        self._whole = _configurations.setdefault(key, len(_configurations))
        self._configuration: tuple[int, ...] = (self._whole,)
        # `torch.cuda.current_stream` would create an object, which may take 20 us.
        self._stream = driver.active.get_current_stream(device.index) if device.type == "cuda" else None

    def take(self, part: slice | None) -> None:
        """Sets the part of the batch for the next launches; None: the whole batch."""
        self._configuration = (self._whole,) if part is None else (self._whole, part.start, part.stop)

    def __call__(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
        key = (kernel.fn.__name__, self._configuration, grid, *constants.values())
        if key in _launches:
            launch, values = _launches[key]
            plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            launch(*plain, *values, stream=self._stream)
            return
        compiled = kernel[grid](*arguments, **constants)
        if hasattr(compiled, "run"):  # else interpreted
            _launches[key] = compiled[grid], tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
