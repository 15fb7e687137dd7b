"""What a recipe will need on this machine: parameters, memory, time, disk, from meta tensors and a short trial.

Parameters are counted on a model of meta tensors, which has no weights. Time and activations come from real training
steps of a model with a few encoder blocks and decoder layers, of the recipe's widths and batch, with random weights:
what further blocks and layers add is measured, and the rest is multiplication. Where there is a data set, some of its
images are read as the training would.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from emrrg_cli.datasets.epochs import check_batch
from emrrg_cli.errors import RunError
from emrrg_cli.models.adapters import plain
from emrrg_cli.models.build import assemble, build_encoder
from emrrg_cli.models.hybrid_decoder import hybrid_parameters
from emrrg_cli.models.llm import can_quantize
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.planning.llms import PlanTokenizer, llm_config
from emrrg_cli.planning.loading import count_studies, seconds_per_study
from emrrg_cli.planning.trial import measure
from emrrg_cli.recipe.finetuning import FinetuneRecipe, ModelSettings
from emrrg_cli.runtime import choose_precision, llm_dtype, make_accelerator
from emrrg_cli.training.progress import resident_bytes

# Memory of a GPU that torch does not see: the context and kernels of CUDA, as seen on an H100.
_CUDA_CONTEXT = 600 * 2**20
# Of this program on a CPU, where the system does not say.
_PROGRAM = 700 * 2**20
# A process keeps the holes between the tensors of its heap: its memory over theirs, as seen in training on a CPU.
_HOLES = 1.15


@dataclass
class Plan:
    """Prediction for one device; bytes and seconds, the latter of an optimizer step.

    `seconds_loading` is the time in which the loader brings a step's studies (None: there is no data set to read).
    `total_steps` are those of all epochs, or `train.max_steps` where that ends the schedule before (None: how many
    studies there are is not known).
    """

    parameters: dict[str, int]
    trainable: dict[str, int]
    memory: dict[str, int]
    available: int
    device: str
    precision: str
    micro_batch_size: int
    seconds_computing: float
    seconds_loading: float | None
    seconds_per_step: float
    steps_per_epoch: int | None
    epochs: int
    total_steps: int | None
    disk: dict[str, int]
    disk_free: int
    proposals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        counts = (self.steps_per_epoch, self.total_steps)
        epoch, total = (None if steps is None else self.seconds_per_step * steps for steps in counts)
        more = {"peak": self.peak, "fits": self.fits, "seconds_per_epoch": epoch, "seconds_total": total}
        return {**asdict(self), **more}


def plan(
    recipe: FinetuneRecipe,
    *,
    studies: int | None = None,
    views: int | None = None,
    processes: int = 1,
    report: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Predicts what training with a recipe needs, by meta tensors and a trial of a few seconds to minutes.

    Args:
        studies: training studies, for the time of an epoch; None: those of `data.root`, or unknown without one.
        views: images a study; None: the mean of those of `data.root`, or 1 without one.
        processes: processes that share `train.batch_size`.
        report: called with a description of each measurement.

    Raises:
        UsageError: when `data.root` is no dataset directory, or the training would refuse the batch.
        RunError: when the LLM's configuration or the training split cannot be had, or not even one block fits.
    """
    import emrrg_cli.training.finetune  # noqa: F401  (the program's own memory is that of a training process)

    precision = choose_precision(recipe.train.precision)
    accelerator = make_accelerator(precision, 0)
    device: torch.device = accelerator.device
    config = llm_config(recipe.model)
    if recipe.data.root is not None and (studies is None or views is None):
        report("counting studies")
        counted, images = count_studies(recipe)
        studies, views = studies or counted, views or max(1, round(images))
    if studies is not None:
        studies = min(studies, recipe.data.limit or studies)
    check_batch(recipe.train.batch_size, processes, studies)
    views = views or 1
    views = min(views, recipe.data.max_views or views)
    share = recipe.train.batch_size // processes
    micro = min(recipe.train.micro_batch_size or share, share)

    loading = None
    if recipe.data.root is not None:
        report("measuring how fast images are read")
        loading = seconds_per_study(recipe, micro) * share
    report("counting parameters")
    whole = _meta_model(recipe.model, config)
    parameters, trainable = _count(whole)
    program, files = resident_bytes() or _PROGRAM, _file_bytes()
    try:
        step = measure(
            recipe,
            config,
            accelerator,
            micro=micro,
            views=views,
            llm_parameters=parameters["LLM"],
            report=report,
        )
    except torch.cuda.OutOfMemoryError:
        raise RunError("not even one encoder block and one decoder layer fit on this GPU") from None
    # The first step brings in more of the libraries.
    program = program + _file_bytes() - files if device.type == "cpu" else _CUDA_CONTEXT
    weights = _weight_bytes(whole, recipe, precision)
    llm_weights = weights - 4 * (sum(parameters.values()) - parameters["LLM"])
    trained = sum(trainable.values())
    logits = micro * (recipe.data.max_report_tokens + 2) * config.vocab_size * 4 * 2  # fp32 copy and its gradient
    holes = _HOLES if device.type == "cpu" else 1.0
    activations = int(holes * ((step.checkpointed if recipe.train.gradient_checkpointing else step.saved) + logits))
    memory = {
        "program": program,
        "LLM weights": llm_weights,
        "other weights": weights - llm_weights,
        "optimizer": 8 * trained,
        "activations": activations,
        "gradients": _gradients(4 * trained, activations, accumulates=micro < share, device_type=device.type),
    }
    computing = step.seconds * share / micro + step.update
    steps = None if studies is None else studies // recipe.train.batch_size
    total = None if steps is None else steps * recipe.train.epochs
    if total is not None and recipe.train.max_steps is not None:
        total = min(total, recipe.train.max_steps)
    result = Plan(
        parameters=parameters,
        trainable=trainable,
        memory=memory,
        available=_available_bytes(device),
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        precision=precision,
        micro_batch_size=micro,
        seconds_computing=computing,
        seconds_loading=loading,
        seconds_per_step=_together(computing, loading or 0.0, recipe.data.workers, device.type),
        steps_per_epoch=steps,
        epochs=recipe.train.epochs,
        total_steps=total,
        disk=_disk(recipe, parameters, trained, llm_weights),
        disk_free=_disk_free(recipe),
    )
    result.notes = _notes(result, recipe)
    result.proposals = _proposals(result, recipe, int(holes * step.checkpointed), share)
    return result


