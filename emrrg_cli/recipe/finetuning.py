"""Settings of a recipe of stage 3, `finetune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from emrrg_cli.recipe.common import (
    FINDINGS_BALANCE,
    FINDINGS_SET,
    FINDINGS_WEIGHT,
    SEEDS,
    DataSettings,
    EncoderSettings,
    FindingsSet,
    LoopSettings,
    Settings,
)
from emrrg_cli.vocabulary import (
    AGREEMENTS,
    CONTEXT_PLACE,
    IMAGE_PLACE,
    PUBLISHED_PROMPT,
    REWARDS,
    SELECTION_SCORES,
    AdapterTarget,
    ScanEngine,
    Tokenizer,
)

Protocol = Literal["published", "ours"]


def _require_known(key: str, weights: Mapping[str, float], known: Sequence[str]) -> None:
    if unknown := sorted(set(weights) - set(known)):
        raise ValueError(f"{key} names unknown scores {unknown}; known: {sorted(known)}")
    if not any(weights.values()) or any(weight < 0 for weight in weights.values()):
        raise ValueError(f"{key} needs a score with a weight above 0, and no weight below 0")


class AdapterSettings(Settings):
    targets: list[AdapterTarget] | Literal["full", "none"] = Field(
        ["X"],
        description="projections that get LoRA on a frozen encoder; full: train the encoder; none: freeze it",
    )
    rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the LoRA matrices, in training")

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
                    "these projections are merged into the fused scan, which does not support dropout"
                )
        return self


class ScratchLLMSettings(Settings):
    """A small Llama trained from random weights, with a BPE tokenizer trained on the training reports."""

    hidden_size: int = Field(256, ge=16, description="width; a multiple of 2 * heads")
    layers: int = Field(4, ge=1, description="number of layers")
    heads: int = Field(4, ge=1, description="attention heads of a layer; a multiple of kv_heads")
    kv_heads: int = Field(2, ge=1, description="heads of keys and values (grouped-query attention)")
    vocab_size: int = Field(2000, ge=300, description="largest number of tokens in the tokenizer")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after attention and MLP of each layer, in training")

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
    frozen: bool | None = Field(
        None, description="whether the LLM's own weights stay fixed; null: true, unless it starts from scratch"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="dtype of a frozen LLM's weights; auto: as train.precision. A trained LLM is always fp32"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="quantization of a frozen LLM by bitsandbytes; LoRA on it is then QLoRA"
    )
    save: bool = Field(False, description="copy a hub LLM into the run directory")
    begin_token_id: int | None = Field(
        None, ge=0, description="first token of the prompt; null: the tokenizer's, if it has one"
    )
    end_text: str | None = Field(
        None, min_length=1, description="text that ends a report instead of the end token, such as </s>; null: none"
    )
    scratch: ScratchLLMSettings = Field(default_factory=ScratchLLMSettings)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "scratch" and self.frozen:
            raise ValueError("name: scratch starts from random weights, so frozen must be false or null")
        if self.quantization != "none" and not self.is_frozen:
            raise ValueError(
                f"quantization: {self.quantization} needs a frozen LLM, because quantized weights cannot be trained"
            )
        if self.quantization != "none" and self.save:
            raise ValueError("save: true copies the published LLM, so quantization must be none")
        return self

    @property
    def is_frozen(self) -> bool:
        """Whether the LLM's own weights are frozen."""
        return self.name != "scratch" if self.frozen is None else self.frozen


class HybridSettings(Settings):
    every: int | None = Field(8, ge=1, description="every k-th decoder layer, from the first; null: none")
    gate: Literal["states", "attention"] = Field(
        "states",
        description="input of the gate: the text states after the layer's norm, or the output of self-attention "
        "before its output projection, as in the released code",
    )
    query: Literal["before_rotary", "after_rotary"] = Field(
        "before_rotary",
        description="queries that attend to the image: before the rotary embedding, or after it, as in the released "
        "code",
    )


