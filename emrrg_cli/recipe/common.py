"""Settings shared by the recipes of several stages. One pydantic model per section; an unknown key is an error.

Imports neither torch nor transformers, so that a recipe is checked in a fraction of a second.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from emrrg_cli.recipe.limits import check_size
from emrrg_cli.vocabulary import Cleaning, ContextField, Section

# Widths and depths of the published encoders (SPEC: ARM "v3").
ENCODER_SIZES: dict[str, tuple[int, int]] = {"base": (768, 12), "large": (1024, 24), "huge": (1536, 24)}

# numpy's generator takes 32 bits; each process, and each batch of a generation, adds its number to the common seed.
SEEDS = 2**31


class Settings(BaseModel):
    """Base of every section: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _within_limits(cls, value: Any, info: ValidationInfo) -> Any:
        check_size(info.field_name, value)
        return value


class AugmentSettings(Settings):
    """Random changes of the training images, drawn for each view. Images are not mirrored, because sides matter."""

    rotate: float = Field(0.0, ge=0, le=45, description="largest rotation in degrees, in both directions")
    shift: float = Field(0.0, ge=0, le=0.5, description="largest shift as a fraction of the side, in both directions")
    scale: float = Field(0.0, ge=0, lt=1, description="largest change of size, as a fraction")
    brightness: float = Field(0.0, ge=0, lt=1, description="largest change of brightness, as a fraction of the range")
    contrast: float = Field(0.0, ge=0, lt=1, description="largest change of contrast, as a fraction")


class DataSettings(Settings):
    root: str | None = Field(None, description="dataset directory written by `emrrg preprocess`")
    section: Section = Field("report", description="section that is used as the report")
    cleaning: Cleaning = Field(
        "auto", description="cleaning rule; auto: the rule that R2Gen used for the data set's source"
    )
    max_report_tokens: int = Field(100, ge=1, description="training reports are cut to this many LLM tokens")
    end_at_limit: bool = Field(
        True, description="adds an end token to reports of exactly max_report_tokens; the released code does not"
    )
    context: list[ContextField] = Field(
        default_factory=list,
        description="fields of the study that are put into the prompt",
    )
    context_words: int = Field(40, ge=1, description="each context field is cut to this many words")
    context_dropout: float = Field(
        0.3, ge=0, le=1, description="probability that training drops a context field, so that reports do not need it"
    )
    max_views: int | None = Field(
        None, ge=1, description="number of views per study, from the first; null: all, or 16 in `emrrg generate`"
    )
    limit: int | None = Field(None, ge=1, description="number of studies of each split, from the first; null: all")
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    balance: float = Field(
        1.0, ge=1, description="how often a training epoch takes each study with a finding of the rules labeler"
    )
    workers: int = Field(2, ge=0, description="processes that decode images; 0: the training process itself")

    @field_validator("context")
    @classmethod
    def _check_context(cls, context: list[ContextField]) -> list[ContextField]:
        if len(set(context)) != len(context):
            raise ValueError("names a field twice")
        return context


class EncoderSize(Settings):
    """Size of the vision encoder, which every stage has."""

    size: Literal["base", "large", "huge"] | None = Field(
        "base", description="a published width and depth; null: d_model and depth"
    )
    d_model: int | None = Field(None, ge=16, description="width; only if size is null")
    depth: int | None = Field(None, ge=1, description="number of blocks; only if size is null")
    d_state: int = Field(16, ge=1, description="SSM state size n")
    image_size: int = Field(224, ge=32, description="side of the square input, a multiple of 16")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.size is None and (self.d_model is None or self.depth is None):
            raise ValueError("size is null, so both d_model and depth must be given")
        if self.size is not None and (self.d_model is not None or self.depth is not None):
            raise ValueError(f"size: {self.size} already sets d_model and depth; set size: null to choose them")
        if self.d_model is not None and self.d_model % 16:
            raise ValueError(f"d_model must be a multiple of 16, got {self.d_model}")
        if self.image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, got {self.image_size}")
        return self

    @property
    def width_and_depth(self) -> tuple[int, int]:
        """`(d_model, depth)`, from `size` or as set."""
        if self.size is not None:
            return ENCODER_SIZES[self.size]
        assert self.d_model is not None
        assert self.depth is not None
        return self.d_model, self.depth


