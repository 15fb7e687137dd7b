"""Puts findings into the prompt as words, because the decoder alone tends to write the most common report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emrrg_cli.labeling import ABNORMAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FindingsPrompt:
    """Makes the embeddings of each finding: its name, and one embedding for yes or no.

    Args:
        names: Names of the findings.
        threshold: Probability from which a finding counts as present; None: the embedding is the mean of those of
            "yes" and "no", weighted by the probability.
        labels_in_training: Whether the prompt of a training step has the findings of the reference report instead of
            the predictions of the head, so that the decoder learns to follow the prompt.
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
        # Support devices do not matter for "No Finding", as in CheXpert's labels.
        self._others = [name in ABNORMAL and name != "Support Devices" for name in names]
        self._no_finding = names.index("No Finding") if "No Finding" in names else None
        self.threshold = threshold
        self.labels_in_training = labels_in_training

    def __call__(self, embed: Any, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns the words as embeddings, `[b, w, hidden]`. The head gets no gradient from them.

        Args:
            embed: The LLM's input embedding.
            logits: Output of the findings head, `[b, findings]`.
            labels: `[b, findings]`, used instead of the logits: 1 for a present finding, 0 for an absent one, NaN for
                an uncertain one, which gets the mean of yes and no.
        """
        probability = logits.detach().sigmoid()
        if labels is not None:
            probability = labels.nan_to_num(0.5)
        elif self.threshold is not None:
            probability = self.consistent(probability >= self.threshold).to(probability.dtype)
        yes, no, *names = (embed(torch.tensor(ids).to(probability.device)) for ids in self.words)
        states = probability[..., None] * yes.mean(dim=0) + (1 - probability[..., None]) * no.mean(dim=0)
        parts = [(name.expand(len(probability), -1, -1), states[:, k : k + 1]) for k, name in enumerate(names)]
        return torch.cat([part for pair in parts for part in pair], dim=1)

    def consistent(self, present: Tensor) -> Tensor:
        """Returns `present`, bool `[..., findings]`, but "No Finding" is present exactly if no other finding is.

        The labels have the same rule. A prompt with both never occurs in training and leads to contradictory reports.
        """
        if self._no_finding is not None:
            others = torch.tensor(self._others).to(present.device)
            present = present.clone()
            present[..., self._no_finding] = ~(present & others).any(dim=-1)
        return present
