"""What a recipe may say. One pydantic model a section; an unknown key or a wrong type is an error.

Imports neither torch nor transformers, so that a recipe is checked in a fraction of a second.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from emrrg_cli.recipe.limits import check_size

Section = Literal["report", "findings", "impression", "both"]
Cleaning = Literal["auto", "r2gen-iu", "r2gen-mimic", "none"]
Protocol = Literal["published", "ours"]
ScanEngine = Literal["auto", "reference", "recompute", "numba", "triton", "mamba_ssm"]
AdapterTarget = Literal[
    "X", "Z", "dt", "B", "C", "in_proj", "x_proj", "dt_proj", "out_proj", "patch_embed", "mlp", "llm"
]

# Widths and depths of the published encoders (SPEC: ARM "v3").
ENCODER_SIZES: dict[str, tuple[int, int]] = {"base": (768, 12), "large": (1024, 24), "huge": (1536, 24)}

# numpy's generator takes 32 bits; a process adds its own number to the seed of all, a batch of a generation too.
SEEDS = 2**31

# Names that people bring from other toolkits; used to suggest ours, never accepted.
SYNONYMS: dict[str, str] = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "blr": "lr",
    "min_learning_rate": "min_lr",
    "weight_decay_rate": "weight_decay",
    "gradient_accumulation_steps": "micro_batch_size",
    "accumulate_grad_batches": "micro_batch_size",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "gradient_clip_val": "clip_norm",
    "max_grad_norm": "clip_norm",
    "mixed_precision": "precision",
    "beam_size": "num_beams",
    "min_length": "min_new_tokens",
    "max_length": "max_new_tokens",
    "lora_r": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "num_workers": "workers",
    "path": "root",
    "data_dir": "root",
    "output_dir": "output",
    "embed_dim": "d_model",
    "num_layers": "depth",
}


class Settings(BaseModel):
    """Base of every section: strict types, no unknown key."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _within_limits(cls, value: Any, info: ValidationInfo) -> Any:
        check_size(info.field_name, value)
        return value


class AugmentSettings(Settings):
    """Random changes of the training images, drawn for each view. None mirrors: left and right are findings."""

    rotate: float = Field(0.0, ge=0, le=45, description="degrees, at most, either way")
    shift: float = Field(0.0, ge=0, le=0.5, description="part of the side, at most, in either direction")
    scale: float = Field(0.0, ge=0, lt=1, description="larger or smaller by this part, at most")
    brightness: float = Field(0.0, ge=0, lt=1, description="lighter or darker by this part of the range, at most")
    contrast: float = Field(0.0, ge=0, lt=1, description="more or less contrast by this part, at most")


class DataSettings(Settings):
    root: str | None = Field(None, description="dataset directory written by `emrrg preprocess`")
    section: Section = Field("report", description="which text is the report")
    cleaning: Cleaning = Field("auto", description="R2Gen's rule; auto: the one R2Gen used for the data set's source")
    max_report_tokens: int = Field(100, ge=1, description="training reports are cut to this many LLM tokens")
    end_at_limit: bool = Field(
        True, description="a report of exactly max_report_tokens gets an end token; the released code gives it none"
    )
    max_views: int | None = Field(None, ge=1, description="first views of a study that are used; null: all")
    limit: int | None = Field(None, ge=1, description="first studies of each split that are used; null: all")
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    balance: float = Field(
        1.0, ge=1, description="how often an epoch of training shows each study with a finding of the rules labeler"
    )
    workers: int = Field(2, ge=0, description="processes that decode images")


class EncoderSize(Settings):
    """Of what every stage has: the vision encoder."""

    size: Literal["base", "large", "huge"] | None = "base"
    d_model: int | None = Field(None, ge=16, description="width; only where size is null")
    depth: int | None = Field(None, ge=1, description="blocks; only where size is null")
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
        """`(d_model, depth)`, from `size` or as given."""
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


