"""The directional scan with Triton kernels, forward and backward, registered as one custom operator.

Each launch computes all directions. The steps: convolution and SiLU (through the index map), one matrix product for
dt's low rank, B and C, dt with bias and softplus, the recurrence, and the sum over directions with the gate. To need
little memory, the backward pass computes the convolution and dt again instead of keeping them, works on a part of the
batch at a time, and overwrites buffers with gradients.

With `torch.use_deterministic_algorithms(True)`, sums over channels have a fixed order instead of atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.models.scan import kernels
from emrrg_cli.models.scan.triton_parts import (
    TOKENS,
    WIDE,
    Launcher,
    ceil_div,
    convolved,
    index_maps,
    product,
    projected,
    tiles,
)

# Number of channels of a program of the scan, which is one warp.
_CHANNELS = 32
# A state is saved every _EVERY tokens. _CHUNK tokens are read and written together; the backward pass keeps the states
# of this number of tokens in registers.
_EVERY, _CHUNK = 40, 4
# About the number of elements of [K, b, l, d] that a pass works on at a time: a smaller number needs less memory and
# more host time. At width 768, 197 tokens and batch size 128, both passes need half the memory of the published calls.
_FORWARD_PART, _BACKWARD_PART = 100_000_000, 30_000_000
_ONE_WARP = {"num_warps": 1, "num_stages": 1}


def directional_scan_triton(
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
    """Computes `reference.directional_scan_reference` (shapes there) for fp32, bf16 and fp16 on CUDA.

    The operands of matrix products have the dtype of `x`; state, `A`, `dt` and every sum are fp32.

    Raises:
        ValueError: The state size `n` is not a power of two.
    """
    if (n := A_log.shape[-1]) & (n - 1):
        raise ValueError(f"the triton scan needs a state size that is a power of two, got {n}; use scan='recompute'")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, z = x.to(dtype), z.to(dtype)
    weights = [weight.contiguous() for weight in (conv_weight, conv_bias, projection, dt_weight, dt_bias, A_log, D)]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, z, *weights))
    out: Tensor
    if torch.compiler.is_compiling():
        out = _scan(x, z, *weights, order, save)[0]
    elif save:  # for a small batch, the overhead of the custom operator is larger than the time of the kernels
        out = _Scan.apply(x, z, *weights, order)  # type: ignore[no-untyped-call]
    else:
        out = _scan_all(x, z, weights, order, False)[0]
    return out


def _scan_all(x: Tensor, z: Tensor, weights: Sequence[Tensor], order: Tensor, save: bool) -> tuple[Tensor, ...]:
    """Returns `out` `[b, l, d]`; the mean over directions before the gate `[b, l, d]` and the states
    `[b, K, sections, d, n]`, both empty unless `save`; projection and dt's weight in the dtype of `x`."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(x.device):
            return _scan_all(x, z, weights, order, save)
    x, z = x.contiguous(), z.contiguous()
    b, length, d = x.shape
    A_log, D = weights[5:]
    directions, _, n = A_log.shape
    order, back = index_maps(order)
    kept = (b, directions, _sections(length), d, n) if save else (0,)  # outputs of an operator may not be one tensor
    launch = Launcher((x, z, *weights), save)
    out = mean = states = x  # each is allocated just before its first use, when other buffers are free again
    for part in _parts(b, _FORWARD_PART // (directions * length * d)):
        launch.take(part)
        part_x, part_z = (x, z) if part is None else (x[part], z[part])
        size = part_x.shape[0]
        u = convolved(launch, part_x, order, weights)
        weights = _narrowed(weights, x.dtype)  # after the first launch, so that the device does not wait
        _, dt, BC = projected(launch, u, weights)
        if states is x:
            states = torch.empty(kept, dtype=torch.float32, device=x.device)
        launch(
            kernels.scan_forward, (ceil_div(d, _CHANNELS), directions * size, 1),
            u, dt, BC, A_log, D, BC if not save else states if part is None else states[part], size, length, d,
            N=n, C=_CHANNELS, CHUNK=_CHUNK, EVERY=_EVERY, SAVE=save, **_ONE_WARP,
        )  # fmt: skip
        del u, BC
        if out is x:
            out = torch.empty_like(x)
            mean = torch.empty_like(x) if save else x.new_empty(0)
        part_out, part_mean = (out, mean) if part is None else (out[part], mean[part])
        launch(
            kernels.gate_forward, tiles(d, length, size),
            dt, part_z, back, part_out, part_mean if save else part_out, size, length, d,
            K=directions, SAVE=save, T=TOKENS, C=WIDE,
        )  # fmt: skip
        del dt
    return out, mean, states, *weights[2:4]


def _forward(
    x: Tensor, z: Tensor, conv_weight: Tensor, conv_bias: Tensor, projection: Tensor, dt_weight: Tensor,
    dt_bias: Tensor, A_log: Tensor, D: Tensor, order: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights = (conv_weight, conv_bias, projection, dt_weight, dt_bias, A_log, D)
    out, mean, states, *_ = _scan_all(x, z, weights, order, save)
    return out, mean, states


_scan = torch.library.custom_op("emrrg::directional_scan", _forward, mutates_args=())


@_scan.register_fake
def _(
    x: Tensor, z: Tensor, conv_weight: Tensor, conv_bias: Tensor, projection: Tensor, dt_weight: Tensor,
    dt_bias: Tensor, A_log: Tensor, D: Tensor, order: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, length, d = x.shape
    directions, _, n = A_log.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return out, x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    return out, torch.empty_like(out), x.new_empty(b, directions, _sections(length), d, n, dtype=torch.float32)


def _backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    order: Tensor,
    mean: Tensor,
    states: Tensor,
    parameters: bool,
) -> list[Tensor]:
    """Returns the gradients of `x`, `z` and, if `parameters`, of the seven parameters (fp32, in this order)."""
    grad, x, z = grad.contiguous(), x.contiguous(), z.contiguous()
    b, length, d = x.shape
    directions, _, n = A_log.shape
    taps = conv_weight.shape[2]
    grad_x, grad_z = torch.empty_like(x), torch.empty_like(z)
    weights = _narrowed((conv_weight, conv_bias, projection, dt_weight, dt_bias, A_log, D), x.dtype)
    # The number of channel blocks of a part is such that all programs that run at the same time get equally many.
    blocks, programs = directions * ceil_div(d, _CHANNELS), _programs(x.device)
    rounds = max(1, _BACKWARD_PART // (programs * _CHANNELS * length))
    maps = index_maps(order)
    sums: _Sums | None = None
    tensors = (grad, x, z, mean, states, grad_x, grad_z)
    launch = Launcher((*tensors, *weights), parameters, torch.are_deterministic_algorithms_enabled())
    for part in _parts(b, rounds * programs // blocks):
        launch.take(part)
        sums = _backward_of(part, launch, weights, maps, parameters, sums, *tensors)
    if sums is None:
        return [grad_x, grad_z]
    small, of_projection, of_dt_weight = sums
    of_A, of_D, of_bias, of_taps, of_conv_bias = torch.split(small.sum(0), [n, 1, 1, taps, 1])  # [rows, K, d]
    of_A, of_taps = (of.permute(1, 2, 0).contiguous() for of in (of_A, of_taps))
    return [grad_x, grad_z, of_taps, of_conv_bias[0], of_projection, of_dt_weight, of_bias[0], of_A, of_D[0]]


# Gradients summed over the batch, fp32. First [size, n + taps + 3, K, d], for every study of a part, with rows for the
# states of A_log, D, dt's bias, the taps of the convolution and its bias; then those of projection and of dt_weight.
_Sums = tuple[Tensor, Tensor, Tensor]


def _backward_of(
    part: slice | None,
    launch: Launcher,
    weights: Sequence[Tensor],
    maps: tuple[Tensor, Tensor],
    parameters: bool,
    sums: _Sums | None,
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    states: Tensor,
    grad_x: Tensor,
    grad_z: Tensor,
) -> _Sums | None:
    # The backward pass of a part of the batch: writes `grad_x` and `grad_z`; if `parameters`, adds to the sums of the
    # parts before it (None for the first part).
    conv_weight, conv_bias, projection, dt_weight, _, A_log, D = weights
    order, back = maps
    x = x if part is None else x[part]
    u = convolved(launch, x, order, weights)  # first, so that the device does not wait
    if part is not None:
        grad, z, mean, states, grad_x, grad_z = (of[part] for of in (grad, z, mean, states, grad_x, grad_z))
    size, length, d = x.shape
    directions, _, n = A_log.shape
    rank, stride, taps = dt_weight.shape[2], projection.shape[1], conv_weight.shape[2]
    rows, blocks = size * length, ceil_div(d, _CHANNELS)
    atomic = not torch.are_deterministic_algorithms_enabled()
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    shape = (directions, rows, 2 * n)
    grad_BC = torch.empty(shape if atomic else (blocks, *shape), **fp32)
    low, dt, BC = projected(launch, u, weights, parameters, grad_BC if atomic else None)
    grad_y = grad_x  # uses its memory until grad_x is written
    launch(
        kernels.gate_backward, (ceil_div(x.numel(), 1024), 1, 1),
        grad, z, mean, grad_z, grad_y, x.numel(), K=directions, BLOCK=1024,
    )  # fmt: skip
    programs = min(blocks * directions * size, _programs(x.device))
    scratch = torch.empty(programs * (_EVERY // _CHUNK - 1) * n * _CHANNELS, **fp32)
    grad_u = torch.empty_like(u)
    small, of_projection, of_dt_weight = sums or (None, None, None)
    if small is None:  # without parameters, any pointer: it is not used
        small = torch.zeros(size, n + taps + 3, directions, d, **fp32) if parameters else BC
    common = {"K": directions, "ROWS": n + taps + 3, "PARAMETERS": parameters}
    launch(
        kernels.scan_backward, (programs, 1, 1),
        u, dt, BC, grad_y, order, A_log, D, states, scratch, grad_u, grad_BC, small, 0.0,
        directions * size, size, length, d,
        N=n, C=_CHANNELS, CHUNK=_CHUNK, EVERY=_EVERY, ATOMIC=atomic, PACKED=_packed(x), **common, **_ONE_WARP,
    )  # fmt: skip
    del scratch, BC
    grad_dt = dt  # the kernel has overwritten it
    grad_proj = torch.empty(directions, rows, stride, dtype=x.dtype, device=x.device)
    torch.bmm(grad_dt, dt_weight, out=grad_proj[..., :rank])
    grad_BC = grad_BC if atomic else grad_BC.sum(0)
    launch(
        kernels.finish_BC, (ceil_div(directions * rows, 32), 1, 1),
        grad_BC, grad_proj, directions * rows, rank, stride, N=n, M=32,
    )  # fmt: skip
    del grad_BC
    if parameters:
        of_projection = product(grad_proj.mT, u, of_projection)
        of_dt_weight = product(grad_dt.mT, low, of_dt_weight)
        sums = small, of_projection, of_dt_weight
    del u, low, dt, grad_dt
    torch.baddbmm(grad_u, grad_proj, projection, out=grad_u)
    launch(
        kernels.conv_backward, (ceil_div(d, WIDE), directions * size, 1),
        x, order, conv_weight, conv_bias, grad_u, small, size, length, d,
        W=taps, C=WIDE, FIRST=n + 2, num_warps=2, **common,
    )  # fmt: skip
    launch(
        kernels.sum_directions, tiles(d, length, size),
        grad_u, back, grad_x, size, length, d, K=directions, T=TOKENS, C=WIDE,
    )  # fmt: skip
    return sums


@wraps(_backward)
def _backward_apart(*arguments: Any) -> list[Tensor]:
    # The outputs of an operator must not share memory, but the gradients of the small parameters do.
    backward: Any = _backward
    grad_x, grad_z, *of_parameters = backward(*arguments)
    return [grad_x, grad_z, *(of.clone() for of in of_parameters)]


_scan_backward = torch.library.custom_op("emrrg::directional_scan_backward", _backward_apart, mutates_args=())


@_scan_backward.register_fake
def _(
    grad: Tensor, x: Tensor, z: Tensor, conv_weight: Tensor, conv_bias: Tensor, projection: Tensor, dt_weight: Tensor,
    dt_bias: Tensor, A_log: Tensor, D: Tensor, order: Tensor, mean: Tensor, states: Tensor, parameters: bool,
) -> list[Tensor]:  # fmt: skip
    own = (conv_weight, conv_bias, projection, dt_weight, dt_bias, A_log, D) if parameters else ()
    own_grads = [torch.empty_like(of, dtype=torch.float32, memory_format=torch.contiguous_format) for of in own]
    return [*(torch.empty_like(of, memory_format=torch.contiguous_format) for of in (x, z)), *own_grads]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = _scan_backward(grad, *ctx.saved_tensors, any(ctx.needs_input_grad[2:9]))
    own = [of.to(tensor.dtype) for of, tensor in zip(grads, ctx.saved_tensors, strict=False)]
    return (*own, *[None] * (11 - len(grads)))


_scan.register_autograd(_differentiate, setup_context=_keep)


class _Scan(torch.autograd.Function):
    """The same operator for eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, z, *weights, order = inputs
        out, mean, states, projection, dt_weight = _scan_all(x, z, weights, order, True)
        ctx.save_for_backward(x, z, *weights[:2], projection, dt_weight, *weights[4:], order, mean, states)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        differentiate: Any = _backward
        grads = differentiate(grad, *ctx.saved_tensors, any(ctx.needs_input_grad[2:9]))
        return (*grads, *[None] * (10 - len(grads)))


def _sections(length: int) -> int:
    return (length - 1) // _EVERY


@cache
def _programs(device: torch.device) -> int:
    # The number of warps that run at the same time if each uses the largest number of registers.
    if device.type != "cuda":
        return 5
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


def _packed(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[-1] % 2 == 0


def _parts(batch: int, size: int) -> list[slice | None]:
    # Parts of the batch with `size` studies each; one None for the whole batch.
    size = max(1, size)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)] if size < batch else [None]


def _narrowed(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    # The same weights, with those of matrix products in this dtype.
    conv_weight, conv_bias, projection, dt_weight, *rest = weights
    return conv_weight, conv_bias, projection.to(dtype), dt_weight.to(dtype), *rest
