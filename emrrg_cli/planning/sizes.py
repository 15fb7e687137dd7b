"""Counts the parameters of a recipe's model, and their bytes in memory and on disk."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from emrrg_cli.models.adapters import plain
from emrrg_cli.models.build import assemble, build_encoder
from emrrg_cli.models.hybrid_decoder import hybrid_parameters
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.planning.llms import PlanTokenizer
from emrrg_cli.recipe.finetuning import FinetuneRecipe, GenerationSettings, ModelSettings
from emrrg_cli.runtime import llm_dtype
from emrrg_cli.training.progress import resident_bytes

# GPU memory that PyTorch does not count: the CUDA context and kernels, measured on an H100.
CUDA_CONTEXT = 600 * 2**20


def meta_model(settings: ModelSettings, config: Any) -> ReportGenerator:
    """Builds the model of a recipe on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        return assemble(settings, build_encoder(settings.encoder, settings.scan), llm, PlanTokenizer())


def count_parameters(model: ReportGenerator) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the number of parameters of each part of a model, and the number of trained ones."""
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


def weight_bytes(model: ReportGenerator, recipe: FinetuneRecipe, precision: str) -> int:
    """Returns the bytes of the weights in memory."""
    # Everything is fp32 except a frozen LLM, whose linear layers may be quantised.
    own = llm_dtype(recipe.model.llm.dtype, precision).itemsize if recipe.model.llm.is_frozen else 4
    inner = {"none": own, "8bit": 1.0, "4bit": 0.516}[recipe.model.llm.quantization]
    total = 0.0
    for name, parameter in model.named_parameters():
        in_llm = name.startswith("llm.") and ".cross." not in name and ".lora_" not in name
        outer = parameter.ndim < 2 or "embed" in name or "lm_head" in name
        total += parameter.numel() * ((own if outer else inner) if in_llm else 4)
    return int(total)


def gradients(size: int, activations: int, *, accumulates: bool, device_type: str) -> int:
    """Returns the bytes that gradients and the optimizer step add to the peak.

    The backward pass frees activations while it creates gradients, so gradients add to the peak only when several
    micro-batches are accumulated. The optimizer step runs after all activations are freed; on a GPU, AdamW updates all
    parameters at once and needs a temporary copy.

    Args:
        size: Bytes of the gradients.
        activations: Bytes of the activations.
        accumulates: Whether a step has several micro-batches.
        device_type: `cuda` or `cpu`.
    """
    stepping = 2 * size if device_type == "cuda" else size
    return max(size if accumulates else 0, stepping - activations)


def reports_at_a_time(generation: GenerationSettings) -> int:
    """Returns the number of reports that are decoded together."""
    return generation.batch_size * (generation.consensus or 1)


def report_bytes(model: ReportGenerator, recipe: FinetuneRecipe, views: int, precision: str) -> int:
    """Returns the bytes of the keys and values of one report while reports are written, for prompts without context.

    Args:
        model: The model; only its sizes are used.
        recipe: Its recipe.
        views: Images per study.
        precision: Precision in which the model computes.
    """
    settings, generation = recipe.model, recipe.generation
    grid = settings.encoder.image_size // 16
    joined = views if settings.views == "concat" else 1
    visual = joined * (grid**2 + 1)
    prompt = joined * (math.ceil(grid / 2) ** 2 + 1) if settings.visual_prompt == "pooled" else visual
    text = len(model.before) + len(model.between) + len(model.after)
    if model.findings_prompt is not None:
        text += sum(len(name) + 1 for name in model.findings_prompt.words[2:])  # without yes and no, which follow names
    room = math.ceil((text + prompt) / 16) * 16
    new = math.ceil(generation.max_new_tokens / 8) * 8
    config = plain(model.llm).config.get_text_config(decoder=True)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    hybrids = 0 if settings.hybrid.every is None else math.ceil(layers / settings.hybrid.every)
    beams = generation.num_beams
    if generation.engine == "transformers":  # a copy of the prompt for each beam
        tokens = beams * (layers * (room + new) + hybrids * visual)
    else:
        tokens = layers * (room + beams * new) + hybrids * visual
    own = llm_dtype(settings.llm.dtype, precision).itemsize if settings.llm.is_frozen else 4
    return int(2 * tokens * width * (own if precision == "fp32" else 2))


def reports_per_study(recipe: FinetuneRecipe) -> int:
    """Returns the number of reports of each study in the largest step: the sampled ones and the reference, or one."""
    settings = recipe.train.self_critical
    return 1 if settings is None else settings.samples + bool(settings.cross_entropy)


def disk_bytes(recipe: FinetuneRecipe, parameters: dict[str, int], trained: int, llm_weights: int) -> dict[str, int]:
    """Returns the bytes of each part of a run directory."""
    frozen_encoder = recipe.model.adapter.targets != "full"
    disk = {
        "encoder": 4 * parameters["encoder"] if frozen_encoder else 0,
        # A new export or checkpoint is written before the old one is removed.
        "model": 2 * 4 * trained,
        "checkpoints": 2 * 12 * trained,
    }
    if recipe.model.llm.save and recipe.model.llm.is_frozen:
        disk["LLM copy"] = llm_weights
    return {name: size for name, size in disk.items() if size}


def disk_free(recipe: FinetuneRecipe) -> int:
    """Returns the free bytes on the disk of the run directory."""
    place = Path(recipe.output or ".").absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def file_bytes() -> int:
    """Returns the bytes of file pages in this process, mostly libraries; 0 if the system does not report them."""
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


def available_bytes(device: torch.device) -> int:
    """Returns the bytes that training can use on a device, including the memory of this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT
    return psutil.virtual_memory().available + resident_bytes()
