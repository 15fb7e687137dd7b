"""Settings of a recipe of `preprocess`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from emrrg_cli.recipe.common import Settings
from emrrg_cli.vocabulary import ImageFormat, Section, WantedView


class PreprocessRecipe(Settings):
    """Raw data to a dataset directory."""

    stage: Literal["preprocess"]
    size: int | Literal["original"] = Field(512, description="shorter side in pixels; smaller images are not enlarged")
    format: ImageFormat = Field("jpeg", description="format of the stored images")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality, 1 to 100")
    max_pixels: int = Field(
        100_000_000, ge=1, description="images with more pixels (width x height) are skipped before decoding"
    )
    section: Section = Field(
        "report", description="section that is used as the report; report: the rule of the data set"
    )
    views: Literal["all", WantedView] = Field("all", description="views to keep; images of unknown view are kept")
    min_words: int = Field(0, ge=0, description="studies whose report has fewer words are skipped")
    dedupe: Literal["off", "report", "drop"] = Field(
        "off", description="what to do with duplicate and nearly equal images"
    )
    workers: int | None = Field(None, ge=1, description="number of processes; null: one per core")
    studies_per_shard: int = Field(1000, ge=1, description="number of studies in a Parquet file")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.size, int) and self.size < 32:
            raise ValueError(f"size must be 32 or more, got {self.size}")
        return self
