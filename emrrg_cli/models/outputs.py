"""The output of a model for the training loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StageOutput(NamedTuple):
    """Result of a stage's forward pass over one micro-batch.

    `loss_sum` is the loss summed over its items (scalar, differentiable); `items` is their number. In stage 3, items
    are report tokens. The loop divides the sums of all micro-batches by the items of the whole batch, so that the step
    does not depend on the split into micro-batches.
    """

    loss_sum: Tensor
    items: Tensor
