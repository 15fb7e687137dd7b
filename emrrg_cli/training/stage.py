"""The interface between the training loop and a training stage."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from emrrg_cli.training.progress import TrainingDisplay


class Stage(Protocol):
    """A training stage: a model with its objective, its validation and its export."""

    model: Any  # nn.Module whose forward takes a batch and returns StageOutput

    def items(self, batch: Any) -> int:
        """Number of items over which the loss of a batch is averaged. Known before the forward pass."""

    def validate(self, display: TrainingDisplay) -> dict[str, float]:
        """Compute `validation/loss` and, if the stage has one, `validation/score` (higher is better).

        Empty where there is nothing to validate on. All processes call it and get the same figures.
        """

    def export(self) -> None:
        """Write the current model as the result of the run. Only the main process calls this."""


@runtime_checkable
class PreparesStep(Protocol):
    """A stage whose loss needs more than a micro-batch: the other examples of the batch, or reports sampled for it."""

    def prepare_step(self, batches: list[Any], epoch: int) -> list[Any]:
        """Prepare all micro-batches that this process has in one optimizer step, and return them for the model.

        Called in training mode before the first of them goes through the model. Contrast over a batch larger than the
        memory computes here what each micro-batch needs to know of the others. `epoch` is counted from 0.
        """


@runtime_checkable
class ShowsExamples(Protocol):
    """A stage that writes a picture of the output of the model for some examples."""

    def show_examples(self, epoch: int) -> None:
        """Write the picture. Only the main process calls this, after each validation. `epoch` counts a begun epoch."""
