"""Settings of a recipe of stage 2, `align`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from emrrg_cli.recipe.common import (
    FINDINGS_BALANCE,
    FINDINGS_SET,
    FINDINGS_WEIGHT,
    AugmentSettings,
    DataSettings,
    EncoderSettings,
    FindingsSet,
    LoopSettings,
    Settings,
)
from emrrg_cli.vocabulary import Cleaning, ScanEngine, Section


class DataSetSettings(Settings):
    """One of several data sets."""

    root: str = Field(description="dataset directory written by `emrrg preprocess`")
    weight: float = Field(
        1.0, gt=0, description="how often an epoch takes each study; 0.5: a random half, drawn for each epoch"
    )
    section: Section | None = Field(None, description="null: data.section")
    cleaning: Cleaning | None = Field(None, description="null: data.cleaning")
    labels_only: bool = Field(
        False,
        description="the films have labels but no reports; they train only the findings head (model.findings)",
    )


class AlignDataSettings(Settings):
    root: str | None = Field(None, description="dataset directory written by `emrrg preprocess`")
    sets: list[DataSetSettings] = Field(
        default_factory=list,
        description="several data sets, each {root, weight, section, cleaning, labels_only}; root is null then",
    )
    section: Section = Field("report", description="section that is used as the report")
    cleaning: Cleaning = Field(
        "auto", description="cleaning rule; auto: the rule that R2Gen used for the data set's source"
    )
    max_text_tokens: int = Field(128, ge=2, description="reports are cut to this many tokens of the text tower")
    max_views: int | None = Field(None, ge=1, description="number of views per study, from the first; null: all")
    limit: int | None = Field(
        None, ge=1, description="number of studies of each split of a data set, from the first; null: all"
    )
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    workers: int = Field(2, ge=0, description="processes that decode images; 0: the training process itself")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.root is not None and self.sets:
            raise ValueError("root and sets both name data; move root into sets, or remove sets")
        if self.sets and all(self.labelled()):
            raise ValueError("sets has only labels_only data sets; contrastive training needs reports")
        return self

    def labelled(self) -> list[bool]:
        """Returns for each data set of `all_sets` whether it has labels but no reports."""
        return [one.labels_only for one in self.sets] if self.root is None else [False]

    def all_sets(self) -> list[tuple[DataSettings, float]]:
        """Returns each data set as settings of stage 3, with its weight; empty without `root` and `sets`."""
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
    """A small BERT trained from random weights, with a BPE tokenizer trained on the training reports."""

    hidden_size: int = Field(256, ge=16, description="width; a multiple of heads")
    layers: int = Field(4, ge=1, description="number of layers")
    heads: int = Field(4, ge=1, description="attention heads of a layer")
    vocab_size: int = Field(2000, ge=300, description="largest number of tokens in the tokenizer")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of each layer, in training")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of heads ({self.heads})")
        return self


class TextSettings(Settings):
    name: str = Field("scratch", description="hub name or local directory of a text encoder, or scratch")
    revision: str | None = Field(None, description="hub revision; null: the default branch")
    pooling: Literal["last", "mean"] = Field(
        "last", description="last: the last token of a report; mean: the mean over all tokens"
    )
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
    dim: int = Field(2048, ge=1, description="width of the common space of images and reports")
    findings: bool = Field(False, description="a head that predicts findings from the encoder's tokens")
    findings_set: FindingsSet = FINDINGS_SET
    scan: ScanEngine = Field("auto", description="engine of the selective scan")


class AlignTrainSettings(LoopSettings):
    batch_size: int = Field(
        48,
        ge=2,
        description="pairs per optimizer step, over processes and micro-batches; all others are negatives of a pair",
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="pairs in memory at a time on one device, by gradient caching; null: all"
    )
    findings_weight: float = FINDINGS_WEIGHT
    findings_balance: float = FINDINGS_BALANCE
    validation_limit: int | None = Field(
        None, ge=2, description="number of pairs in a validation, drawn once; null: all"
    )
    select: Literal["score", "loss"] = Field(
        "score", description="criterion of the best model; score: mean of recall@1, 5 and 10 in both directions"
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
            raise ValueError("data.sets has labels_only, which needs the findings head (model.findings: true)")
        return self