def _together(computing: float, loading: float, workers: int, device_type: str) -> float:
    """Seconds of a step that computes and has its batch loaded by `workers` processes, or by the one that computes."""
    if not workers:
        return computing + loading
    if device_type == "cuda":
        return max(computing, loading)
    # Arithmetic takes every core of a CPU: what is loaded meanwhile is taken from it.
    cores = os.cpu_count() or 1
    return max(loading, computing + loading * min(workers, cores) / cores)


def _gradients(size: int, activations: int, *, accumulates: bool, device_type: str) -> int:
    """Bytes that gradients and the optimizer's step add to the peak.

    Gradients fill up while activations are freed: only where micro-batches add up are they there all the time. When
    the optimizer steps the activations are gone; on a GPU, AdamW takes all parameters at once and needs a copy then.
    """
    stepping = 2 * size if device_type == "cuda" else size
    return max(size if accumulates else 0, stepping - activations)


def _meta_model(settings: ModelSettings, config: Any) -> ReportGenerator:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        return assemble(settings, build_encoder(settings.encoder, settings.scan), llm, PlanTokenizer())


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
    # Everything is fp32 but a frozen LLM, whose inner projections may be quantised.
    own = llm_dtype(recipe.model.llm.dtype, precision).itemsize if recipe.model.llm.is_frozen else 4
    inner = {"none": own, "8bit": 1.0, "4bit": 0.516}[recipe.model.llm.quantization]
    total = 0.0
    for name, parameter in model.named_parameters():
        in_llm = name.startswith("llm.") and ".cross." not in name and ".lora_" not in name
        outer = parameter.ndim < 2 or "embed" in name or "lm_head" in name
        total += parameter.numel() * ((own if outer else inner) if in_llm else 4)
    return int(total)


def _disk(recipe: FinetuneRecipe, parameters: dict[str, int], trained: int, llm_weights: int) -> dict[str, int]:
    frozen_encoder = recipe.model.adapter.targets != "full"
    disk = {
        "encoder": 4 * parameters["encoder"] if frozen_encoder else 0,
        # Export and checkpoint are each written beside the one they replace.
        "model": 2 * 4 * trained,
        "checkpoints": 2 * 12 * trained,
    }
    if recipe.model.llm.save and recipe.model.llm.is_frozen:
        disk["LLM copy"] = llm_weights
    return {name: size for name, size in disk.items() if size}


def _disk_free(recipe: FinetuneRecipe) -> int:
    place = Path(recipe.output or ".").absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _file_bytes() -> int:
    """Memory of this process that holds pages of files, libraries foremost; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _CUDA_CONTEXT
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 + (resident_bytes() or 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _notes(result: Plan, recipe: FinetuneRecipe) -> list[str]:
    """What the reader of the figures should know."""
    notes = []
    loading = result.seconds_loading
    if loading is None:
        notes.append("reading images is not in the time: data.root=DIR measures it")
    elif loading > result.seconds_computing and (
        more := math.ceil(recipe.data.workers * loading / result.seconds_computing)
    ) <= (os.cpu_count() or 1):
        notes.append(f"reading images limits the time; data.workers={more} would keep up")
    elif loading > result.seconds_computing:
        notes.append("reading images limits the time: preprocess them to a smaller size")
    if recipe.model.llm.quantization != "none" and not can_quantize():
        notes.append(
            f"bitsandbytes is not installed: the time is that of a model that is not {recipe.model.llm.quantization}"
        )
    return notes


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
    whole_llm = result.precision == "fp32" and recipe.model.llm.is_frozen and recipe.model.llm.dtype == "auto"
    if fixed + activations > budget and whole_llm:
        proposals.append("model.llm.dtype=bf16")
        fixed -= result.memory["LLM weights"] // 2
    while fixed + activations > budget and micro > 1:
        activations, micro = activations * (micro // 2) // micro, micro // 2
    if micro != result.micro_batch_size:
        proposals.append(f"train.micro_batch_size={micro} ({math.ceil(share / micro)} micro-batches a step)")
    if fixed + activations > budget and recipe.model.llm.is_frozen and recipe.model.llm.quantization == "none":
        proposals.append("model.llm.quantization=4bit (needs bitsandbytes)")
        fixed -= int(result.memory["LLM weights"] * 0.7)
    if fixed + activations > budget and not recipe.train.gradient_checkpointing:
        proposals.append("train.gradient_checkpointing=true")
        activations = min(activations, checkpointed * micro // result.micro_batch_size)
    if fixed + activations > budget:
        if recipe.model.adapter.targets == "full":
            proposals.append("model.adapter.targets=[X] (the encoder stays frozen)")
        proposals.append("a smaller LLM (model.llm.name), or a device with more memory")
    return proposals