class ModelSettings(Settings):
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    llm: LLMSettings = Field(default_factory=LLMSettings)
    hybrid: HybridSettings = Field(default_factory=HybridSettings)
    prompt: str = Field(
        PUBLISHED_PROMPT,
        description=f"text before the report; {IMAGE_PLACE} marks the image, {CONTEXT_PLACE} after it marks the fields "
        "of data.context, by default directly after the image",
    )
    visual_prompt: Literal["full", "pooled"] = Field(
        "full", description="full: every visual token in the prompt; pooled: 2x2 averages and the class token"
    )
    views: Literal["average", "concat"] = Field("average", description="how a study's views are joined")
    view_tokens: bool = Field(
        False,
        description="adds a learned vector for frontal, lateral or unknown to the visual tokens of a view; needs a "
        "data set with views",
    )
    findings: bool = Field(False, description="a head that predicts findings from the encoder's tokens")
    findings_set: FindingsSet = FINDINGS_SET
    findings_prompt: bool = Field(
        False, description="puts the head's predictions into the prompt, a word per finding; needs findings: true"
    )
    findings_prompt_labels: bool = Field(
        False,
        description="in training, the prompt has the findings of the reference, so the LLM learns to follow them",
    )
    findings_threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="probability from which the prompt has yes for a finding; null: a mixture of yes and no",
    )
    scan: ScanEngine = Field("auto", description="engine of the selective scan")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if (times := prompt.count(IMAGE_PLACE)) != 1:
            raise ValueError(f"must contain {IMAGE_PLACE} once, in the place of the image; it occurs {times} times")
        before, after = prompt.split(IMAGE_PLACE)
        if CONTEXT_PLACE in before or after.count(CONTEXT_PLACE) > 1:
            raise ValueError(f"may contain {CONTEXT_PLACE} once, after {IMAGE_PLACE}")
        if not after.split(CONTEXT_PLACE)[-1].strip():
            raise ValueError(f"must have text after {IMAGE_PLACE}, before the report")
        return prompt

    @model_validator(mode="after")
    def _check(self) -> Self:
        llm_adapted = isinstance(self.adapter.targets, list) and "llm" in self.adapter.targets
        if llm_adapted and not self.llm.is_frozen:
            raise ValueError("adapter.targets has llm, but the whole LLM is trained: choose one (llm.frozen: true)")
        if self.findings_prompt and not self.findings:
            raise ValueError("findings_prompt needs the findings head (model.findings: true)")
        if (self.findings_prompt_labels or self.findings_threshold is not None) and not self.findings_prompt:
            raise ValueError("findings_prompt_labels and findings_threshold need findings_prompt: true")
        if self.visual_prompt == "pooled" and self.hybrid.every is None:
            raise ValueError("visual_prompt: pooled needs hybrid layers (hybrid.every), which see the other tokens")
        return self


