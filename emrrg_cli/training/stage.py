"""The interface between the training loop and a training stage."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from emrrg_cli.training.progress import TrainingDisplay


class Stage(Protocol):
    """A training stage: a model with its objective, its validation and its export."""

    model: Any  # nn.Module whose forward takes a batch and returns StageOutput

    def items(self, batch: Any) -> int:
        """Returns the number of items over which the loss of a batch is averaged. Called before the forward pass."""

    def validate(self, display: TrainingDisplay) -> dict[str, float]:
        """Computes `validation/loss` and, if the stage has one, `validation/score` (higher is better).

        The result is empty without validation data. All processes call this and get the same figures.
        """

    def export(self) -> None:
        """Writes the current model as the result of the run. Only the main process calls this."""


@runtime_checkable
class PreparesStep(Protocol):
    """A stage whose loss needs more than a micro-batch: the other micro-batches of the step, or sampled reports."""

    def prepare_step(self, batches: list[Any], epoch: int) -> list[Any]:
        """Prepares all micro-batches of this process in one optimizer step and returns them for the model.

        Called in training mode, before the first forward pass of the step. Stage 2 computes here the gradients of its
        loss over all micro-batches; stage 3 samples reports. `epoch` is counted from 0.
        """


@runtime_checkable
class ShowsExamples(Protocol):
    """A stage that writes a picture of the output of the model for some examples."""

    def show_examples(self, epoch: int) -> None:
        """Writes the picture. Only the main process calls this, after each validation.

        `epoch` is counted from 1.
        """
