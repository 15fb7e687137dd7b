"""LoRA on chosen projections, through PEFT. Partial LoRA is ordinary LoRA on a module name."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emrrg_cli.checksums import check_file
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.records import read_record
from emrrg_cli.models.weights import load_tensors
from emrrg_cli.vocabulary import ADAPTER_TARGETS

if TYPE_CHECKING:
    from peft import LoraConfig

_BLOCK = r"layers\.\d+\."

# Recipe target -> pattern of module names inside `ArmEncoder` (matched whole, as PEFT does).
ENCODER_TARGETS: dict[str, str] = {
    "X": _BLOCK + r"mixer\.X",
    "Z": _BLOCK + r"mixer\.Z",
    "dt": _BLOCK + r"mixer\.directions\.\d+\.dt",
    "B": _BLOCK + r"mixer\.directions\.\d+\.B",
    "C": _BLOCK + r"mixer\.directions\.\d+\.C",
    "in_proj": _BLOCK + r"mixer\.[XZ]",
    "x_proj": _BLOCK + r"mixer\.directions\.\d+\.(dt|B|C)",
    "dt_proj": _BLOCK + r"mixer\.directions\.\d+\.dt_proj",
    "out_proj": _BLOCK + r"mixer\.out_proj",
    "patch_embed": r"patch_embed",
    "mlp": _BLOCK + r"mlp\.w[123]",
}
# As in the paper's Table 6: LoRA on the query and value projections of the LLM.
LLM_TARGETS = ["q_proj", "v_proj"]


_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Options of PEFT that this program never uses.
_UNUSED = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "exclude_modules",
    "layers_to_transform", "layers_pattern", "layer_replication", "megatron_config", "loftq_config", "eva_config",
    "trainable_token_indices", "target_parameters", "lora_bias",
)  # fmt: skip


def encoder_lora(targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig | None:
    """Returns the PEFT configuration for those `targets` that are in the encoder; None if there are none.

    Raises:
        UsageError: A target is unknown.
    """
    from peft import LoraConfig

    names = [target for target in targets if target != "llm"]
    if unknown := [name for name in names if name not in ENCODER_TARGETS]:
        raise UsageError(f"unknown adapter targets {unknown}", hint=f"Known: {', '.join(ADAPTER_TARGETS)}.")
    if not names:
        return None
    pattern = "|".join(f"(?:{ENCODER_TARGETS[name]})" for name in names)
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)


def llm_lora(targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig | None:
    """Returns the PEFT configuration for the LLM; None if `llm` is not in `targets`."""
    from peft import LoraConfig

    if "llm" not in targets:
        return None
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(LLM_TARGETS))


def base_layer(layer: Any) -> Any:
    """Returns the layer without PEFT's adapters."""
    if type(layer) is nn.Linear:  # the usual case; looking up a missing attribute of a module is slow
        return layer
    return getattr(layer, "base_layer", layer)


def effective_weight(layer: nn.Module) -> Tensor:
    """Returns the weight of a Linear plus its LoRA updates, differentiable in both.

    Args:
        layer: `nn.Linear`, or PEFT's LoRA layer around one.

    Returns:
        `[out, in]`, in the dtype of the base weight.
    """
    base = base_layer(layer)
    weight: Tensor = base.weight
    if base is layer or layer.disable_adapters or layer.merged:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        for name in layer.active_adapters:  # type: ignore[union-attr]
            if name in layer.lora_A:  # type: ignore[operator]
                weight = weight + layer.get_delta_weight(name).to(weight.dtype)  # type: ignore[operator]
    return weight


def is_adapted(module: nn.Module) -> bool:
    """Whether a tower has adapters."""
    peft = sys.modules.get("peft")  # importing it takes a second, and without it no tower has adapters
    return peft is not None and isinstance(module, peft.PeftModel)


def plain(module: nn.Module) -> Any:
    """Returns the tower without its adapters."""
    return module.get_base_model() if is_adapted(module) else module  # type: ignore[operator]


def merge(module: nn.Module) -> nn.Module:
    """Adds the adapters to the weights and removes them: inference gives the same output and is faster."""
    if not is_adapted(module):
        return module
    merged: nn.Module = module.merge_and_unload()  # type: ignore[operator]
    return merged


def save_adapters(module: nn.Module, directory: Path) -> None:
    """Writes a tower's adapters in PEFT's own format; `peft.PeftModel.from_pretrained(tower, directory)` reads them."""
    module.save_pretrained(str(directory), save_embedding_layers=False)  # type: ignore[operator]


def load_adapters(module: nn.Module, directory: Path, expected: LoraConfig | None = None) -> nn.Module:
    """Adds saved adapters to a plain tower, frozen.

    The saved configuration is only checked against known values: none of its patterns is run before the check, and
    nothing that it names is imported.

    Args:
        expected: The configuration in the recipe; None: any adapters that this program writes.

    Raises:
        RunError: They do not fit the tower, or differ from the recipe.
    """
    import warnings

    from peft import PeftModel

    try:
        check_file(directory / _ADAPTER_WEIGHTS)
        saved = set(load_tensors(directory / _ADAPTER_WEIGHTS))
        config = _read_config(directory)
        if expected is not None and (changed := _first_difference(config, expected)):
            raise ValueError(f"{changed} differs from the recipe")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of tensors that are missing; they are named below
            adapted: nn.Module = PeftModel.from_pretrained(module, str(directory), config=config)
    except Exception as error:  # PEFT and safetensors raise errors of many types
        raise RunError(f"{directory}: these adapters do not fit the model: {error}") from error
    own = {name.replace(".default.", ".") for name, _ in adapted.named_parameters() if ".lora_" in name}
    if different := sorted(own ^ saved):
        state = "missing" if different[0] in own else "unknown"
        raise RunError(f"{directory}: these adapters do not fit the model: {different[0]} is {state}")
    return adapted


def _read_config(directory: Path) -> LoraConfig:
    """Returns a new configuration from the three values of a saved one that are needed.

    Raises:
        ValueError: `encoder_lora` and `llm_lora` never make such a configuration.
    """
    from peft import LoraConfig

    hint = "Put it back from a copy of the run."
    record = read_record(directory / "adapter_config.json", "the configuration of these adapters", hint)
    if record is None:
        raise ValueError("adapter_config.json is missing")
    rank, alpha, targets = record.get("r"), record.get("lora_alpha"), record.get("target_modules")
    fits = isinstance(rank, int) and 0 < rank <= 2**14 and isinstance(alpha, int | float) and 0 < alpha < 10**9
    if not fits:
        raise ValueError("adapter_config.json: r or lora_alpha is not a valid number")
    patterns = {f"(?:{pattern})" for pattern in ENCODER_TARGETS.values()}
    if isinstance(targets, list):
        known = sorted(map(str, targets)) == sorted(LLM_TARGETS)
    else:
        # No pattern contains "|(?:", so joined patterns can be split there.
        parts = str(targets).split("|(?:")
        known = {parts[0], *(f"(?:{part}" for part in parts[1:])} <= patterns
    if not known:
        raise ValueError("adapter_config.json: target_modules were not written by emrrg")
    if changed := [name for name in _UNUSED if record.get(name)]:
        raise ValueError(f"adapter_config.json: {changed[0]} is not supported")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, inference_mode=True)


def _first_difference(config: LoraConfig, expected: LoraConfig) -> str | None:
    same = {
        "r": config.r == expected.r,
        "lora_alpha": float(config.lora_alpha) == float(expected.lora_alpha),
        "target_modules": config.target_modules == expected.target_modules,
    }
    return next((name for name, equal in same.items() if not equal), None)
