"""A moving average of the weights, which is validated and exported instead of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of the trainable parameters.

    After step `t`, counted from 1, the average moves towards the weights by `1 - min(decay, (1 + t) / (10 + t))`.
    Early weights, which are almost random, therefore lose their influence quickly.

    Args:
        model: The average starts at its current trainable parameters.
        decay: Between 0 and 1.

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging (1992); the early decay is from
        TensorFlow's `ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names, self._parameters = list(named), list(named.values())
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [parameter.detach() for parameter in self._parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Loads the average into the model for the block, then restores its weights, also after an error."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Exchange values, not tensors: the optimizer and DistributedDataParallel have references to the tensors.
        for parameter, average in zip(self._parameters, self._average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the average by parameter name, on the CPU."""
        return {name: tensor.cpu().contiguous() for name, tensor in zip(self._names, self._average, strict=True)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores an average that `tensors` returned.

        Raises:
            KeyError: A parameter is missing.
        """
        for name, tensor in zip(self._names, self._average, strict=True):
            tensor.copy_(tensors[name])
