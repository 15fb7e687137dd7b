"""Learning rate schedule and optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from emrrg_cli.recipe.common import LoopSettings, LrScaleSettings
from emrrg_cli.recipe.finetuning import TrainSettings
from emrrg_cli.training.schedule import build_optimizer, learning_rate, part_of, warmup_note


def _rates(steps: int, per_epoch: int, total: int | None = None, **settings: Any) -> list[float]:
    train = TrainSettings(**settings)
    return [learning_rate(step, per_epoch, total or steps, train) for step in range(steps)]


def test_the_rate_may_be_stated_for_another_batch() -> None:
    settings = LoopSettings(lr=1.5e-4, lr_batch_size=256, batch_size=64, warmup_epochs=2.0)
    assert settings.peak_lr == pytest.approx(1.5e-4 / 4)
    assert learning_rate(20, 10, 100, settings) == pytest.approx(1.5e-4 / 4)
    assert learning_rate(9, 10, 100, settings) == pytest.approx(1.5e-4 / 8)
    with pytest.raises(ValueError, match=r"min_lr 0\.0001 is larger than lr 3\.75e-05"):
        LoopSettings(lr=1.5e-4, lr_batch_size=256, batch_size=64, min_lr=1e-4)


def test_cosine_by_epoch_is_that_of_the_paper() -> None:
    rates = _rates(5 * 7, 7, lr=1e-4, min_lr=1e-6, schedule_unit="epoch")
    by_epoch = [1e-6 + 0.5 * (1e-4 - 1e-6) * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(5)]
    assert rates == pytest.approx([rate for rate in by_epoch for _ in range(7)])
    # The same as the released code's scheduler, stepped at the end of each epoch.
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=1e-6)
    theirs = []
    for _ in range(5):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[::7] == pytest.approx(theirs)
    assert learning_rate(35, 7, 35, TrainSettings(lr=1e-4, min_lr=1e-6, schedule_unit="epoch")) == pytest.approx(1e-6)


def test_cosine_by_step_moves_each_step_to_the_least_rate() -> None:
    rates = _rates(10, 5, lr=1.0, min_lr=0.1)
    assert rates == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    assert learning_rate(10, 5, 10, TrainSettings(lr=1.0, min_lr=0.1)) == pytest.approx(0.1)
    assert learning_rate(99, 5, 10, TrainSettings(lr=1.0, min_lr=0.1)) == pytest.approx(0.1)


def test_the_cosine_follows_a_linear_warm_up() -> None:
    rates = _rates(12, 4, lr=1.0, warmup_epochs=1.0)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_warm_up_by_epoch_and_in_part_of_an_epoch() -> None:
    assert _rates(4, 1, lr=1.0, warmup_epochs=2.0, schedule_unit="epoch") == pytest.approx([0.5, 1.0, 1.0, 0.5])
    rates = _rates(8, 4, lr=1.0, warmup_epochs=0.5)
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[3] < 1.0


def test_constant_stays_after_the_warm_up() -> None:
    assert _rates(6, 2, lr=3.0, warmup_epochs=1.0, schedule="constant") == pytest.approx([1.5, 3, 3, 3, 3, 3])


def test_the_schedule_ends_with_max_steps() -> None:
    rates = _rates(4, 100, total=4, lr=1.0)
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])


def test_a_warm_up_may_be_longer_than_the_run() -> None:
    assert _rates(3, 1, lr=1.0, warmup_epochs=10.0) == pytest.approx([0.1, 0.2, 0.3])
    assert learning_rate(2, 1, 2, TrainSettings(lr=1.0, warmup_epochs=2.0)) == pytest.approx(1.0)


def test_a_warm_up_longer_than_the_run_has_a_note() -> None:
    settings = LoopSettings(lr=1e-4, warmup_epochs=2.0, epochs=2)
    assert warmup_note(10, settings) is None
    assert warmup_note(10, settings.model_copy(update={"max_steps": 20})) is None
    told = "train.warmup_epochs=2 is 20 steps, but training has {}: the learning rate ends at {} and does not reach "
    for changed, steps, last in (({"max_steps": 5}, 5, "2.5e-05"), ({"epochs": 1}, 10, "5e-05")):
        note = warmup_note(10, settings.model_copy(update=changed))
        assert note == told.format(steps, last) + "0.0001"


def test_vectors_have_no_decay_frozen_parameters_are_left_out() -> None:
    from emrrg_cli.models.build import build_encoder
    from emrrg_cli.models.report_generator import Bridge
    from emrrg_cli.recipe.common import EncoderSettings

    model = nn.ModuleDict(
        {
            "encoder": build_encoder(EncoderSettings(size=None, d_model=16, depth=1, image_size=32, d_state=4)),
            "bridge": Bridge(16, 32),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    optimizer = build_optimizer(model, TrainSettings(weight_decay=0.3, lr=0.5, betas=[0.8, 0.95]))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = (
        {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] == decay for p in group["params"]}
        for decay in (0.3, 0.0)
    )
    assert decayed | plain == {name for name in names.values() if not name.startswith("frozen")}
    assert "encoder.layers.0.mixer.X.weight" in decayed
    assert "bridge.proj.weight" in decayed
    assert {"encoder.pos_embed", "encoder.cls_token", "bridge.norm.weight", "bridge.proj.bias"} <= plain
    assert not [name for name in decayed if name.endswith(("A_log", ".D", "bias")) or ".norm" in name]
    assert [name for name in plain if name.endswith("A_log")]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainSettings())


def test_each_part_of_a_model_has_its_own_rate() -> None:
    names = {
        "encoder.layers.0.mixer.X.weight": "encoder",
        "encoder.base_model.model.layers.0.mixer.X.lora_A.default.weight": "adapters",
        "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight": "adapters",
        "llm.model.layers.0.self_attn.q_proj.weight": "llm",
        "llm.model.layers.0.self_attn.cross.kv_proj.weight": "new",
        "text_encoder.embeddings.word.weight": "llm",
        "pretrainer.encoder.layers.0.mixer.X.weight": "encoder",
        "pretrainer.enc2dec.weight": "new",
        "bridge.proj.weight": "new",
        "findings.attention.weight": "new",
        "logit_scale": "new",
    }
    assert {name: part_of(name) for name in names} == names

    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "bridge": nn.Linear(2, 2)})
    settings = TrainSettings(lr_scale=LrScaleSettings(encoder=0.1))
    scales = {
        (group["lr_scale"], group["weight_decay"] > 0): len(group["params"])
        for group in build_optimizer(model, settings).param_groups
    }
    assert scales == {(0.1, True): 1, (0.1, False): 1, (1.0, True): 1, (1.0, False): 1}