class EncoderSettings(EncoderSize):
    drop_path: float = Field(0.1, ge=0, lt=1, description="largest stochastic depth rate")
    weights: str | None = Field(
        None,
        description="encoder to start from: a run, a directory of `emrrg convert` or a safetensors file; null: random",
    )


class LrScaleSettings(Settings):
    """Factors of the learning rate for each part of a model."""

    encoder: float = Field(1.0, gt=0, description="the vision encoder, if it is trained whole")
    adapters: float = Field(1.0, gt=0, description="LoRA in encoder and LLM")
    llm: float = Field(1.0, gt=0, description="the LLM or the text tower, if it is trained whole")
    new: float = Field(1.0, gt=0, description="bridge, hybrid layers, projections and heads")


# For stages that train the findings head.
FindingsSet = Literal["chexpert", "extended"]
FINDINGS_SET: FindingsSet = Field(
    "chexpert",
    description="what the findings head predicts: CheXpert's 14 observations, or also 9 that reports often name, such "
    "as hyperinflation, granulomas and degenerative changes",
)
FINDINGS_WEIGHT: float = Field(0.5, gt=0, description="weight of the findings loss, with model.findings: true")
FINDINGS_BALANCE: float = Field(
    20.0,
    ge=1,
    description="largest weight of a rare present finding in this loss; 1: the same as an absent finding",
)


class LoopSettings(Settings):
    """Training settings of every stage."""

    epochs: int = Field(10, ge=1, description="number of passes over the training data")
    max_steps: int | None = Field(
        None, ge=1, description="length of the schedule in optimizer steps; training ends there. null: set by epochs"
    )
    stop_after_steps: int | None = Field(
        None,
        ge=1,
        description="stops, with a checkpoint, after this many steps; the schedule is unchanged. null: never",
    )
    batch_size: int = Field(8, ge=1, description="examples per optimizer step, over all processes and micro-batches")
    micro_batch_size: int | None = Field(None, ge=1, description="examples per forward pass on one device; null: all")
    lr: float = Field(1e-4, gt=0, description="learning rate after the warm-up")
    lr_batch_size: int | None = Field(
        None, ge=1, description="batch size to which lr refers; lr is scaled by batch_size / this. null: no scaling"
    )
    lr_scale: LrScaleSettings = Field(default_factory=LrScaleSettings)
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine schedule")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    schedule_unit: Literal["step", "epoch"] = Field("step", description="how often the learning rate changes")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs in which the learning rate rises from 0 to lr")
    weight_decay: float = Field(
        0.01, ge=0, description="weight decay of AdamW; not applied to biases, norms and other vectors"
    )
    betas: list[float] = Field(
        default_factory=lambda: [0.9, 0.999], min_length=2, max_length=2, description="decays of AdamW's two averages"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: no limit")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which replaces the saved weights; null: none",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 on a GPU that supports it, else fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="computes activations again in the backward pass: less memory, more time"
    )
    detect_non_finite: bool = Field(
        False, description="stops at the first encoder block with infinity or NaN; names the block and the direction"
    )
    seed: int = Field(42, ge=0, lt=SEEDS, description="random seed of initial weights, order and augmentation")
    checkpoint_every_steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between checkpoints; null: at the end of an epoch, if checkpoints take less than "
        "5 % of the time",
    )
    validate_every_epochs: int = Field(1, ge=1, description="epochs between validations")
    patience: int | None = Field(
        None, ge=1, description="validations without a better result before stopping; null: no early stopping"
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between log entries")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        ["tensorboard"], description="where losses and scores are also logged; []: only in the run directory"
    )

    @model_validator(mode="after")
    def _check_loop(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}")
        if self.min_lr > self.peak_lr:
            raise ValueError(f"min_lr {self.min_lr} is larger than lr {self.peak_lr}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr_batch_size is None else self.lr * self.batch_size / self.lr_batch_size