class AdapterSettings(Settings):
    targets: list[AdapterTarget] | Literal["full", "none"] = Field(
        ["X"],
        description="projections that get LoRA on a frozen encoder; full: train the encoder; none: freeze it",
    )
    rank: int = Field(16, ge=1)
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.targets, list):
            if not self.targets:
                raise ValueError("targets is an empty list; write none to freeze the encoder without adapters")
            if len(set(self.targets)) != len(self.targets):
                raise ValueError("targets names a projection twice")
            inside = {"dt", "B", "C", "x_proj", "dt_proj"} & set(self.targets)
            if self.dropout > 0 and inside:
                raise ValueError(
                    f"dropout must be 0 with targets {sorted(inside)}: "
                    "these projections are merged into the fused scan, which has no place for it"
                )
        return self


class ScratchLLMSettings(Settings):
    """A small Llama trained from nothing, with a BPE tokenizer trained on the training reports."""

    hidden_size: int = Field(256, ge=16)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    vocab_size: int = Field(2000, ge=300)
    dropout: float = Field(0.0, ge=0, lt=1, description="on the output of each layer's two halves, in training")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 * heads ({2 * self.heads})")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self


class LLMSettings(Settings):
    name: str = Field("scratch", description="hub name, local directory, or scratch")
    revision: str | None = Field(None, description="hub revision; null: the default branch")
    frozen: bool | None = Field(None, description="null: frozen, unless the LLM starts from scratch")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of a frozen LLM's weights; auto: that of train.precision. A trained LLM's are always fp32"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="of a frozen LLM's weights, through bitsandbytes; LoRA on it is then QLoRA"
    )
    save: bool = Field(False, description="copy a hub LLM into the run directory")
    begin_token_id: int | None = Field(
        None, ge=0, description="token that the prompt begins with; null: the one of the tokenizer, if it has one"
    )
    end_text: str | None = Field(
        None, min_length=1, description="text that ends a report in place of the end token, such as </s>; null: none"
    )
    scratch: ScratchLLMSettings = Field(default_factory=ScratchLLMSettings)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "scratch" and self.frozen:
            raise ValueError("name: scratch starts from random weights, so frozen must be false or null")
        if self.quantization != "none" and not self.is_frozen:
            raise ValueError(f"quantization: {self.quantization} needs a frozen LLM; its weights could not be trained")
        if self.quantization != "none" and self.save:
            raise ValueError("save: true copies the LLM as it was published, so quantization must be none")
        return self

    @property
    def is_frozen(self) -> bool:
        """Whether the LLM's own weights stay as they are."""
        return self.name != "scratch" if self.frozen is None else self.frozen


class HybridSettings(Settings):
    every: int | None = Field(8, ge=1, description="every k-th decoder layer, from the first; null: none")
    gate: Literal["states", "attention"] = Field(
        "states",
        description="what the gate is computed from: the text states after the layer's norm, or the output of "
        "self-attention before its output projection, as in the released code",
    )
    query: Literal["before_rotary", "after_rotary"] = Field(
        "before_rotary",
        description="the queries that attend to the image: without positions, or after the rotary embedding, as in "
        "the released code",
    )


class ModelSettings(Settings):
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    llm: LLMSettings = Field(default_factory=LLMSettings)
    hybrid: HybridSettings = Field(default_factory=HybridSettings)
    visual_prompt: Literal["full", "pooled"] = Field(
        "full", description="full: every visual token in the prompt; pooled: 2x2 averages and the class token"
    )
    views: Literal["average", "concat"] = Field("average", description="how a study's views are joined")
    findings: bool = Field(
        False, description="a head that tells the 14 observations of the rules labeler from the encoder's tokens"
    )
    findings_prompt: bool = Field(
        False, description="what that head tells stands in the prompt, a word for each finding; needs findings: true"
    )
    scan: ScanEngine = Field("auto", description="engine of the selective scan")

    @model_validator(mode="after")
    def _check(self) -> Self:
        llm_adapted = isinstance(self.adapter.targets, list) and "llm" in self.adapter.targets
        if llm_adapted and not self.llm.is_frozen:
            raise ValueError("adapter.targets has llm, but the LLM is trained whole: choose one (llm.frozen: true)")
        if self.findings_prompt and not self.findings:
            raise ValueError("findings_prompt needs the head on findings (model.findings: true)")
        if self.visual_prompt == "pooled" and self.hybrid.every is None:
            raise ValueError("visual_prompt: pooled needs hybrid layers (hybrid.every), which see the tokens left out")
        return self


