"""The stage 2 model: an image tower and a text tower with a contrastive loss over the pairs of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from emrrg_cli.datasets.align_dataset import PairBatch
from emrrg_cli.errors import UsageError
from emrrg_cli.models.augment import augmented
from emrrg_cli.models.findings_head import FindingsHead
from emrrg_cli.models.outputs import StageOutput
from emrrg_cli.models.views import average_views
from emrrg_cli.vocabulary import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from emrrg_cli.models.arm.encoder import ArmEncoder
    from emrrg_cli.recipe.common import AugmentSettings

FIRST_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class Contrast(NamedTuple):
    """The losses of some pairs of a batch, and the gradients of the loss of the whole batch.

    `losses`: `[n]`, one per pair; `image`, `text`: `[n, dim]`, gradients of the loss summed over the WHOLE batch, with
    respect to the embeddings of these pairs; `scale`: scalar, their share of the gradient of `logit_scale`.
    """

    losses: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor

    def loss_sum(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        """Returns the sum of `losses` (scalar). Its gradients are the stored gradients of the whole batch."""
        carrier = (self.image * image).sum() + (self.text * text).sum() + self.scale * logit_scale
        return carrier - carrier.detach() + self.losses.sum()

    def split(self, sizes: Sequence[int]) -> list[Contrast]:
        """Splits the pairs into consecutive groups of the given sizes."""
        rows = (torch.split(tensor, list(sizes)) for tensor in (self.losses, self.image, self.text))
        shares = [self.scale * (size / sum(sizes)) for size in sizes]
        return [Contrast(*part) for part in zip(*rows, shares, strict=True)]


@dataclass(frozen=True)
class CachedPairs:
    """Pairs with the gradients of their embeddings, and the random state of their first forward pass."""

    pairs: PairBatch
    contrast: Contrast
    rng: Tensor
    cuda_rng: Tensor | None

    def to(self, device: torch.device) -> CachedPairs:
        """Moves the pairs to `device`; the gradients are already there."""
        return replace(self, pairs=self.pairs.to(device))


class Alignment(nn.Module):
    """The stage 2 model; its forward pass is the training objective.

    An image embedding is the mean over a study's views of the mean over the encoder's tokens (the class token is one
    of them), a text embedding the last attended token's hidden state or the mean over the attended tokens. Each goes
    through a Linear to `dim` and is L2-normalised. The loss is the symmetric cross-entropy over the similarities of
    all images with all texts, times `exp(logit_scale)`.

    The negatives of a pair are all other pairs of the batch, even if their report is the same. This includes pairs of
    other processes (embeddings are gathered) and of other micro-batches (gradients are cached). Each process computes
    the loss of the whole batch, which is cheap, and so gets the complete gradient of its own embeddings without
    further communication.

    `logit_scale` is limited to `log 100`. At the limit, only gradients that lower it are applied, so that it does not
    grow further but can still decrease.

    Args:
        encoder: `ArmEncoder`.
        text_encoder: Hugging Face model whose output has `last_hidden_state` `[b, t, hidden_size]`.
        tokenizer: Tokenizer of the text tower.
        dim: Width of the common embedding space.
        pooling: `last` or `mean`.
        max_text_tokens: Texts are cut to this number of tokens, special tokens included.

    Source: MambaXray-VL (arXiv 2410.00379) section 3; CLIP (arXiv 2103.00020); GradCache (arXiv 2101.06983).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: ArmEncoder,
        text_encoder: Any,
        tokenizer: PreTrainedTokenizerBase,
        dim: int = 2048,
        pooling: str = "last",
        max_text_tokens: int = 128,
    ) -> None:
        super().__init__()
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling must be last or mean, got {pooling}")
        self.encoder = encoder
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.augment: AugmentSettings | None = None  # used only in training
        self.findings: FindingsHead | None = None
        self.pooling = pooling
        self.max_text_tokens = max_text_tokens
        self.vision_proj = nn.Linear(encoder.d_model, dim)
        self.text_proj = nn.Linear(text_encoder.config.hidden_size, dim)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    # -- embeddings ---------------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor) -> Tensor:
        """Returns the encoder's tokens `[n, l + 1, d]` of images, uint8 `[n, size, size]`; augmented in training."""
        grey = augmented(pixels, self.augment) if self.training and self.augment else pixels.float()
        tokens: Tensor = self.encoder((grey[:, None] / 255 - self.mean) / self.std)
        return tokens

    def _image_embeddings(self, tokens: Tensor, views: Tensor) -> Tensor:
        studies = average_views(tokens.mean(dim=1, keepdim=True), views)[:, 0]  # [b, d]
        return F.normalize(self.vision_proj(studies).float(), dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the embeddings of texts, fp32 `[b, dim]`, with norm 1.

        Args:
            input_ids, attention_mask: int64 `[b, t]`; the mask is 1 for real tokens. Padding may be on either side.
        """
        hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.text_proj(pool_text(hidden, attention_mask, self.pooling)).float(), dim=-1)

    def embed(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Returns the embeddings of the images and the texts of a batch, each fp32 `[b, dim]`."""
        return self._embed(batch)[1:]

    def _embed(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        # The encoder's tokens and both embeddings.
        tokens = self.encode(batch.pixels)
        text = self.embed_texts(batch.input_ids, batch.attention_mask)
        return tokens, self._image_embeddings(tokens, batch.views), text

    # -- objective ----------------------------------------------------------------------------------------------

    def forward(self, batch: PairBatch | CachedPairs) -> StageOutput:
        """Returns the loss summed over the pairs of this micro-batch; the negatives are all pairs of the batch.

        All processes must call this at the same time, with the same number of pairs.
        """
        if isinstance(batch, CachedPairs):
            device = self.logit_scale.device
            with torch.random.fork_rng(devices=[device] if batch.cuda_rng is not None else []):
                torch.set_rng_state(batch.rng)
                if batch.cuda_rng is not None:
                    torch.cuda.set_rng_state(batch.cuda_rng, device)
                tokens, image, text = self._embed(batch.pairs)
            pairs, contrast = batch.pairs, batch.contrast
        else:
            tokens, image, text = self._embed(batch)
            pairs, contrast = batch, self.contrast(image, text, batch.paired)
        loss = contrast.loss_sum(image, text, self.logit_scale)
        if self.findings is not None and self.training and pairs.findings is not None:
            loss = loss + self.findings.loss_sum(tokens, pairs.views, pairs.findings)
        return StageOutput(loss, torch.tensor(len(image)))

    @torch.no_grad()
    def cache_gradients(self, batches: Sequence[PairBatch]) -> list[CachedPairs]:
        """Prepares the micro-batches of a step by gradient caching, so that each can have its own backward pass.

        All micro-batches are embedded without an autograd graph, and the loss of the whole batch gives the gradient of
        every embedding. `forward` then embeds each micro-batch again, with the same random numbers, and continues the
        backward pass from these gradients. This gives the gradient of the whole batch with the memory of one
        micro-batch, in about a third more time.
        """
        device = self.logit_scale.device
        states, images, texts = [], [], []
        paired = None if batches[0].paired is None else torch.cat([b.paired for b in batches if b.paired is not None])
        for batch in batches:
            states.append((torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None))
            image, text = self.embed(batch)
            images.append(image)
            texts.append(text)
        contrast = self.contrast(torch.cat(images), torch.cat(texts), paired).split([len(batch) for batch in batches])
        parts = zip(batches, contrast, states, strict=True)
        return [CachedPairs(batch, part, *state) for batch, part, state in parts]

    def contrast(self, image: Tensor, text: Tensor, paired: Tensor | None = None) -> Contrast:
        """Computes the loss over the pairs of all processes, and its gradients for the pairs of this process.

        Args:
            image, text: fp32 `[n, dim]`, embeddings of the pairs of this process, with norm 1.
            paired: bool `[n]`, false for films without a report, which are left out of the loss; None: all have one.
                The losses are scaled so that their mean over all films is the mean over the pairs.
        """
        n, rank, world_size = len(image), 0, 1
        if dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        own = slice(rank * n, (rank + 1) * n)
        with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
            images, texts = (_gathered(part.detach(), world_size).requires_grad_() for part in (image, text))
            scale = self.logit_scale.detach().clamp(max=MAX_LOGIT_SCALE).requires_grad_()
            if paired is None:
                losses = contrastive_losses(images, texts, scale.exp())
            else:
                losses = _losses_of_pairs(images, texts, scale.exp(), _gathered(paired.float(), world_size) > 0)
            to_images, to_texts, to_scale = torch.autograd.grad(losses.sum(), (images, texts, scale))
        climbs = (self.logit_scale >= MAX_LOGIT_SCALE) & (to_scale < 0)
        # Every process has the gradient of the whole batch for the scale, so each contributes an equal share of it.
        to_scale = torch.where(climbs, 0.0, to_scale / world_size)
        return Contrast(losses.detach()[own], to_images[own], to_texts[own], to_scale.detach())

    # -- training -----------------------------------------------------------------------------------------------

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Trades time for memory: blocks and layers of both towers are computed again in the backward pass.

        Raises:
            UsageError: The text tower does not support it.
        """
        self.encoder.gradient_checkpointing = enabled
        if not enabled:
            self.text_encoder.gradient_checkpointing_disable()
            return
        try:
            self.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise UsageError(
                f"train.gradient_checkpointing: {error}", hint="Set it to false and train.micro_batch_size lower."
            ) from error

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the two projections and `logit_scale`, by name."""
        towers = ("encoder.", "text_encoder.", "findings.")
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith(towers)}

    def train(self, mode: bool = True) -> Alignment:
        """Sets the mode, but a frozen text tower stays in evaluation mode: dropout would only add noise to it."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.text_encoder.parameters()):
            self.text_encoder.eval()
        return self


def contrastive_losses(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Returns the symmetric cross-entropy of each pair, `[b]`: the mean of image to text and text to image.

    Args:
        images, texts: `[b, dim]`, with norm 1; row `i` of both is a pair.
        scale: Factor of the similarities, the inverse of the temperature.
    """
    logits = scale * images @ texts.T  # [b, b]
    targets = torch.arange(len(images), device=images.device)
    by_image = F.cross_entropy(logits, targets, reduction="none")
    by_text = F.cross_entropy(logits.T, targets, reduction="none")
    return (by_image + by_text) / 2


def _losses_of_pairs(images: Tensor, texts: Tensor, scale: Tensor, paired: Tensor) -> Tensor:
    # [b], 0 for films without a report; scaled so that the mean over all films is the mean over the pairs
    places = paired.nonzero().flatten()
    losses = (images.sum(dim=1) + texts.sum(dim=1)) * 0 + scale * 0
    if not len(places):
        return losses
    share = len(paired) / len(places)
    return losses.index_add(0, places, share * contrastive_losses(images[places], texts[places], scale))


def pool_text(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Returns one vector for each text: `[b, t, h] -> [b, h]`.

    Args:
        attention_mask: `[b, t]`, 1 for real tokens. Padding may be on either side.
        pooling: `last`, the last attended token, or `mean`, the mean over the attended tokens.
    """
    if pooling == "mean":
        weights = attention_mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (positions * attention_mask).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _gathered(rows: Tensor, world_size: int) -> Tensor:
    # [n, dim] of each process -> [world_size * n, dim] in rank order, always a new tensor
    if world_size == 1:
        return rows.clone()
    every = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(every, rows.contiguous())
    return torch.cat(every)
