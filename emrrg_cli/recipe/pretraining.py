"""Settings of a recipe of stage 1, `pretrain`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from emrrg_cli.recipe.common import EncoderSize, LoopSettings, Settings
from emrrg_cli.vocabulary import ScanEngine


class ImageSetSettings(Settings):
    """One of several data sets of images."""

    root: str = Field(description="dataset directory written by `emrrg preprocess`, or any folder of images")


class PretrainDataSettings(Settings):
    root: str | None = Field(
        None, description="dataset directory written by `emrrg preprocess`, or any folder of images"
    )
    sets: list[ImageSetSettings] = Field(
        default_factory=list, description="several data sets, each {root}; root is null then"
    )
    held_out: list[str] = Field(
        default_factory=list,
        description="dataset directories whose validation and test studies must not be among the images, by study_id "
        "or by the name of a folder or file",
    )
    crop_scale: list[float] = Field(
        default_factory=lambda: [0.2, 1.0],
        min_length=2,
        max_length=2,
        description="smallest and largest fraction of an image's area in a random crop",
    )
    flip: bool = Field(True, description="mirror images with probability 0.5")
    validation: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="fraction of a folder of images used for validation; a dataset directory has its own split",
    )
    limit: int | None = Field(None, ge=1, description="number of images of each split, from the first; null: all")
    workers: int = Field(2, ge=0, description="processes that decode images; 0: the training process itself")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.root is not None and self.sets:
            raise ValueError("root and sets both name data; move root into sets, or remove sets")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be ascending and in (0, 1], got {self.crop_scale}")
        return self


class PretrainEncoderSettings(EncoderSize):
    image_size: int = Field(192, ge=128, description="side of the square input, a multiple of 64")
    weights: str | None = Field(
        None, description="start from a run of stage 1 or output of `emrrg convert`, with its decoder; null: random"
    )

    @model_validator(mode="after")
    def _check_clusters(self) -> Self:
        if self.image_size % 64:
            raise ValueError(f"image_size must be a multiple of the cluster size 64, got {self.image_size}")
        return self


class PretrainModelSettings(Settings):
    encoder: PretrainEncoderSettings = Field(default_factory=PretrainEncoderSettings)
    decoder_width: int = Field(512, ge=16, description="a multiple of the head width 64; below 64: one head")
    decoder_depth: int = Field(
        4, ge=1, description="number of decoder blocks; each gets the output of a different encoder block"
    )
    scan: ScanEngine = Field("auto", description="engine of the selective scan")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decoder_width % (64 if self.decoder_width > 64 else 4):
            raise ValueError(
                f"decoder_width must be a multiple of 64, or below 64 a multiple of 4, got {self.decoder_width}"
            )
        depth = self.encoder.width_and_depth[1]
        if depth < self.decoder_depth:
            raise ValueError(f"decoder_depth {self.decoder_depth} is larger than the depth of the encoder, {depth}")
        return self


class PretrainRecipe(Settings):
    """Stage 1: autoregressive image modelling."""

    stage: Literal["pretrain"]
    output: str | None = Field(None, description="run directory; null: runs/<recipe>")
    data: PretrainDataSettings = Field(default_factory=PretrainDataSettings)
    model: PretrainModelSettings = Field(default_factory=PretrainModelSettings)
    train: LoopSettings = Field(default_factory=LoopSettings)
