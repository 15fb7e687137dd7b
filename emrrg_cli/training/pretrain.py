"""Stage 1, `pretrain`: autoregressive image modelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emrrg_cli.datasets.image_dataset import (
    Augmentation,
    ImageBatch,
    ImageDataset,
    ImageSource,
    collate_images,
)
from emrrg_cli.files.write_errors import writing
from emrrg_cli.models.arm.pretrainer import WEIGHTS, ArmPretrainer, find_pretrainer, save_pretrainer
from emrrg_cli.models.outputs import StageOutput
from emrrg_cli.models.weights import load_weights
from emrrg_cli.recipe.pretraining import PretrainModelSettings, PretrainRecipe
from emrrg_cli.reporting.clusters import draw_predictions
from emrrg_cli.silence_libraries import silence_libraries
from emrrg_cli.training.checkpoint import trained_bytes
from emrrg_cli.training.pretrain_data import check_roots, open_images
from emrrg_cli.training.progress import TrainingDisplay
from emrrg_cli.training.run_setup import Session, open_session, validation_loss
from emrrg_cli.training.summary import Summary
from emrrg_cli.vocabulary import IMAGENET_MEAN, IMAGENET_STD

_SHOWN = 4


class PixelPretrainer(nn.Module):
    """The pre-training model, with uint8 grey images as input and the loss as output."""

    def __init__(self, pretrainer: ArmPretrainer) -> None:
        super().__init__()
        self.pretrainer = pretrainer
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Converts uint8 `[b, h, w]` to fp32 `[b, 3, h, w]`: three equal channels with ImageNet normalisation."""
        return (pixels[:, None].float() / 255 - self.mean) / self.std

    def grey(self, images: Tensor) -> Tensor:
        """Inverts `normalise`: `[b, 3, h, w]` to grey values `[b, h, w]` from 0 to 255, the mean over the channels."""
        return ((images * self.std + self.mean) * 255).mean(dim=1)

    def forward(self, batch: ImageBatch) -> StageOutput:
        """Returns the loss summed over the images of a batch."""
        loss = self.pretrainer(self.normalise(batch.pixels)).loss
        return StageOutput(loss * len(batch), loss.new_full((), len(batch)))


@dataclass
class PretrainStage:
    """The model with its objective, validation, pictures and export (`emrrg_cli.training.stage.Stage`)."""

    model: PixelPretrainer
    recipe: PretrainRecipe
    validation: ImageDataset | None
    shown: ImageDataset
    run_dir: Path
    accelerator: Any

    def items(self, batch: ImageBatch) -> int:
        """Returns the number of images in a batch."""
        return len(batch)

    @property
    def collate(self) -> Callable[[Sequence[Tensor]], ImageBatch]:
        """The function that joins images into a batch."""
        return collate_images

    def validate(self, display: TrainingDisplay) -> dict[str, float]:
        """Returns the loss over the validation images, without crops or mirroring."""
        if self.validation is None:
            return {}
        loss = validation_loss(
            self.model,
            self.validation,
            self.collate,
            self.recipe.train,
            self.accelerator,
            display,
            workers=self.recipe.data.workers,
        )
        return {"validation/loss": loss}

    @torch.no_grad()
    def show_examples(self, epoch: int) -> None:
        """Writes `pictures/epoch-NNN.png` for a few validation images, or training images if there are none."""
        pixels = torch.stack([self.shown[i] for i in range(min(_SHOWN, len(self.shown)))])
        model = self.model
        pretrainer = model.pretrainer
        images = model.normalise(pixels.to(self.accelerator.device))
        with self.accelerator.autocast():
            prediction = pretrainer(images).prediction.float()
        target, mean, deviation = pretrainer.targets(images)
        pictures = {
            "targets": pretrainer.paste(target).mean(dim=1),
            "predictions": pretrainer.paste(prediction).mean(dim=1),
            "restored": model.grey(pretrainer.paste(prediction * deviation + mean, onto=images)),
        }
        draw_predictions(
            pixels.float().numpy(),
            **{name: picture.cpu().numpy() for name, picture in pictures.items()},
            path=self.run_dir / "pictures" / f"epoch-{epoch:03d}.png",
            title=f"{self.run_dir.resolve().name}, after epoch {epoch}",
        )

    def export(self) -> None:
        """Replaces `model/` of the run directory."""
        with writing(self.run_dir / "model", trained_bytes(self.model.pretrainer)):
            save_pretrainer(self.run_dir / "model", self.model.pretrainer)


def build_pretrainer(settings: PretrainModelSettings, scan: str = "auto") -> ArmPretrainer:
    """Builds the model of a recipe, with random weights or with the weights that the recipe names.

    Raises:
        UsageError: `encoder.weights` is not a model of stage 1.
        RunError: Its tensors do not fit the sizes of the recipe.
    """
    encoder = settings.encoder
    width, depth = encoder.width_and_depth
    model = ArmPretrainer(
        width,
        depth,
        encoder.image_size,
        encoder.d_state,
        settings.decoder_width,
        settings.decoder_depth,
        scan=scan,
    )
    # Also for a resumed run: fixed position embeddings are not parameters, so a checkpoint does not contain them.
    if encoder.weights is not None:
        load_weights(model, find_pretrainer(Path(encoder.weights)) / WEIGHTS)
    return model


def run_pretrain(
    recipe: PretrainRecipe, run_dir: Path, *, resume: bool, expected_processes: int, verbose: bool = False
) -> Summary:
    """Trains an encoder on images without reports and writes a run directory.

    Args:
        verbose: Not used: this stage takes no tensors from an earlier one.

    Raises:
        UsageError: The recipe does not fit the data or the computer.
        RunError: The images cannot be read, or training fails.
        Interrupted: A stop signal arrived. The checkpoint is written.
    """
    roots = check_roots(recipe)
    silence_libraries()
    with open_session(
        recipe, recipe.train, recipe.model.scan, run_dir, resume=resume, expected_processes=expected_processes
    ) as session:
        training, validation = open_images(recipe, roots, session)
        return _train(recipe, training, validation, session)


def _train(recipe: PretrainRecipe, training: ImageSource, validation: ImageSource | None, session: Session) -> Summary:
    size, settings = recipe.model.encoder.image_size, recipe.data
    low, high = settings.crop_scale
    dataset = ImageDataset(training, size, Augmentation((low, high), settings.flip), recipe.train.seed)
    session.check_batch(dataset)
    model = build_pretrainer(recipe.model, session.scan)
    model.encoder.gradient_checkpointing = recipe.train.gradient_checkpointing
    stage = PretrainStage(
        PixelPretrainer(model),
        recipe,
        None if validation is None else ImageDataset(validation, size),
        ImageDataset(training if validation is None else validation, size),
        session.run_dir,
        session.accelerator,
    )
    return session.train(stage, dataset, stage.collate, workers=settings.workers)
