"""Training steps of small models of a recipe's widths, and what a whole model's step follows from them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.data.batches import Batch
from emrrg_cli.models.build import assemble, build_encoder
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.planning.llms import PlanTokenizer
from emrrg_cli.recipe.schema import EncoderSettings, FinetuneRecipe
from emrrg_cli.training.environment import DTYPES, llm_dtype
from emrrg_cli.training.schedule import build_optimizer


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        seconds: of forward and backward pass, which grow with the studies.
        update: seconds of the optimizer, once a step whatever the studies.
        saved: bytes kept for the backward pass.
        checkpointed: the same with gradient checkpointing.
    """

    seconds: float
    update: float
    saved: float
    checkpointed: float = 0.0


class Trials:
    """Training steps of small models of the recipe's widths."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        config: Any,
        device: torch.device,
        precision: str,
        views: int,
        report: Callable[[str], None],
    ) -> None:
        self.recipe, self.config, self.device, self.precision = recipe, config, device, precision
        self.views, self.report = views, report

    def extrapolate(self, micro: int) -> Step:
        """The whole model's step from one and two blocks, one and two layers, with and without cross-attention."""
        settings = self.recipe.model
        depth, layers = settings.encoder.width_and_depth[1], self.config.num_hidden_layers
        every = settings.hybrid.every
        hybrids = 0 if every is None else math.ceil(layers / every)
        self.report("measuring one encoder block and one decoder layer")
        one = self.step(1, 1, every, micro)
        self.report("measuring a further encoder block")
        block = _minus(self.step(2, 1, every, micro), one)
        self.report("measuring a further decoder layer")
        layer = _minus(self.step(1, 2, every, micro), one)
        cross = Step(0.0, 0.0, 0.0)
        if every is not None and every > 1:
            self.report("measuring cross-attention")
            cross = _minus(one, self.step(1, 1, None, micro))
        further = max(0, hybrids - 1) if every != 1 else 0

        def total(name: str) -> float:
            first, b, y, c = (getattr(part, name) for part in (one, block, layer, cross))
            return float(first + (depth - 1) * b + (layers - 1) * y + further * c)

        # Checkpointing keeps the input of each block and layer, and one of them whole at a time.
        tokens = micro * self.views * ((settings.encoder.image_size // 16) ** 2 + 1)
        inputs = depth * tokens * settings.encoder.width_and_depth[0] * 4
        text = micro * (self.recipe.data.max_report_tokens + 40 + tokens // (micro * self.views))
        inputs += layers * text * self.config.hidden_size * 4
        return Step(total("seconds"), total("update"), total("saved"), one.saved + inputs)

    def step(self, depth: int, layers: int, every: int | None, micro: int) -> Step:
        model = self._model(depth, layers, every)
        try:
            optimizer = build_optimizer(model, self.recipe.train)
            batch = self._batch(micro)
            warm_up = self._one(model, optimizer, batch, count=True)
            # Where one step takes long, its start-up cost is nothing beside it.
            whole = warm_up.seconds + warm_up.update
            repeats = 3 if whole < 2 else 1 if whole < 10 else 0
            steps = [self._one(model, optimizer, batch) for _ in range(repeats)] or [warm_up]
            return Step(min(step.seconds for step in steps), min(step.update for step in steps), warm_up.saved)
        finally:
            del model
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _one(self, model: ReportGenerator, optimizer: torch.optim.Optimizer, batch: Batch, count: bool = False) -> Step:
        counter = _SavedBytes(model)
        self._synchronize()
        began = time.perf_counter()
        autocast = torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")
        if count:
            with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor), autocast:
                loss = model(batch).loss_sum
        else:
            with autocast:
                loss = model(batch).loss_sum
        loss.backward()
        self._synchronize()
        between = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._synchronize()
        return Step(between - began, time.perf_counter() - between, counter.total)

    def _model(self, depth: int, layers: int, every: int | None) -> ReportGenerator:
        from transformers import AutoModelForCausalLM

        settings = self.recipe.model
        width = settings.encoder.width_and_depth[0]
        encoder_settings = EncoderSettings(
            size=None,
            d_model=width,
            depth=depth,
            d_state=settings.encoder.d_state,
            image_size=settings.encoder.image_size,
            drop_path=0.0,
        )
        hybrid = settings.hybrid.model_copy(update={"every": every})
        small = settings.model_copy(update={"encoder": encoder_settings, "hybrid": hybrid})
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        dtype = llm_dtype(settings.llm.dtype, self.precision) if settings.llm.is_frozen else torch.float32
        with torch.device(self.device):
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            model = assemble(small, build_encoder(encoder_settings, settings.scan), llm, PlanTokenizer())
        return model.to(self.device).train()

    def _batch(self, micro: int) -> Batch:
        size, tokens = self.recipe.model.encoder.image_size, self.recipe.data.max_report_tokens
        return Batch(
            indices=list(range(micro)),
            study_ids=[str(i) for i in range(micro)],
            pixels=torch.randint(0, 256, (micro * self.views, size, size), dtype=torch.uint8),
            views=torch.full((micro,), self.views),
            reports=[""] * micro,
            labels=torch.randint(3, self.config.vocab_size, (micro, tokens + 1)),
        ).to(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _SavedBytes:
    """Counts the storages that autograd keeps for the backward pass, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _minus(a: Step, b: Step) -> Step:
    # Noise can make a small part look negative.
    return Step(max(0.0, a.seconds - b.seconds), max(0.0, a.update - b.update), max(0.0, a.saved - b.saved))
