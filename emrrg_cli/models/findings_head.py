"""A head that predicts findings from the encoder's tokens. Its loss is added to the loss of a stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FindingsHead(nn.Module):
    """Predicts one logit per finding and study: a weighted mean over the tokens, with learned weights per finding.

    It can detect a finding that covers only a few patches, which a plain mean over the tokens would hide.

    Args:
        d_model: Width of the encoder's tokens.
        findings: Number of findings.

    Source: attention-based multiple instance learning (Ilse et al., arXiv 1802.04712), with a linear attention.
    """

    balance: Tensor

    def __init__(self, d_model: int, findings: int) -> None:
        super().__init__()
        self.attention = nn.Linear(d_model, findings)
        self.evidence = nn.Linear(d_model, findings)
        nn.init.zeros_(self.attention.weight)  # starts as the plain mean
        nn.init.zeros_(self.attention.bias)
        self.weight = 1.0  # factor of the loss
        self.register_buffer("balance", torch.ones(findings), persistent=False)

    def forward(self, tokens: Tensor, views: Tensor) -> Tensor:
        """Returns logits `[b, findings]`, fp32.

        Args:
            tokens: `[n, l, d]`, the views of all studies one after the other.
            views: int64 `[b]`, number of views of each study, summing to `n`.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            attention, evidence = self.attention(tokens), self.evidence(tokens)  # [n, l, findings]
            strength = attention.exp()
            # Sums over the tokens of all views of a study, in the same order on every run.
            studies = torch.arange(len(views), device=views.device)
            study = torch.repeat_interleave(studies, views, output_size=len(tokens))
            member = F.one_hot(study, len(views)).T.to(tokens.dtype)  # [b, n]
            total: Tensor = member @ (strength * evidence).sum(dim=1)
            share: Tensor = total / (member @ strength.sum(dim=1))
            return share

    def loss_sum(self, tokens: Tensor, views: Tensor, targets: Tensor) -> Tensor:
        """Returns `weight` times the cross-entropy: mean over the known findings of a study, summed over studies.

        A present finding counts `balance` times.

        Args:
            targets: `[b, findings]`, 1 for a present finding, 0 for an absent one, NaN if unknown. The head learns the
                first findings, as many as it has outputs.
        """
        logits = self(tokens, views)
        targets = targets[:, : logits.shape[1]]
        known = targets.isfinite()
        losses = F.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(), pos_weight=self.balance, reduction="none"
        )
        each = (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        loss: Tensor = self.weight * each.sum()
        return loss

    def set_balance(self, targets: Tensor, most: float) -> None:
        """Weights present findings so that, over all studies, present and absent count equally for each finding.

        Args:
            targets: The targets of all training studies, `[studies, findings]`.
            most: The largest weight, at least 1. With 1 there are no weights, so that the outputs are probabilities.
        """
        targets = targets[:, : len(self.balance)]
        present, absent = (targets == 1).sum(dim=0), (targets == 0).sum(dim=0)
        self.balance.copy_((absent / present.clamp(min=1)).clamp(1 / most, most))
