"""Published checkpoints of random tensors, of every stage, and the literal model to compare with."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

State = dict[str, Tensor]


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """`published_reference.py`, the published architecture written out from its description."""
    spec = importlib.util.spec_from_file_location(
        "published_reference", Path(__file__).parents[1] / "published_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_state(reference: ModuleType) -> Callable[..., State]:
    """Makes the tensors of a checkpoint of a stage, by their published names."""

    def make(stage: str, d: int = 32, depth: int = 2, n: int = 4, grid: int = 4, seed: int = 0, **more: Any) -> State:
        if stage == "1":
            grid, depth = max(grid, 8), max(depth, 4)
            shapes = reference.encoder_shapes(d, depth, n, grid, stage=1)
            shapes |= reference.decoder_shapes(d, grid, more.get("width", 32))
            return {**reference.random_state(shapes, seed), "mask": reference.mask(grid)}
        encoder = reference.random_state(reference.encoder_shapes(d, depth, n, grid, stage=2), seed, "visual_encoder.")
        if stage == "2":
            heads = {"vision_proj": (24, d), "text_proj": (24, 64)}
            shapes = {f"{name}.weight": shape for name, shape in heads.items()}
            shapes |= {f"{name}.bias": shape[:1] for name, shape in heads.items()}
            state = encoder | reference.random_state(shapes, seed) | _text_tower()
            return {**state, "logit_scale": torch.tensor(2.5)}
        hidden = more.get("hidden", 32)
        shapes = {"llama_proj.weight": (hidden, d), "llama_proj.bias": (hidden,)}
        shapes |= {"layer_norm.weight": (hidden,), "layer_norm.bias": (hidden,)}
        bridge = reference.random_state(shapes, seed)
        if stage == "3 frozen":
            return bridge
        if stage.startswith("emrrg"):
            adapters = {
                f"visual_encoder.layers.{i}.mixer.lora_X.adapter_{name}.weight": shape
                for i in range(depth)
                for name, shape in (("down", (4, d)), ("up", (d // 2, 4)))
            }
            backbone = {} if stage == "emrrg frozen" else encoder
            return backbone | reference.random_state(adapters, seed) | bridge
        assert stage == "3"
        return encoder | bridge

    return make


def _text_tower() -> State:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    state = {f"text_encoder.{name}": tensor for name, tensor in BertModel(config).state_dict().items()}
    return {**state, "text_encoder.embeddings.position_ids": torch.arange(32)[None]}


@pytest.fixture
def save_published(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint as the released code does, settings and optimizer beside the tensors; returns its path."""

    def save(state: State, name: str = "stage.pth", **beside: Any) -> Path:
        file = tmp_path / name
        content = {
            "model": state,
            "epoch": 7,
            "args": argparse.Namespace(lr=1e-4, output=Path("/somewhere"), nested=argparse.Namespace(x=1)),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
            **beside,
        }
        torch.save(content, file)
        return file

    return save
