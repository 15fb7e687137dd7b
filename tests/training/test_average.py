"""The moving average of the weights: its values, its place in a run, and its continuation."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from emrrg_cli.training.average import WeightAverage

AVERAGED = ("model.encoder.depth=3", "model.encoder.drop_path=0.9", "train.epochs=3", "train.ema=0.9")


def test_the_average_is_that_of_the_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    weights = [3.0, 5.0, -1.0]
    with torch.no_grad():
        model.weight.fill_(2.0)
        average, expected = WeightAverage(model, 0.25), 2.0
        for step, weight in enumerate(weights, start=1):
            model.weight.fill_(weight)
            average.update(step)
            decay = min(0.25, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * weight
    assert float(average.tensors()["weight"]) == pytest.approx(expected, rel=1e-6)
    assert min(0.25, 2 / 11) < 0.25 < 4 / 13  # early and late decay have both been used
    assert model.weight.item() == -1.0


def test_the_weights_are_restored_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = WeightAverage(model, 0.5)
    assert average.tensors().keys() == {"0.weight", "0.bias"}
    average.load({name: torch.full_like(before[name], 7.0) for name in ("0.weight", "0.bias")})
    with suppress(ZeroDivisionError), average.in_place():
        assert (model[0].weight == 7.0).all()
        assert torch.equal(model[1].weight, before["1.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert (average.tensors()["0.bias"] == 7.0).all()


@pytest.mark.slow
def test_a_run_keeps_its_average_and_resumes_it_exactly(finetune: Any) -> None:
    whole = finetune("whole", *AVERAGED)
    plain = finetune("plain", *AVERAGED, "train.ema=null")
    part = finetune("part", *AVERAGED, "train.stop_after_steps=3")
    assert part.last_step() == 3
    resumed = finetune("part", *AVERAGED, resume=True)
    assert resumed.exported.keys() == whole.exported.keys()
    for name, tensor in whole.exported.items():
        assert torch.equal(resumed.exported[name], tensor), name
    for name, tensor in whole.weights.items():  # the weights that are trained do not notice
        assert torch.equal(plain.weights[name], tensor), name
    kept = {name.split(":")[1]: tensor for name, tensor in whole.exported.items()}
    other = {name.split(":")[1]: tensor for name, tensor in plain.exported.items()}
    assert not torch.equal(kept["bridge.proj.weight"], other["bridge.proj.weight"])
