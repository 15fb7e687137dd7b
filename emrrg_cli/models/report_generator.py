"""EMRRG: vision Mamba, bridge and LLM with hybrid decoder layers, from X-rays to report tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emrrg_cli.datasets.context import NO_TOKEN, encode_contexts, prompt_parts
from emrrg_cli.datasets.report_dataset import IGNORE, Batch
from emrrg_cli.models.adapters import plain
from emrrg_cli.models.augment import augmented
from emrrg_cli.models.findings_head import FindingsHead
from emrrg_cli.models.findings_prompt import FindingsPrompt
from emrrg_cli.models.hybrid_decoder import hybrid_parameters
from emrrg_cli.models.outputs import StageOutput
from emrrg_cli.models.views import average_views, concatenate_views, pool_patches
from emrrg_cli.vocabulary import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED_PROMPT, VIEW_TOKENS, ContextField

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from emrrg_cli.recipe.common import AugmentSettings


Contexts = Sequence[Mapping[ContextField, str]]


class Bridge(nn.Module):
    """`Linear(d -> hidden)` and LayerNorm: encoder tokens `[..., d]` to visual tokens `[..., hidden]`."""

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(tokens))
        return out


class ReportGenerator(nn.Module):
    """The stage 3 model; its forward pass is the training objective.

    Args:
        encoder: `ArmEncoder`, with or without PEFT adapters.
        llm: Hugging Face causal LM, with or without hybrid layers (`add_hybrid_layers`) and adapters.
        tokenizer: Tokenizer of the LLM.
        visual_prompt: `full` puts every visual token into the prompt, `pooled` the class token and 2x2 averages of
            the patches. Hybrid layers attend to every token in both cases.
        views: `average` takes the mean of a study's views token by token, `concat` puts them one after the other.
        begin_token_id: First token of the prompt; None: the tokenizer's, if it has one.
        end_text: Text that ends a report instead of the tokenizer's end token; generated text is cut there.
        prompt: Text with `<ImageHere>` once, which the visual tokens replace. The context of a study replaces
            `<ContextHere>`, or follows the visual tokens.

    Source: EMRRG (arXiv 2510.16776) section 3.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        visual_prompt: str = "full",
        views: str = "average",
        begin_token_id: int | None = None,
        end_text: str | None = None,
        prompt: str = PUBLISHED_PROMPT,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.llm = llm
        self.tokenizer = tokenizer
        self.augment: AugmentSettings | None = None  # used only in training
        self.findings: FindingsHead | None = None
        self.findings_prompt: FindingsPrompt | None = None
        self.report_tokens = 1.0  # mean number per training report; factor of the findings loss, which counts studies
        self.label_smoothing = 0.0  # only in training, not in the validation loss
        self.view_embedding: nn.Parameter | None = None  # [3, d], a row for each of VIEW_TOKENS
        self.visual_prompt = visual_prompt
        self.views = views
        self.end_text = end_text
        self.bridge = Bridge(plain(encoder).d_model, llm.config.hidden_size)
        self.hybrid = any(True for _ in hybrid_parameters(llm))
        first = tokenizer.bos_token_id if begin_token_id is None else begin_token_id
        begin = [] if first is None else [first]
        before, self.between, self.after = (
            tokenizer.encode(part, add_special_tokens=False) if part else [] for part in prompt_parts(prompt)
        )
        self.before = begin + before
        self.pad_token_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def add_findings_head(self, findings: int, prompt: FindingsPrompt | None = None) -> None:
        """Adds a head that predicts findings from the encoder's tokens; `prompt` puts its predictions in the prompt."""
        self.findings = FindingsHead(self.bridge.proj.in_features, findings)
        self.findings_prompt = prompt

    def add_view_embedding(self) -> None:
        """Adds an embedding for frontal and lateral views. It starts at zero, so the output is at first unchanged."""
        self.view_embedding = nn.Parameter(torch.zeros(len(VIEW_TOKENS), self.bridge.proj.in_features))

    # -- text ---------------------------------------------------------------------------------------------------

    def encode_report(self, report: str, max_tokens: int | None = None) -> list[int]:
        """Returns the label tokens of a report; see `encode_report`."""
        return encode_report(self.tokenizer, report, max_tokens, end_text=self.end_text)

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """Returns the report of generated tokens, without special tokens."""
        # Scores compare words with the spaces of R2Gen's rule, so the tokenizer must not remove the space in " .".
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self.end_text is not None:
            text = text.split(self.end_text)[0]
        return " ".join(text.split())

    # -- image --------------------------------------------------------------------------------------------------

    def visual_tokens(self, pixels: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Encodes studies.

        Args:
            pixels: uint8 `[n, size, size]`, the views of all studies one after the other.
            views: int64 `[b]`, number of views of each study, summing to `n`.

        Returns:
            Prompt tokens `[b, p, hidden]`, all visual tokens `[b, m, hidden]`, and for each a mask `[b, p]`, `[b, m]`
            that is true for real tokens (None if all are real).
        """
        return self.join_views(self.encode(pixels), views)

    def encode(self, pixels: Tensor, projections: Tensor | None = None) -> Tensor:
        """Returns the tokens of images for the decoder: `encode_films`, then `with_view_embedding`."""
        return self.with_view_embedding(self.encode_films(pixels), projections)

    def encode_films(self, pixels: Tensor) -> Tensor:
        """Returns the encoder's tokens `[n, l + 1, d]` of images, uint8 `[n, size, size]`; augmented in training."""
        grey = augmented(pixels, self.augment) if self.training and self.augment else pixels.float()
        tokens: Tensor = self.encoder((grey[:, None] / 255 - self.mean) / self.std)
        return tokens

    def with_view_embedding(self, tokens: Tensor, projections: Tensor | None) -> Tensor:
        """Adds the embedding of the view to tokens `[n, l, d]`, if the model has view embeddings.

        Args:
            projections: int64 `[n]`, indices into `VIEW_TOKENS`; None: all unknown.
        """
        if self.view_embedding is None:
            return tokens
        places = torch.zeros(len(tokens), dtype=torch.long) if projections is None else projections
        # A product rather than indexing: its gradient is summed in the same order on every run.
        chosen = F.one_hot(places.to(tokens.device), len(VIEW_TOKENS)).to(self.view_embedding.dtype)
        return tokens + (chosen @ self.view_embedding)[:, None].to(tokens.dtype)

    def join_views(self, tokens: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns the result of `visual_tokens` from the encoder's tokens `[n, l + 1, d]`."""
        pooled = pool_patches(tokens) if self.visual_prompt == "pooled" else tokens
        if self.views == "average":
            prompt, full = self.bridge(average_views(pooled, views)), None
            if pooled is not tokens:
                full = self.bridge(average_views(tokens, views))
            return prompt, prompt if full is None else full, None, None
        prompt, prompt_mask = concatenate_views(self.bridge(pooled), views)
        if pooled is tokens:
            return prompt, prompt, prompt_mask, prompt_mask
        full, full_mask = concatenate_views(self.bridge(tokens), views)
        return prompt, full, prompt_mask, full_mask

    def prompt(
        self, pixels: Tensor, views: Tensor, contexts: Contexts = (), projections: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Returns the prompts of studies: embeddings `[b, p, hidden]`, mask `[b, p]`, visual arguments of the LLM.

        Args:
            pixels, views: As in `visual_tokens`.
            contexts: The context of each study (`emrrg_cli.datasets.context`); empty: no study has one.
            projections: As in `encode`.
        """
        return self.prompt_of(self.encode(pixels, projections), views, contexts)

    def prompt_of(
        self, tokens: Tensor, views: Tensor, contexts: Contexts = (), findings: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Returns the prompts from the tokens of `encode`; `findings` `[b, findings]` replace the head's output."""
        visual, full, visual_mask, full_mask = self.join_views(tokens, views)
        embed = self.llm.get_input_embeddings()
        b, device = len(visual), visual.device
        # Made on the CPU and copied: with `device=`, the host would wait until the device has finished its work.
        texts = (torch.tensor(ids, dtype=torch.long) for ids in (self.before, self.between, self.after))
        before, between, after = (embed(ids.to(device, non_blocking=True)).expand(b, -1, -1) for ids in texts)
        parts: list[tuple[Tensor, Tensor | None]] = [(before, None), (visual, visual_mask)]
        if self.findings is not None and self.findings_prompt is not None:
            parts.append((self.findings_prompt(embed, self.findings(tokens, views), findings), None))
        parts.append((between, None))
        context = encode_contexts(self.tokenizer, contexts)
        if context is not None:
            context = context.to(device, non_blocking=True)
            parts.append((embed(context.clamp(min=0)), context != NO_TOKEN))
        parts.append((after, None))
        embeddings = torch.cat([part.to(before.dtype) for part, _ in parts], dim=1)
        masks = [torch.ones(part.shape[:2], device=device) if real is None else real for part, real in parts]
        mask = torch.cat([real.long() for real in masks], dim=1)
        arguments = {"visual_tokens": full, "visual_mask": full_mask} if self.hybrid else {}
        return embeddings, mask, arguments

    # -- objective and generation -------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> StageOutput:
        """Returns the cross-entropy summed over the report tokens (EOS included); prompt tokens have no loss.

        In training, the loss of the findings head is added, if the model has one.
        """
        assert batch.labels is not None
        tokens = self.encode(batch.pixels, batch.projections)
        prompt, prompt_mask, visual = self.prompt_of(tokens, batch.views, batch.contexts, self._known_findings(batch))
        labels = batch.labels
        if (samples := len(labels) // len(prompt)) > 1:
            prompt, prompt_mask = (t.repeat_interleave(samples, dim=0) for t in (prompt, prompt_mask))
            visual = {name: None if t is None else t.repeat_interleave(samples, dim=0) for name, t in visual.items()}
        real = labels != IGNORE
        report = self.llm.get_input_embeddings()(labels.masked_fill(~real, self.pad_token_id))
        mask = torch.cat([prompt_mask, real.long()], dim=1)
        # Positions count real tokens, as in generation, so that a missing view leaves no gap.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self.llm(
            inputs_embeds=torch.cat([prompt, report.to(prompt.dtype)], dim=1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=labels.shape[1] + 1,  # the last prompt token predicts the first of the report
            **visual,
        ).logits[:, :-1]
        loss = self._report_loss(logits.float(), batch)
        if self.findings is not None and self.training and batch.findings is not None:
            loss = loss + self.report_tokens * self.findings.loss_sum(tokens, batch.views, batch.findings)
        return StageOutput(loss, real.sum())

    def _known_findings(self, batch: Batch) -> Tensor | None:
        # Sampled reports were generated from the head's own predictions, so they are trained with the same.
        follows = self.findings_prompt is not None and self.findings_prompt.labels_in_training
        return batch.findings if follows and self.training and batch.advantages is None else None

    def _report_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        # [r, t, vocabulary] -> the sum over tokens; sampled reports are weighted by their advantages
        assert batch.labels is not None
        targets = batch.labels.flatten()
        if batch.advantages is None:
            smoothing = self.label_smoothing if self.training else 0.0
            flat = logits.flatten(0, 1)
            return F.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
        if batch.temperatures is not None:
            logits = logits / batch.temperatures[:, None, None]
        losses = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="none")
        return (losses.view(batch.labels.shape).sum(dim=1) * batch.advantages).sum()

    @torch.no_grad()
    def generate(self, pixels: Tensor, views: Tensor, config: GenerationConfig, contexts: Contexts = ()) -> list[str]:
        """Writes a report for each study.

        Args:
            pixels, views, contexts: As in `prompt`.
            config: Decoding options. The padding, begin and end tokens are set here.
        """
        prompt, mask, visual = self.prompt(pixels, views, contexts)
        config.pad_token_id = self.pad_token_id
        config.eos_token_id = self.tokenizer.eos_token_id
        config.bos_token_id = self.tokenizer.bos_token_id
        tokens = self.llm.generate(inputs_embeds=prompt, attention_mask=mask, generation_config=config, **visual)
        return [self.decode(row) for row in tokens]

    def train(self, mode: bool = True) -> ReportGenerator:
        """Sets the mode, but frozen towers stay in evaluation mode: dropout would only add noise to them.

        The LLM counts as frozen if only hybrid layers and LoRA are trained in it; the dropout of LoRA stays on.
        """
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self.encoder.eval()
        plain(self.encoder).freeze_mixers()  # frozen weights change only between two calls of `train`
        if not self._llm_is_trained():
            for name, module in self.llm.named_modules():
                # Gradient checkpointing of the decoder layers works only in training mode.
                module.training = mode and (".lora_dropout" in name or getattr(module, "gradient_checkpointing", False))
        return self

    def _llm_is_trained(self) -> bool:
        added = {name for name, _ in hybrid_parameters(self.llm)}
        own = (p for name, p in self.llm.named_parameters() if name not in added and ".lora_" not in name)
        return any(parameter.requires_grad for parameter in own)

    # -- parameters ---------------------------------------------------------------------------------------------

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Trades time for memory: encoder blocks and decoder layers are computed again in the backward pass."""
        plain(self.encoder).gradient_checkpointing = enabled
        llm = plain(self.llm)
        if enabled:
            # Reentrant checkpointing would give the visual tokens, a keyword argument, no gradient.
            llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif llm.is_gradient_checkpointing:
            llm.gradient_checkpointing_disable()
        self.train(self.training)

    def bridge_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters that every run trains: bridge, view embedding, hybrid layers and findings head.

        The names are those of a model without adapters, so that they do not depend on the targets of LoRA.
        """
        yield from self.bridge.named_parameters(prefix="bridge")
        if self.view_embedding is not None:
            yield "view_embedding", self.view_embedding
        if self.findings is not None:
            yield from self.findings.named_parameters(prefix="findings")
        for name, parameter in hybrid_parameters(plain(self.llm)):
            yield f"llm.{name}", parameter


def encode_report(
    tokenizer: PreTrainedTokenizerBase,
    report: str,
    max_tokens: int | None = None,
    *,
    end_at_limit: bool = True,
    end_text: str | None = None,
) -> list[int]:
    """Returns the label tokens of a report. A report that is cut has no end token.

    Args:
        end_at_limit: Whether a report of exactly `max_tokens` tokens gets an additional end token.
        end_text: Text that ends a report instead of the tokenizer's end token.
    """
    tokens: list[int] = tokenizer.encode(report, add_special_tokens=False)
    end = [tokenizer.eos_token_id] if end_text is None else tokenizer.encode(end_text, add_special_tokens=False)
    if max_tokens is None:
        return tokens + end
    if end_at_limit and len(tokens) <= max_tokens:
        return tokens + end
    return (tokens + end)[:max_tokens]
