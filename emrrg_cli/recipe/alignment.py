"""What a recipe of stage 2, `align`, may say."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from emrrg_cli.recipe.common import (
    FINDINGS_BALANCE,
    FINDINGS_WEIGHT,
    AugmentSettings,
    DataSettings,
    EncoderSettings,
    LoopSettings,
    Settings,
)
from emrrg_cli.vocabulary import Cleaning, ScanEngine, Section


class DataSetSettings(Settings):
    """One of several data sets."""

    root: str = Field(description="dataset directory written by `emrrg preprocess`")
    weight: float = Field(
        1.0, gt=0, description="how often an epoch takes each of its studies; 0.5: a random half, drawn for each epoch"
    )
    section: Section | None = Field(None, description="null: data.section")
    cleaning: Cleaning | None = Field(None, description="null: data.cleaning")
    labels_only: bool = Field(
        False,
        description="its films have labels and no reports: they train the head on findings (model.findings) alone",
    )


class AlignDataSettings(Settings):
    root: str | None = Field(None, description="dataset directory written by `emrrg preprocess`")
    sets: list[DataSetSettings] = Field(default_factory=list, description="several data sets; root is null then")
    section: Section = Field("report", description="which text is the report")
    cleaning: Cleaning = Field("auto", description="R2Gen's rule; auto: the one R2Gen used for the data set's source")
    max_text_tokens: int = Field(128, ge=2, description="reports are cut to this many tokens of the text tower")
    max_views: int | None = Field(None, ge=1, description="first views of a study that are used; null: all")
    limit: int | None = Field(None, ge=1, description="first studies of each split of a data set; null: all")
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    workers: int = Field(2, ge=0, description="processes that decode images")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.root is not None and self.sets:
            raise ValueError("root and sets both name data; put the one data set of root into sets, or leave sets out")
        if self.sets and all(self.labelled()):
            raise ValueError("sets has labels_only data sets alone; the contrast needs reports")
        return self

    def labelled(self) -> list[bool]:
        """Of each data set of `all_sets`, whether it has labels and no reports."""
        return [one.labels_only for one in self.sets] if self.root is None else [False]

    def all_sets(self) -> list[tuple[DataSettings, float]]:
        """Each data set as stage 3 would name it, and its weight; none where neither `root` nor `sets` is given."""
        sets = self.sets if self.root is None else [DataSetSettings(root=self.root)]
        return [
            (
                DataSettings(
                    root=one.root,
                    section=one.section or self.section,
                    cleaning=one.cleaning or self.cleaning,
                    max_views=self.max_views,
                    limit=self.limit,
                ),
                one.weight,
            )
            for one in sets
        ]


class ScratchTextSettings(Settings):
    """A small BERT trained from nothing, with a BPE tokenizer trained on the training reports."""

    hidden_size: int = Field(256, ge=16)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    vocab_size: int = Field(2000, ge=300)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of heads ({self.heads})")
        return self


class TextSettings(Settings):
    name: str = Field("scratch", description="hub name or local directory of a text encoder, or scratch")
    revision: str | None = Field(None, description="hub revision; null: the default branch")
    pooling: Literal["last", "mean"] = Field("last", description="last: the last token of a report; mean: all of them")
    frozen: bool = Field(False, description="true: only the projection of the text side is trained")
    scratch: ScratchTextSettings = Field(default_factory=ScratchTextSettings)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "scratch" and self.frozen:
            raise ValueError("name: scratch starts from random weights, so frozen must be false")
        return self


class AlignModelSettings(Settings):
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    text: TextSettings = Field(default_factory=TextSettings)
    dim: int = Field(2048, ge=1, description="width of the space that images and reports share")
    findings: bool = Field(
        False, description="a head that tells the 14 observations of the rules labeler from the encoder's tokens"
    )
    scan: ScanEngine = Field("auto", description="engine of the selective scan")


class AlignTrainSettings(LoopSettings):
    batch_size: int = Field(
        48,
        ge=2,
        description="pairs an optimizer step, over all processes and micro-batches; each has the others against it",
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="pairs in memory at a time on one device, by gradient caching; null: all"
    )
    findings_weight: float = FINDINGS_WEIGHT
    findings_balance: float = FINDINGS_BALANCE
    validation_limit: int | None = Field(None, ge=2, description="pairs of a validation, drawn once; null: all")
    select: Literal["score", "loss"] = Field(
        "score", description="what the best model is chosen by; score: mean of recall@1, 5 and 10 both ways"
    )


class AlignRecipe(Settings):
    """Stage 2: X-ray and report contrast."""

    stage: Literal["align"]
    output: str | None = Field(None, description="run directory; null: runs/<recipe>")
    data: AlignDataSettings = Field(default_factory=AlignDataSettings)
    model: AlignModelSettings = Field(default_factory=AlignModelSettings)
    train: AlignTrainSettings = Field(default_factory=AlignTrainSettings)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(self.data.labelled()) and not self.model.findings:
            raise ValueError("data.sets has labels_only, which needs the head on findings (model.findings: true)")
        return self
