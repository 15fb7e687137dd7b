"""A head that tells findings from the encoder's tokens, trained beside the objective of a stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FindingsHead(nn.Module):
    """One logit a finding and study: a weighted mean of what each token says, the weights learned for each finding.

    A finding of a few patches is seen so, where a plain mean over the tokens would drown it.

    Args:
        d_model: width of the encoder's tokens.
        findings: how many.

    Source: attention-based multiple instance learning (Ilse et al., arXiv 1802.04712), with a linear attention.
    """

    balance: Tensor

    def __init__(self, d_model: int, findings: int) -> None:
        super().__init__()
        self.attention = nn.Linear(d_model, findings)
        self.evidence = nn.Linear(d_model, findings)
        nn.init.zeros_(self.attention.weight)  # starts as the plain mean
        nn.init.zeros_(self.attention.bias)
        self.weight = 1.0  # of the loss
        self.register_buffer("balance", torch.ones(findings), persistent=False)

    def forward(self, tokens: Tensor, views: Tensor) -> Tensor:
        """Logits `[b, findings]`, fp32.

        Args:
            tokens: `[n, l, d]`, the views of all studies one after the other.
            views: int64 `[b]`, views of each study, summing to `n`.
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
        """`weight` times the cross-entropy, a mean over the findings of each study that are known, summed over studies.

        A finding that is there counts `balance` times.

        Args:
            targets: `[b, findings]`, 1 where a finding is there, 0 where not, NaN where nobody knows.
        """
        logits = self(tokens, views)
        known = targets.isfinite()
        losses = F.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(), pos_weight=self.balance, reduction="none"
        )
        each = (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        loss: Tensor = self.weight * each.sum()
        return loss

    def set_balance(self, targets: Tensor, most: float) -> None:
        """Weighs each finding that is there so that over all studies both sides count alike.

        Args:
            targets: those of all training studies, `[studies, findings]`.
            most: the largest weight, at least 1; 1 weighs nothing, so that the outputs are probabilities.
        """
        there, absent = (targets == 1).sum(dim=0), (targets == 0).sum(dim=0)
        self.balance.copy_((absent / there.clamp(min=1)).clamp(1 / most, most))
