"""What a recipe will need on this machine: parameters, memory, time, disk, from meta tensors and a short trial.

Parameters are counted on a model of meta tensors, which has no weights. Time and activations come from real training
steps of a model with one or two encoder blocks and decoder layers, of the recipe's widths and batch, with random
weights: what a further block or layer adds is measured, and the rest is multiplication.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.data.batches import Batch
from emrrg_cli.errors import RunError
from emrrg_cli.models.adapters import plain
from emrrg_cli.models.build import assemble, build_encoder
from emrrg_cli.models.hybrid_decoder import hybrid_parameters
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.schema import EncoderSettings, FinetuneRecipe, ModelSettings
from emrrg_cli.training.environment import DTYPES, choose_precision, llm_dtype
from emrrg_cli.training.schedule import build_optimizer

# The LLMs of the shipped recipes, so that planning needs no network. From their published config.json.
KNOWN_LLMS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-chat-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "Qwen/Qwen1.5-1.8B-Chat": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


class _PlanTokenizer:
    """Stands in for a tokenizer: only the length of the prompt matters, about four characters a token."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return 3

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [3] * math.ceil(len(text) / 4)


@dataclass
class Plan:
    """Prediction for one device; bytes and seconds."""

    parameters: dict[str, int]
    trainable: dict[str, int]
    memory: dict[str, int]
    available: int
    device: str
    precision: str
    micro_batch_size: int
    seconds_per_step: float
    steps_per_epoch: int | None
    epochs: int
    disk: dict[str, int]
    disk_free: int
    proposals: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Predicted peak memory of the device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice; a twentieth of the memory is left for what is not counted."""
        return self.peak <= 0.95 * self.available and sum(self.disk.values()) <= self.disk_free

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        seconds = None if self.steps_per_epoch is None else self.seconds_per_step * self.steps_per_epoch
        return {**asdict(self), "peak": self.peak, "fits": self.fits, "seconds_per_epoch": seconds}


def plan(
    recipe: FinetuneRecipe,
    *,
    studies: int | None = None,
    views: int = 1,
    processes: int = 1,
    report: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Predicts what training with a recipe needs, by meta tensors and a trial of a few seconds to minutes.

    Args:
        studies: training studies, for the time of an epoch; None: unknown.
        views: images a study.
        processes: processes that share `train.batch_size`.
        report: is told what is being measured.

    Raises:
        RunError: when the LLM's configuration cannot be had, or not even one block fits.
    """
    import emrrg_cli.training.finetune  # noqa: F401  (the program's own memory is that of a training process)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(recipe.train.precision, device.type)
    config = llm_config(recipe.model)
    share = math.ceil(recipe.train.batch_size / processes)
    micro = min(recipe.train.micro_batch_size or share, share)

    report("counting parameters")
    whole = _meta_model(recipe.model, config)
    parameters, trainable = _count(whole)
    before = _resident_bytes() if device.type == "cpu" else 600 * 2**20  # CUDA context and kernels, as seen on an H100
    small = _Trials(recipe, config, device, precision, views, report)
    trials_micro = micro
    while True:
        try:
            step = small.extrapolate(trials_micro)
            break
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if trials_micro == 1:
                raise RunError("not even one encoder block and one decoder layer fit on this GPU") from None
            trials_micro //= 2
    scale = micro / trials_micro
    weights = _weight_bytes(whole, recipe, precision)
    trained = sum(trainable.values())
    logits = micro * (recipe.data.max_report_tokens + 2) * config.vocab_size * 4 * 2  # fp32 copy and its gradient
    activations = int(step.saved * scale)
    if recipe.train.gradient_checkpointing:
        activations = int(step.checkpointed * scale)
    memory = {
        "program": before,
        "weights": weights,
        "optimizer": 8 * trained,
        "activations": activations + logits,
        "gradients": 4 * trained if recipe.train.micro_batch_size not in (None, share) else 0,
    }
    # Gradients fill up while activations are freed: without accumulation only the larger of the two counts.
    memory["gradients"] = max(memory["gradients"], 4 * trained - memory["activations"], 0)
    steps = None if studies is None else max(1, studies // recipe.train.batch_size)
    result = Plan(
        parameters=parameters,
        trainable=trainable,
        memory=memory,
        available=_available_bytes(device),
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        precision=precision,
        micro_batch_size=micro,
        seconds_per_step=step.seconds * scale * math.ceil(share / micro),
        steps_per_epoch=steps,
        epochs=recipe.train.epochs,
        disk=_disk(recipe, parameters, trained, weights),
        disk_free=_disk_free(recipe),
    )
    result.proposals = _proposals(result, recipe, int(step.checkpointed * scale), share)
    return result


def llm_config(settings: ModelSettings) -> Any:
    """The LLM's configuration, without weights: known, local, cached or from the hub.

    Raises:
        RunError: when it cannot be had.
    """
    from transformers import AutoConfig

    from emrrg_cli.models.llm import build_scratch_llm

    if settings.llm.name == "scratch":
        tokenizer: Any = _PlanTokenizer()
        with torch.device("meta"):
            config = build_scratch_llm(settings.llm.scratch, tokenizer).config
        config.vocab_size = settings.llm.scratch.vocab_size
        return config
    known = KNOWN_LLMS.get(settings.llm.name)
    if known is not None:
        return AutoConfig.for_model(**known)
    try:
        return AutoConfig.from_pretrained(settings.llm.name, revision=settings.llm.revision or "main")
    except (OSError, ValueError) as error:
        raise RunError(
            f"the configuration of the LLM {settings.llm.name!r} cannot be had: {str(error).splitlines()[0]}",
            hint="Planning needs its config.json only: name a directory that holds one, or connect to the hub.",
        ) from error


def _meta_model(settings: ModelSettings, config: Any) -> ReportGenerator:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        return assemble(settings, build_encoder(settings.encoder, settings.scan), llm, _PlanTokenizer())


def _count(model: ReportGenerator) -> tuple[dict[str, int], dict[str, int]]:
    added = {name for name, _ in hybrid_parameters(plain(model.llm))}
    parts = {"encoder": 0, "bridge": 0, "hybrid layers": 0, "LLM": 0, "LoRA": 0}
    trained = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            part = "LoRA"
        elif name.startswith("bridge."):
            part = "bridge"
        elif name.startswith("encoder."):
            part = "encoder"
        else:
            part = "hybrid layers" if any(name.endswith(key) for key in added) else "LLM"
        parts[part] += parameter.numel()
        trained[part] += parameter.numel() * parameter.requires_grad
    return parts, trained


def _weight_bytes(model: ReportGenerator, recipe: FinetuneRecipe, precision: str) -> int:
    # Everything is fp32 but a frozen LLM.
    size = llm_dtype(recipe.model.llm.dtype, precision).itemsize if recipe.model.llm.is_frozen else 4
    total = 0
    for name, parameter in model.named_parameters():
        in_llm = name.startswith("llm.") and ".cross." not in name and ".lora_" not in name
        total += parameter.numel() * (size if in_llm else 4)
    return total


@dataclass(frozen=True)
class _Step:
    """A training step: seconds, bytes kept for the backward pass, and those with gradient checkpointing."""

    seconds: float
    saved: float
    checkpointed: float = 0.0


class _Trials:
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

    def extrapolate(self, micro: int) -> _Step:
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
        cross = _Step(0.0, 0.0)
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
        return _Step(total("seconds"), total("saved"), one.saved + inputs)

    def step(self, depth: int, layers: int, every: int | None, micro: int) -> _Step:
        model = self._model(depth, layers, every)
        try:
            optimizer = build_optimizer(model, self.recipe.train)
            batch = self._batch(micro)
            seconds = []
            saved = self._one(model, optimizer, batch, count=True)[1]  # also warms up
            for _ in range(3):
                seconds.append(self._one(model, optimizer, batch)[0])
            return _Step(min(seconds), saved)
        finally:
            del model
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _one(
        self, model: ReportGenerator, optimizer: torch.optim.Optimizer, batch: Batch, count: bool = False
    ) -> tuple[float, int]:
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
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._synchronize()
        return time.perf_counter() - began, counter.total

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
        prompt = settings.visual_prompt
        small = settings.model_copy(update={"encoder": encoder_settings, "hybrid": hybrid, "visual_prompt": prompt})
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        dtype = llm_dtype(settings.llm.dtype, self.precision) if settings.llm.is_frozen else torch.float32
        with torch.device(self.device):
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            model = assemble(small, build_encoder(encoder_settings, settings.scan), llm, _PlanTokenizer())
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


def _minus(a: _Step, b: _Step) -> _Step:
    # Noise can make a small part look negative.
    return _Step(max(0.0, a.seconds - b.seconds), max(0.0, a.saved - b.saved))


def _disk(recipe: FinetuneRecipe, parameters: dict[str, int], trained: int, weights: int) -> dict[str, int]:
    frozen_encoder = recipe.model.adapter.targets != "full"
    disk = {
        "encoder": 4 * parameters["encoder"] if frozen_encoder else 0,
        # Export and checkpoint are each written beside the one they replace.
        "model": 2 * 4 * trained,
        "checkpoints": 2 * 12 * trained,
    }
    if recipe.model.llm.save and recipe.model.llm.is_frozen:
        disk["LLM copy"] = weights - 4 * (sum(parameters.values()) - parameters["LLM"])
    return {name: size for name, size in disk.items() if size}


def _disk_free(recipe: FinetuneRecipe) -> int:
    import shutil

    place = Path(recipe.output or ".").absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + 600 * 2**20
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 + _resident_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 700 * 2**20


def _proposals(result: Plan, recipe: FinetuneRecipe, checkpointed: int, share: int) -> list[str]:
    """Changes, gentlest first, until the memory suffices; each as `key=value`."""
    if result.fits:
        return []
    proposals: list[str] = []
    budget = 0.95 * result.available
    if sum(result.disk.values()) > result.disk_free:
        proposals.append("output=DIR on a disk with more room")
    fixed = result.peak - result.memory["activations"]
    activations, micro = result.memory["activations"], result.micro_batch_size
    if result.precision == "fp32" and recipe.model.llm.is_frozen and recipe.model.llm.dtype == "auto":
        half = result.parameters["LLM"] * 2
        if fixed + activations > budget and half:
            proposals.append("model.llm.dtype=bf16")
            fixed -= half
    while fixed + activations > budget and micro > 1:
        activations, micro = activations * (micro // 2) // micro, micro // 2
    if micro != result.micro_batch_size:
        proposals.append(f"train.micro_batch_size={micro} ({math.ceil(share / micro)} micro-batches a step)")
    if fixed + activations > budget and not recipe.train.gradient_checkpointing:
        proposals.append("train.gradient_checkpointing=true")
        activations = min(activations, checkpointed * micro // result.micro_batch_size)
    if fixed + activations > budget:
        if recipe.model.adapter.targets == "full":
            proposals.append("model.adapter.targets=[X] (the encoder stays frozen)")
        proposals.append("a smaller LLM (model.llm.name), or a device with more memory")
    return proposals
