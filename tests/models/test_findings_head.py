"""The head on findings: its pooling, loss and gradient against literal computations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from emrrg_cli.datasets.finding_targets import FINDINGS, finding_targets
from emrrg_cli.models.findings_head import FindingsHead

NAN = math.nan


@pytest.fixture
def head() -> FindingsHead:
    torch.manual_seed(0)
    made = FindingsHead(8, 3)
    torch.nn.init.normal_(made.attention.weight)
    return made


def test_a_fresh_head_takes_the_mean_of_the_tokens() -> None:
    torch.manual_seed(0)
    fresh, tokens = FindingsHead(8, 3), torch.randn(2, 5, 8)
    assert torch.allclose(fresh(tokens, torch.tensor([1, 1])), fresh.evidence(tokens).mean(dim=1), atol=1e-6)


def test_logits_weigh_all_tokens_of_a_study(head: FindingsHead) -> None:
    tokens = torch.randn(3, 5, 8)
    logits = head(tokens, torch.tensor([2, 1]))
    for study, rows in enumerate((tokens[:2].reshape(10, 8), tokens[2])):
        weights = head.attention(rows).softmax(dim=0)
        assert torch.allclose(logits[study], (weights * head.evidence(rows)).sum(dim=0), atol=1e-5)


def test_the_loss_ignores_unknown_findings(head: FindingsHead) -> None:
    tokens, views = torch.randn(3, 5, 8, requires_grad=True), torch.tensor([1, 1, 1])
    targets = torch.tensor([[1.0, 0.0, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]])
    head.balance.copy_(torch.tensor([3.0, 1.0, 1.0]))
    head.weight = 0.5
    loss = head.loss_sum(tokens, views, targets)
    logits = head(tokens, views)
    first = (-3 * F.logsigmoid(logits[0, 0]) - F.logsigmoid(-logits[0, 1])) / 2
    second = -F.logsigmoid(-logits[1, 0])
    assert loss.item() == pytest.approx(0.5 * (first + second).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, tokens)
    assert gradient.isfinite().all()
    assert gradient[:2].abs().min() > 0
    assert gradient[2].abs().max() == 0


def test_balance_gives_both_classes_equal_weight(head: FindingsHead) -> None:
    targets = torch.tensor([[1.0, 0.0, 0.0]] * 1 + [[0.0, 1.0, 0.0]] * 4 + [[0.0, NAN, 0.0]] * 45)
    head.set_balance(targets, most=20.0)
    assert head.balance.tolist() == pytest.approx([20.0, 0.25, 20.0])  # 49 to 1 is capped, as 50 to 0 is
    head.set_balance(targets, most=1.0)
    assert head.balance.tolist() == [1.0, 1.0, 1.0]


def test_targets_are_the_labels_of_the_reports() -> None:
    targets = finding_targets(["the heart is enlarged . no pleural effusion .", "possible pneumonia ."])
    assert targets.shape == (2, len(FINDINGS)) == (2, 23)
    row = dict(zip(FINDINGS, targets[0].tolist(), strict=True))
    assert (row["Cardiomegaly"], row["Pleural Effusion"], row["Fracture"]) == (1.0, 0.0, 0.0)
    assert math.isnan(targets[1, FINDINGS.index("Pneumonia")])
    assert finding_targets([]).shape == (0, 23)


def test_a_head_learns_the_first_findings_only(head: FindingsHead) -> None:
    tokens, views = torch.randn(3, 5, 8), torch.tensor([1, 2])
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, NAN, 1.0]])
    wider = torch.cat([targets, torch.ones(2, 9)], dim=1)
    assert torch.equal(head.loss_sum(tokens, views, wider), head.loss_sum(tokens, views, targets))
    head.set_balance(wider, most=20.0)
    assert head.balance.shape == (3,)