class SelfCriticalSettings(Settings):
    """Training on sampled reports by their scores, after cross-entropy."""

    after_epochs: int = Field(10, ge=0, description="epochs of cross-entropy before it starts")
    samples: int = Field(4, ge=2, description="reports sampled for each study of a step")
    temperature: float = Field(
        1.0,
        gt=0,
        description="temperature of sampling. With train.label_smoothing, about 0.7: at 1, the smoothed model often "
        "samples words that do not fit",
    )
    max_new_tokens: int = Field(100, ge=1, description="longest sampled report")
    cross_entropy: float = Field(0.1, ge=0, description="weight of the cross-entropy of the reference")
    contrast: float = Field(
        1.0,
        ge=0,
        description="weight of the reward against the references of other studies, which is subtracted. With 1, a "
        "report that fits every study gains nothing; with 0, training can end with one report for all studies",
    )
    rewards: dict[str, float] = Field(
        default_factory=lambda: {"BLEU_4": 1.0, "CIDEr": 1.0, "ROUGE_L": 1.0},
        description="scores of a report and their weights; CIDEr is divided by 10",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_known("rewards", self.rewards, REWARDS)
        return self


class TrainSettings(LoopSettings):
    """Training of stage 3; its validation also writes and scores reports."""

    validation_limit: int | None = Field(
        None, ge=1, description="number of studies with generated reports in a validation; null: all"
    )
    findings_weight: float = FINDINGS_WEIGHT
    findings_balance: float = FINDINGS_BALANCE
    self_critical: SelfCriticalSettings | None = Field(
        None,
        description="training on sampled reports by their scores; null: only cross-entropy, {}: its default settings",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="fraction of each target spread over the vocabulary, in training"
    )
    select: Literal["score", "loss"] = Field("score", description="criterion of the best checkpoint")
    score_weights: dict[str, float] = Field(
        default_factory=lambda: {"BLEU_4": 0.8, "CIDEr": 0.2},
        description="scores that select: score adds, and their weights; any of " + ", ".join(SELECTION_SCORES),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_known("score_weights", self.score_weights, SELECTION_SCORES)
        return self


class GenerationSettings(Settings):
    engine: Literal["auto", "own", "transformers"] = Field(
        "auto", description="how reports are decoded; auto: our own engine if it supports the LLM"
    )
    batch_size: int = Field(8, ge=1, description="number of studies decoded at a time on one device")
    num_beams: int = Field(3, ge=1, description="beams of the beam search; 1: none")
    min_new_tokens: int = Field(0, ge=0, description="shortest report, in LLM tokens")
    max_new_tokens: int = Field(120, ge=1, description="longest report, in LLM tokens")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: repeated tokens become less likely")
    length_penalty: float = Field(1.0, description="above 0: beam search prefers longer reports; below 0: shorter ones")
    beam_stop: Literal["running", "candidates"] = Field(
        "running",
        description="beam search stops when finished reports beat the running beams, or all candidates of the step, "
        "as in transformers 4.44 and the published scores",
    )
    no_repeat_ngram_size: int = Field(0, ge=0, description="no sequence of this many tokens occurs twice; 0: no limit")
    do_sample: bool = Field(False, description="draws tokens at random instead of taking the likeliest")
    temperature: float = Field(1.0, gt=0, description="with do_sample: lower is less random")
    top_p: float = Field(
        1.0, gt=0, le=1, description="with do_sample: only the likeliest tokens, up to this sum of probabilities"
    )
    top_k: int = Field(0, ge=0, description="with do_sample: only this many likeliest tokens; 0: no limit")
    seed: int = Field(0, ge=0, lt=SEEDS, description="with do_sample: random seed")
    consensus: int | None = Field(
        None,
        ge=2,
        description="number of reports sampled for each study, of which the one is kept that agrees best with all of "
        "them; needs do_sample, with a temperature of about 0.7. null: one report is decoded",
    )
    consensus_scores: dict[str, float] = Field(
        default_factory=lambda: {"BLEU_1": 1.0, "ROUGE_1": 0.5, "F1_rules": 0.3, "findings": 0.8},
        description="scores of the agreement, and their weights; more of ROUGE_1 or "
        "word_recall (of different words) makes reports longer, and more of "
        "findings keeps findings that fewer samples have",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.consensus is not None and (self.num_beams > 1 or not self.do_sample):
            raise ValueError("consensus needs num_beams: 1 and do_sample: true; for other decoding set consensus: null")
        _require_known("consensus_scores", self.consensus_scores, AGREEMENTS)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is larger than max_new_tokens {self.max_new_tokens}"
            )
        if not self.do_sample and (self.temperature != 1.0 or self.top_p != 1.0 or self.top_k != 0):
            raise ValueError("temperature, top_p and top_k have an effect only with do_sample: true")
        return self


class EvaluationSettings(Settings):
    references: Literal["whole", "clipped"] = Field(
        "whole", description="clipped: references are cut to data.max_report_tokens, as in the released code"
    )
    tokenizer: Tokenizer = Field(
        "whitespace", description="how texts are split into words before they are scored; ptb needs Java"
    )
    samples: bool = Field(False, description="also write the samples of generation.consensus, to samples.jsonl")


class FinetuneRecipe(Settings):
    """Stage 3: X-ray to report."""

    stage: Literal["finetune"]
    protocol: Protocol = Field(
        "ours", description="sets section, cleaning, reference clipping, backbone freezing and decoding together"
    )
    output: str | None = Field(None, description="run directory; null: runs/<recipe>")
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
