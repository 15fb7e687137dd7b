"""Measures training steps of a shallow model with the recipe's widths, and extrapolates to the whole model."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emrrg_cli.datasets.report_dataset import Batch
from emrrg_cli.models.adapters import plain
from emrrg_cli.models.build import assemble, build_encoder
from emrrg_cli.models.hybrid_decoder import decoder_layers
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.planning.llms import PlanTokenizer, quantize
from emrrg_cli.planning.sizes import reports_per_study
from emrrg_cli.recipe.common import EncoderSettings
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.runtime import llm_dtype
from emrrg_cli.training.optimizer_step import accumulate_gradients, update_weights
from emrrg_cli.training.schedule import build_optimizer

# Number of blocks or layers that a trial adds to measure their cost. More of them reduce the noise per layer.
_FURTHER = 4
# On a CPU, a trial adds only one layer of an LLM with more parameters than this.
_LARGE_LLM = 1_000_000_000
# Maximum number of timed rounds, without warm-up, and time limit in seconds.
_ROUNDS, _BUDGET_S = 9, 45.0
# On a CPU, the trial's batch size is chosen so that a step of the smallest model takes at most these seconds.
_STEP_S = 2.0


@dataclass(frozen=True)
class Step:
    """Time and memory of a training step with one micro-batch.

    Attributes:
        seconds: Seconds of the forward and backward pass with one report for each study.
        update: Seconds of gradient clipping and the optimizer, once per step for any number of micro-batches.
        saved: Bytes kept for the backward pass; of a step of self-critical training, if the recipe has it.
        checkpointed: Bytes kept for the backward pass with gradient checkpointing.
    """

    seconds: float
    update: float
    saved: float
    checkpointed: float


def measure(
    recipe: FinetuneRecipe,
    config: Any,
    accelerator: Any,
    *,
    micro: int,
    views: int,
    llm_parameters: int,
    report: Callable[[str], None],
) -> Step:
    """Estimates a step of the whole model from trials that fit on this device.

    Args:
        recipe: The recipe.
        config: Configuration of the LLM.
        accelerator: The process's `Accelerator`.
        micro: Number of studies per micro-batch.
        views: Images per study.
        llm_parameters: Number of parameters of the whole LLM.
        report: Called with a description of each measurement.

    Raises:
        torch.cuda.OutOfMemoryError: Even one block and one layer do not fit with one study.
    """
    cpu = accelerator.device.type == "cpu"
    further = 1 if cpu and llm_parameters > _LARGE_LLM else _FURTHER
    size = micro
    trial: _Trial | None = None
    while True:
        try:
            trial = _Trial(recipe, config, accelerator, views, further)
            size = trial.affordable(micro) if cpu else size
            return trial.whole(micro, size, report)
        except torch.cuda.OutOfMemoryError:
            if size == 1 and further == 1:
                raise
        finally:  # runs after the handler, because its traceback keeps the tensors of the trial alive
            trial = None
            _free(accelerator)
        size, further = max(1, size // 2), 1


class _Trial:
    """A model with a few blocks and layers; each measured step uses only some of them.

    The smallest step uses one block and one layer (a hybrid layer if the recipe has them). Every other step uses
    `further` more of one part.
    """

    def __init__(self, recipe: FinetuneRecipe, config: Any, accelerator: Any, views: int, further: int) -> None:
        self.recipe, self.config, self.accelerator, self.views = recipe, config, accelerator, views
        self.device: torch.device = accelerator.device
        settings = recipe.model
        self.depth, self.layers = settings.encoder.width_and_depth[1], config.num_hidden_layers
        interval = settings.hybrid.every
        hybrids = 0 if interval is None else math.ceil(self.layers / interval)
        # Blocks and layers that the whole model has in addition to those of the smallest step.
        self.missing = {
            "encoder block": self.depth - 1,
            "hybrid decoder layer": max(0, hybrids - 1),
            "decoder layer": self.layers - max(1, hybrids),
        }
        self.further = {part: min(count, further) for part, count in self.missing.items() if count}
        model = self._build(hybrids)
        optimizer = build_optimizer(model, recipe.train)
        self.module = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.blocks = list(plain(model.encoder).layers)
        decoder = list(decoder_layers(plain(model.llm)))
        self.hybrid_layers = [layer for layer in decoder if hasattr(layer.self_attn, "cross")]
        self.plain_layers = [layer for layer in decoder if not hasattr(layer.self_attn, "cross")]
        for block in self.blocks[1:]:
            block.drop_path = settings.encoder.drop_path  # the rate depends on the depth, the time does not

    def affordable(self, micro: int) -> int:
        """Returns the number of studies per trial step that a CPU can process in a short time."""
        self._keep(None)
        self._time(1)
        step = self._time(1)
        return max(1, min(micro, int(_STEP_S / (step["seconds"] + step["update"]))))

    def whole(self, micro: int, size: int, report: Callable[[str], None]) -> Step:
        """Estimates the whole model's step with `micro` studies from steps with `size` studies."""
        variants = [None, *self.further]
        report("counting the memory for the backward pass")
        saved = {part: self._saved(part, micro) for part in variants}
        self.module.set_gradient_checkpointing(self.recipe.train.gradient_checkpointing)
        rounds: list[dict[str | None, dict[str, float]]] = []
        began = time.perf_counter()
        while len(rounds) <= _ROUNDS:
            times = {}
            for part in variants:
                report(f"measuring {f'one more {part}' if part else 'one block and one layer'} (round {len(rounds)})")
                self._keep(part)
                times[part] = self._time(size)
            rounds.append(times)
            # If steps take this long, the start-up time of the first step is negligible.
            if time.perf_counter() - began > (_BUDGET_S if len(rounds) > 1 else _BUDGET_S / 2):
                break
        # Other programs can only make steps slower, so the lower quartile of all rounds is used.
        counted = rounds[1:] or rounds
        quick = {
            name: {part: sorted(times[part][name] for times in counted)[(len(counted) - 1) // 4] for part in variants}
            for name in ("seconds", "update")
        }
        return Step(
            self._extrapolate(quick["seconds"]) * micro / size,
            self._extrapolate(quick["update"]),
            self._extrapolate(saved),
            saved[None] + self._checkpoints(micro),
        )

    def _extrapolate(self, figures: Mapping[str | None, float]) -> float:
        smallest = figures[None]
        more = ((figures[part] - smallest) / count * self.missing[part] for part, count in self.further.items())
        return float(smallest + max(0.0, sum(more)))  # noise can make small differences negative

    def _checkpoints(self, micro: int) -> float:
        # Checkpointing keeps the input of every block and layer, and all activations of one of them at a time.
        settings = self.recipe.model
        width = settings.encoder.width_and_depth[0]
        tokens = (settings.encoder.image_size // 16) ** 2 + 1
        text = (self.recipe.data.max_report_tokens + 40 + tokens) * reports_per_study(self.recipe)
        size = self._llm_dtype().itemsize
        study = self.depth * self.views * tokens * width * 4 + self.layers * text * self.config.hidden_size * size
        return float(micro * study)

    # -- steps --------------------------------------------------------------------------------------------------

    def _keep(self, part: str | None) -> None:
        """Reduces the model to one block and one layer, plus `further` more of one part."""
        more = self.further[part] if part else 0
        blocks = self.blocks[: 1 + (more if part == "encoder block" else 0)]
        first, others = (self.hybrid_layers, self.plain_layers) if self.hybrid_layers else (self.plain_layers, [])
        layers = first[:1]
        if part == "hybrid decoder layer" or (part == "decoder layer" and not others):
            layers = first[: 1 + more]
        elif part == "decoder layer":
            layers = first[:1] + others[:more]
        plain(self.module.encoder).layers = nn.ModuleList(blocks)
        plain(self.module.llm).get_decoder().layers = nn.ModuleList(layers)

    def _time(self, micro: int) -> dict[str, float]:
        batch = self._batch(micro)
        assert batch.labels is not None
        self._synchronize()
        began = time.perf_counter()
        self.module.train()
        accumulate_gradients(self.model, [batch], batch.labels.numel(), self.accelerator)
        self._synchronize()
        between = time.perf_counter()
        update_weights(self.model, self.optimizer, self.recipe.train.clip_norm, self.accelerator)
        self._synchronize()
        return {"seconds": between - began, "update": time.perf_counter() - between}

    def _saved(self, part: str | None, micro: int) -> float:
        """Returns the bytes kept for the backward pass of `micro` studies, counted in forward passes of a few.

        Those of all would need the memory of a training step, which this machine may not have.
        """
        self._keep(part)
        self.module.train()

        def count(studies: int) -> int:
            counter = _SavedBytes(self.module)
            batch = self._batch(studies, reports_per_study(self.recipe)).to(self.device)
            with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
                self.model(batch)
            return counter.total

        few = min(micro, 2)
        kept = count(few)
        if few == micro:
            return kept
        # Copies of the weights in autocast's dtype do not grow with the number of studies.
        return kept + (micro - few) * (count(few + 1) - kept)

    def _batch(self, micro: int, reports: int = 1) -> Batch:
        # Self-critical training has several `reports` of each study.
        side, tokens = self.recipe.model.encoder.image_size, self.recipe.data.max_report_tokens
        return Batch(
            indices=list(range(micro)),
            study_ids=[str(i) for i in range(micro)],
            pixels=torch.randint(0, 256, (micro * self.views, side, side), dtype=torch.uint8),
            views=torch.full((micro,), self.views),
            reports=[""] * micro,
            labels=torch.randint(3, self.config.vocab_size, (micro * reports, tokens + 1)),
            advantages=torch.ones(micro * reports) if reports > 1 else None,
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- the model ----------------------------------------------------------------------------------------------

    def _build(self, hybrids: int) -> ReportGenerator:
        from transformers import AutoModelForCausalLM

        settings = self.recipe.model
        encoder_settings = EncoderSettings(
            size=None,
            d_model=settings.encoder.width_and_depth[0],
            depth=1 + self.further.get("encoder block", 0),
            d_state=settings.encoder.d_state,
            image_size=settings.encoder.image_size,
            drop_path=settings.encoder.drop_path,
        )
        of_hybrids = self.further.get("hybrid decoder layer", 0) + min(1, hybrids)
        of_plain = self.further.get("decoder layer", 0) + (not hybrids)
        # If there are hybrid and plain layers, they alternate.
        interval = None if not hybrids else 2 if of_plain else 1
        layers = max(2 * of_hybrids - 1, 2 * of_plain) if interval == 2 else of_hybrids + of_plain
        small = settings.model_copy(
            update={"encoder": encoder_settings, "hybrid": settings.hybrid.model_copy(update={"every": interval})}
        )
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        for name in ("layer_types", "no_rope_layers"):
            if entries := getattr(
                config, name, None
            ):  # one entry per layer; the trial may have more layers than a small LLM
                setattr(config, name, [entries[i % len(entries)] for i in range(layers)])
        with self.device:
            llm = AutoModelForCausalLM.from_config(config, dtype=self._llm_dtype(), attn_implementation="sdpa")
            quantize(llm, settings.llm.quantization, self._llm_dtype())
            return assemble(small, build_encoder(encoder_settings, settings.scan), llm, PlanTokenizer())

    def _llm_dtype(self) -> torch.dtype:
        settings = self.recipe.model.llm
        precision = {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        return llm_dtype(settings.dtype, precision) if settings.is_frozen else torch.float32


class _SavedBytes:
    """Counts the bytes of storages that autograd keeps for the backward pass, without parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _free(accelerator: Any) -> None:
    accelerator.free_memory()  # it keeps references to the models that it prepared
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