class LrScaleSettings(Settings):
    """What the learning rate is multiplied by for each part of a model."""

    encoder: float = Field(1.0, gt=0, description="the vision encoder, where it is trained whole")
    adapters: float = Field(1.0, gt=0, description="LoRA, on either tower")
    llm: float = Field(1.0, gt=0, description="the LLM or the text tower, where it is trained whole")
    new: float = Field(1.0, gt=0, description="what joins the towers: bridge, hybrid layers, projections, heads")


# Of the stages that train the head on findings.
FINDINGS_WEIGHT: float = Field(0.5, gt=0, description="of the loss on findings, with model.findings: true")


class LoopSettings(Settings):
    """What the training of every stage has."""

    epochs: int = Field(10, ge=1)
    max_steps: int | None = Field(None, ge=1, description="ends the schedule after this many optimizer steps")
    stop_after_steps: int | None = Field(
        None, ge=1, description="stops, with a checkpoint, after this many steps; the schedule is unchanged"
    )
    batch_size: int = Field(8, ge=1, description="examples an optimizer step, over all processes and micro-batches")
    micro_batch_size: int | None = Field(None, ge=1, description="examples a forward pass on one device; null: all")
    lr: float = Field(1e-4, gt=0)
    lr_batch_size: int | None = Field(
        None, ge=1, description="lr is for this batch size and grows in proportion to batch_size; null: lr as it is"
    )
    lr_scale: LrScaleSettings = Field(default_factory=LrScaleSettings)
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    schedule_unit: Literal["step", "epoch"] = Field("step", description="how often the learning rate moves")
    warmup_epochs: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.01, ge=0, description="not applied to biases, norms and other vectors")
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.999], min_length=2, max_length=2)
    clip_norm: float | None = Field(1.0, gt=0)
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is what is kept; null: none",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, else fp32"
    )
    gradient_checkpointing: bool = False
    detect_non_finite: bool = Field(
        False, description="stops at the first encoder block with infinity or NaN, and names it and the direction"
    )
    seed: int = Field(42, ge=0, lt=SEEDS)
    checkpoint_every_steps: int | None = Field(None, ge=1, description="null: at the end of each epoch")
    validate_every_epochs: int = Field(1, ge=1)
    patience: int | None = Field(None, ge=1, description="validations without a better result before stopping")
    log_every: int = Field(10, ge=1, description="optimizer steps between log entries")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"])

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


