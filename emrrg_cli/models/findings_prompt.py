"""Findings as words in the prompt, for a decoder that would else write what most reports say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FindingsPrompt:
    """Says of each finding whether it is there: its name, and one embedding for yes or no.

    Args:
        names: of the findings.
        threshold: probability from which a finding is there; None: the embedding stands between those of "yes" and
            "no", by the probability.
        labels_in_training: the prompt of a training step says what the reference report says, not what the head
            predicts; so the decoder learns to follow it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        *,
        threshold: float | None = None,
        labels_in_training: bool = False,
    ) -> None:
        texts = (" yes", " no", *(f" {name.lower()}:" for name in names))
        self.words = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self.threshold = threshold
        self.labels_in_training = labels_in_training

    def __call__(self, embed: Any, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """The words as embeddings, `[b, w, hidden]`; they do not train the head, which is to be true, not of use.

        Args:
            embed: The LLM's input embedding.
            logits: Of the head on findings, `[b, findings]`.
            labels: `[b, findings]` for a step that goes by them: 1 where a finding is there, 0 where not, NaN where the
                report is uncertain, which stands between yes and no.
        """
        there = logits.detach().sigmoid()
        if labels is not None:
            there = labels.nan_to_num(0.5)
        elif self.threshold is not None:
            there = (there >= self.threshold).to(there.dtype)
        yes, no, *names = (embed(torch.tensor(ids).to(there.device)) for ids in self.words)
        states = there[..., None] * yes.mean(dim=0) + (1 - there[..., None]) * no.mean(dim=0)
        parts = [(name.expand(len(there), -1, -1), states[:, k : k + 1]) for k, name in enumerate(names)]
        return torch.cat([part for pair in parts for part in pair], dim=1)
