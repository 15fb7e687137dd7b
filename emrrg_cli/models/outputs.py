"""What a model returns to the training loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StageOutput(NamedTuple):
    """Result of a stage's forward pass over one micro-batch.

    `loss_sum` is the loss summed over its items (scalar, carries gradients) and `items` their number: report tokens in
    stage 3. The loop divides the sums of all micro-batches by the items of the whole batch, so that the step is the
    same however the batch is split.
    """

    loss_sum: Tensor
    items: Tensor
