"""What the training loop asks of a stage."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from emrrg_cli.training.progress import TrainingDisplay


class Stage(Protocol):
    """A training stage: the model with its objective, and what is done with it between steps."""

    model: Any  # nn.Module whose forward takes a batch and returns StageOutput

    def items(self, batch: Any) -> int:
        """Items the loss of a batch is a mean over, known before the forward pass."""

    def validate(self, display: TrainingDisplay) -> dict[str, float]:
        """Validation figures: `validation/loss` and, where the stage has one, `validation/score` (higher is better).

        Empty where there is nothing to validate on. All processes call it and get the same figures.
        """

    def export(self) -> None:
        """Writes the model as it is now as the run's result. The main process alone calls it."""


@runtime_checkable
class PreparesStep(Protocol):
    """A stage whose loss needs more than a micro-batch: the other examples of the batch, or reports sampled for it."""

    def prepare_step(self, batches: list[Any], epoch: int) -> list[Any]:
        """The micro-batches of one optimizer step as the model is to see them, from all those of this process.

        Called in training mode before the first of them goes through the model. Contrast over a batch larger than the
        memory computes here what each micro-batch needs to know of the others. `epoch` is counted from 0.
        """


@runtime_checkable
class ShowsExamples(Protocol):
    """A stage that leaves a picture of what the model makes of some examples."""

    def show_examples(self, epoch: int) -> None:
        """Called after each validation, by the main process alone; `epoch` counts epochs done, a begun one as one."""
