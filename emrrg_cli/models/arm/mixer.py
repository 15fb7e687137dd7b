"""The Mamba mixer of ARM with `K` scan directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emrrg_cli.models.adapters import base_layer, effective_weight
from emrrg_cli.models.scan import choose_engine, get_scan


def _as_multiplied(x: Tensor) -> Tensor:
    # In the dtype of autocast: converts `x` once, not in each layer that reads it.
    autocast = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x


class Direction(nn.Module):
    """The projections of one scan direction: `dt`, `B` and `C` from the tokens, `dt_proj` from rank `r` to width `d`.

    The published `x_proj` is `dt`, `B` and `C` stacked in this order. They are separate here, so that LoRA on one of
    them is ordinary LoRA on a module name. The cost is that LoRA on all three has three A matrices instead of one.
    """

    def __init__(self, d_model: int, d_state: int, dt_rank: int) -> None:
        super().__init__()
        self.dt = nn.Linear(d_model, dt_rank, bias=False)
        self.B = nn.Linear(d_model, d_state, bias=False)
        self.C = nn.Linear(d_model, d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_model, bias=True)
        bound = dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        # softplus(bias) is log-uniform in [1e-3, 1e-1]; the bias is the inverse of softplus.
        dt = torch.exp(torch.empty(d_model).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class Mixer(nn.Module):
    """Selective state space mixer, expansion 1: `[b, l, d] -> [b, l, d]`.

    Args:
        d_model: `d`, the width.
        d_state: `n`, the SSM state size.
        directions: `K`; 4 in stages 2 and 3, 1 in stage 1.
        depth: number of blocks of the encoder; the initial `out_proj` is divided by its square root.
        d_conv: kernel size of the causal convolution.
        scan: engine of the scan (`emrrg_cli.models.scan`).

    Source: EMRRG (arXiv 2510.16776) section 3; ARM (arXiv 2406.07537) section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        directions: int = 4,
        depth: int = 1,
        d_conv: int = 4,
        scan: str = "auto",
    ) -> None:
        super().__init__()
        self.engine = choose_engine(scan)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self.X = nn.Linear(d_model, d_model, bias=False)
        self.Z = nn.Linear(d_model, d_model, bias=False)
        conv = [nn.Conv1d(d_model, d_model, d_conv, groups=d_model) for _ in range(directions)]
        self.conv_weight = nn.Parameter(torch.stack([c.weight.detach()[:, 0] for c in conv]))  # [K, d, w]
        self.conv_bias = nn.Parameter(torch.stack([c.bias.detach() for c in conv if c.bias is not None]))  # [K, d]
        self.directions = nn.ModuleList(Direction(d_model, d_state, math.ceil(d_model / 16)) for _ in range(directions))
        A = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.log(A).expand(directions, d_model, -1).clone())  # [K, d, n]
        self.D = nn.Parameter(torch.ones(directions, d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def weights_by_direction(self) -> tuple[Tensor, ...]:
        """Returns the weights for the scan in the order of its arguments, adapters included; `K` is the first axis."""
        return self.conv_weight, self.conv_bias, *self._stacked(), self.A_log, self.D

    def freeze(self) -> None:
        """Keeps the stacked weights of the directions until `release`, so that they are not stacked at every call.

        Until then, the weights and their layers must not change. If some weights are trained or have adapters, nothing
        is kept.
        """
        self.release()
        layers = self._layers()
        parameters = [p for layer in layers for p in layer.parameters()]
        if all(type(layer) is nn.Linear for layer in layers) and not any(p.requires_grad for p in parameters):
            with torch.inference_mode(False), torch.no_grad():  # autograd cannot use inference tensors later
                self._kept = self._stack([p.clone() if p.is_inference() else p for p in parameters])

    def release(self) -> None:
        """Deletes the weights that `freeze` kept; the weights may change again."""
        self._kept = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The kept weights move with the module to another device or dtype.
        if self._kept is not None:
            projection, dt_weight, dt_bias = map(fn, self._kept)
            self._kept = projection, dt_weight, dt_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def _layers(self) -> list[nn.Module]:
        # From the modules' dictionaries: looking up 16 attributes of modules takes longer than the three products.
        return [layer for direction in self.directions for layer in direction._modules.values() if layer is not None]

    def _stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `projection` `[K, r + 2n, d]`, `dt_weight` `[K, d, r]` and `dt_bias` `[K, d]` for the scan.

        The layers are not called: the scan needs the weights of all directions together, adapters included.
        """
        if self._kept is not None:
            return self._kept
        layers = self._layers()
        if all(type(layer) is nn.Linear for layer in layers):
            return self._stack([p for layer in layers for p in layer._parameters.values() if p is not None])
        adapted = [(effective_weight(layer), base_layer(layer).bias) for layer in layers]
        return self._stack([of for pair in adapted for of in pair if of is not None])

    @staticmethod
    def _stack(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        # Five tensors for each direction: the weights of dt, B, C and dt_proj, and the bias of dt_proj.
        rows = [weight for i, weight in enumerate(weights) if i % 5 < 3]
        projection = torch.cat(rows).view(len(weights) // 5, -1, rows[0].shape[1])
        return projection, torch.stack(list(weights[3::5])), torch.stack(list(weights[4::5]))

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Mixes tokens along every direction.

        Args:
            x: `[b, l, d]`, tokens in row order.
            order: `[K, l]`, the token that each direction visits at each step.

        Returns:
            `[b, l, d]`.
        """
        x = _as_multiplied(x)
        y = get_scan(self.engine)(self.X(x), self.Z(x), order, *self.weights_by_direction())
        out: Tensor = self.out_proj(y)
        return out


class SwiGLU(nn.Module):
    """`w3(silu(w1(x)) * w2(x))`: `[..., d] -> [..., d]`, hidden width `d * 4 * 2 // 3`."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        hidden = d_model * 4 * 2 // 3
        self.w1 = nn.Linear(d_model, hidden)
        self.w2 = nn.Linear(d_model, hidden)
        self.w3 = nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = _as_multiplied(x)
        out: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return out


class Block(nn.Module):
    """`x + mixer(norm1(x))`, then `x + mlp(norm2(x))`, each branch dropped for whole samples at rate `drop_path`."""

    def __init__(
        self, d_model: int, d_state: int, directions: int, depth: int, drop_path: float = 0.0, scan: str = "auto"
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(d_model, eps=1e-5)
        self.mixer = Mixer(d_model, d_state, directions, depth, scan=scan)
        self.norm2 = nn.LayerNorm(d_model, eps=1e-5)
        self.mlp = SwiGLU(d_model)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Runs the block: `[b, l, d] -> [b, l, d]`; `order` as in `Mixer`."""
        x = self._add(x, self.mixer(self.norm1(x), order))
        return self._add(x, self.mlp(self.norm2(x)))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.drop_path == 0 or not self.training:
            return x + branch
        keep = 1 - self.drop_path
        scale = (torch.rand(x.shape[0], 1, 1, device=x.device) < keep) / keep
        with torch.autocast(x.device.type, enabled=False):  # autocast would convert the branch in a separate pass
            return torch.addcmul(x, branch, scale.to(x.dtype))