class SelfCriticalSettings(Settings):
    """Training on sampled reports by their scores, after cross-entropy."""

    after_epochs: int = Field(10, ge=0, description="epochs of cross-entropy before")
    samples: int = Field(4, ge=2, description="reports sampled for each study of a step")
    temperature: float = Field(1.0, gt=0, description="of the sampling")
    max_new_tokens: int = Field(100, ge=1, description="longest sampled report")
    rewards: dict[str, float] = Field(
        default_factory=lambda: {"BLEU_4": 1.0, "CIDEr": 1.0, "ROUGE_L": 1.0},
        description="scores of a report and their weights; CIDEr counts as a part of 10",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = {"BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr"}
        if unknown := sorted(set(self.rewards) - known):
            raise ValueError(f"rewards names unknown scores {unknown}; known: {sorted(known)}")
        if not self.rewards:
            raise ValueError("rewards names no score")
        return self


class TrainSettings(LoopSettings):
    """Training of stage 3, whose validation also writes and scores reports."""

    validation_limit: int | None = Field(None, ge=1, description="studies that are generated in a validation")
    findings_weight: float = FINDINGS_WEIGHT
    self_critical: SelfCriticalSettings | None = Field(
        None, description="training on sampled reports by their scores; null: cross-entropy alone"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="part of each target that is spread over the vocabulary, in training"
    )
    select: Literal["score", "loss"] = Field("score", description="what the best checkpoint is chosen by")
    score_weights: dict[str, float] = Field(default_factory=lambda: {"BLEU_4": 0.8, "CIDEr": 0.2})

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = {"BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "METEOR", "CIDEr", "F1_rules"}
        if unknown := sorted(set(self.score_weights) - known):
            raise ValueError(f"score_weights names unknown scores {unknown}; known: {sorted(known)}")
        return self


class GenerationSettings(Settings):
    engine: Literal["auto", "own", "transformers"] = Field(
        "auto", description="how reports are decoded; auto: our own engine where it supports the LLM"
    )
    batch_size: int = Field(8, ge=1, description="studies generated at a time on one device")
    num_beams: int = Field(3, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    max_new_tokens: int = Field(120, ge=1)
    repetition_penalty: float = Field(1.0, gt=0)
    length_penalty: float = 1.0
    beam_stop: Literal["running", "candidates"] = Field(
        "running",
        description="what finished reports must beat for beam search to stop: the running beams, or all candidates "
        "of the step, as in transformers 4.44 and the published figures",
    )
    no_repeat_ngram_size: int = Field(0, ge=0)
    do_sample: bool = False
    temperature: float = Field(1.0, gt=0, description="with do_sample")
    top_p: float = Field(1.0, gt=0, le=1, description="with do_sample")
    top_k: int = Field(0, ge=0, description="with do_sample; 0: no limit")
    seed: int = Field(0, ge=0, lt=SEEDS, description="with do_sample")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is larger than max_new_tokens {self.max_new_tokens}"
            )
        if not self.do_sample and (self.temperature != 1.0 or self.top_p != 1.0 or self.top_k != 0):
            raise ValueError("temperature, top_p and top_k act only with do_sample: true")
        return self


class EvaluationSettings(Settings):
    references: Literal["whole", "clipped"] = Field(
        "whole", description="clipped: references are cut to data.max_report_tokens, as the released code does"
    )
    tokenizer: Literal["whitespace", "ptb"] = Field("whitespace", description="ptb needs Java")


class FinetuneRecipe(Settings):
    """Stage 3: X-ray to report."""

    stage: Literal["finetune"]
    protocol: Protocol = "ours"
    output: str | None = Field(None, description="run directory; null: runs/<recipe>")
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)


class PreprocessRecipe(Settings):
    """Raw data to a dataset directory."""

    stage: Literal["preprocess"]
    size: int | Literal["original"] = Field(512, description="shorter side in pixels; smaller images are kept")
    format: Literal["jpeg", "png"] = "jpeg"
    quality: int = Field(95, ge=1, le=100, description="of JPEG")
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are refused before they are decoded")
    section: Section = Field("report", description="what the report is; report: by the rule of the data set")
    views: Literal["all", "frontal", "lateral"] = Field("all", description="a view that is not known is kept")
    min_words: int = Field(0, ge=0, description="studies with a shorter report are left out")
    dedupe: Literal["off", "report", "drop"] = Field("off", description="images that are there twice, or nearly so")
    workers: int | None = Field(None, ge=1, description="null: one a core")
    studies_per_shard: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.size, int) and self.size < 32:
            raise ValueError(f"size must be 32 or more, got {self.size}")
        return self


# What `protocol` sets together. A preset is weaker than a key stated beside it, stronger than the layers below it.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # The settings behind the published figures, as the released code ran them on MIMIC-CXR and CheXpert Plus.
    "published": {
        "data": {"section": "report", "cleaning": "auto", "end_at_limit": False},
        "model": {"adapter": {"targets": "full"}},
        "generation": {
            "num_beams": 3,
            "min_new_tokens": 80,
            "max_new_tokens": 120,
            "repetition_penalty": 2.0,
            "length_penalty": 2.0,
            "beam_stop": "candidates",
        },
        "evaluation": {"references": "clipped", "tokenizer": "whitespace"},
    },
    # The paper's method, scored against whole references, with decoding that may end when the report ends.
    "ours": {
        "data": {"section": "report", "cleaning": "auto", "end_at_limit": True},
        "model": {"adapter": {"targets": ["X"]}},
        "generation": {
            "num_beams": 3,
            "min_new_tokens": 0,
            "max_new_tokens": 120,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "beam_stop": "running",
        },
        "evaluation": {"references": "whole", "tokenizer": "whitespace"},
    },
}


def protocols_for(cleaning: str | None) -> dict[str, dict[str, Any]]:
    """`PROTOCOLS` for the data set that a recipe's `data.cleaning` tells of: IU X-Ray was decoded in its own way."""
    if cleaning != "r2gen-iu":
        return PROTOCOLS
    published = PROTOCOLS["published"]
    decoding = {"num_beams": 5, "min_new_tokens": 40, "max_new_tokens": 100}
    return PROTOCOLS | {"published": published | {"generation": published["generation"] | decoding}}
