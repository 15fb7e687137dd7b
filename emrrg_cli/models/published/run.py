"""Writes a stage 3 checkpoint as a run directory for `emrrg generate` and `emrrg evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.models.encoder_files import ENCODER_FILE, EncoderConfig, encoder_source
from emrrg_cli.models.foreign_files import check_model_directory
from emrrg_cli.models.published.directories import BRIDGE_FILE, save_tensors
from emrrg_cli.models.published.importing import Imported, import_checkpoint
from emrrg_cli.recipe.common import ENCODER_SIZES
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.recipe.load import RUN_RECIPE, dump_recipe, load_recipe
from emrrg_cli.recipe.paths import with_absolute_paths

# The recipe of a published file, by a part of its name.
_RECIPES = (
    ("mimic", "mimic_cxr/finetune-full"),
    ("chexpert", "chexpert_plus/finetune-full"),
    ("cxp", "chexpert_plus/finetune-full"),
)
DEFAULT_RECIPE = "iu_xray/finetune-full"
# The LLMs of the published models, by the width of their hidden states.
_LLMS = {4096: "meta-llama/Llama-2-7b-chat-hf", 2048: "Qwen/Qwen1.5-1.8B-Chat"}


def default_recipe(file: Path) -> str:
    """Returns the recipe of a published file: of MIMIC-CXR or CheXpert Plus if its name says so, else of IU X-Ray."""
    name = file.name.lower()
    return next((recipe for part, recipe in _RECIPES if part in name), DEFAULT_RECIPE)


def base_encoder(base: Path, bridge_width: int) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Returns the encoder of a stage 2 file or directory, for a stage 3 file without an encoder.

    Raises:
        UsageError: It has no encoder with four directions, or the width of its encoder does not fit the bridge.
        RunError: It cannot be read.
    """
    if base.is_dir():
        source = encoder_source(base)
        config, tensors = source.config, source.tensors
    else:
        imported = import_checkpoint(base)
        if imported.config is None:
            raise UsageError(f"{base}: this file has no encoder", hint="Set --base to the stage 2 file.")
        config, tensors = imported.config, imported.part("encoder.")
    if not config.class_token:
        raise UsageError(f"{base}: this is a checkpoint of stage 1", hint="Set --base to the stage 2 file.")
    if config.d_model != bridge_width:
        raise UsageError(
            f"{base}: its encoder has width {config.d_model}, but llama_proj needs {bridge_width}",
            hint="Use the stage 2 file of the same size (base or large).",
        )
    return config, tensors


def run_recipe(imported: Imported, config: EncoderConfig, recipe: str, llm: str | None) -> FinetuneRecipe:
    """Returns the recipe of the run: `recipe` with the encoder of the file and a plain LLM of the bridge's width.

    Raises:
        UsageError: There is no such recipe.
    """
    size = next((s for s, sizes in ENCODER_SIZES.items() if sizes == (config.d_model, config.depth)), None)
    encoder = {
        "size": size,
        "d_model": None if size else config.d_model,
        "depth": None if size else config.depth,
        "d_state": config.d_state,
        "image_size": config.image_size,
    }
    overrides = [f"model.encoder.{key}={json.dumps(value)}" for key, value in encoder.items()]
    overrides += [
        "model.hybrid.every=null",
        "model.visual_prompt=full",
        f"model.adapter.targets={'none' if imported.config is None else 'full'}",
        "model.llm.frozen=true",
    ]
    hidden = imported.ours["bridge.proj.weight"].shape[0]
    if hidden == 2048:  # the release trains Qwen with token 0 as the first and `</s>` as plain text at the end
        overrides += ["model.llm.begin_token_id=0", 'model.llm.end_text="</s>"']
    if (name := llm or _LLMS.get(hidden)) is not None:
        overrides.append(f"model.llm.name={json.dumps(name)}")
    return with_absolute_paths(load_recipe(recipe, overrides, stage=FinetuneRecipe))


def write_run(
    directory: Path, imported: Imported, config: EncoderConfig, encoder: dict[str, Tensor], recipe: FinetuneRecipe
) -> list[str]:
    """Writes a run directory.

    Args:
        directory: An empty directory.
        encoder: Tensors by the names of `ArmEncoder`. They are written into `model/` if they come from the same file,
            and to the top level if they are the frozen encoder of another file.

    Returns:
        Lines for the user: what the run still needs.

    Raises:
        UsageError: The LLM is on this computer and does not fit the bridge.
    """
    (directory / "model").mkdir()
    atomic_write_text(directory / RUN_RECIPE, dump_recipe(recipe))
    bridge = {name: tensor for name, tensor in imported.ours.items() if name.startswith("bridge.")}
    save_tensors(bridge, directory / "model" / BRIDGE_FILE)
    save_tensors(encoder, (directory if imported.config is None else directory / "model") / ENCODER_FILE)
    name, hidden = recipe.model.llm.name, bridge["bridge.proj.weight"].shape[0]
    found = _llm_here(name)
    if found is None and name in _LLMS.values() and name != _LLMS.get(hidden):
        return [
            f"llama_proj needs an LLM of width {hidden}, but {name} of the recipe has another width: "
            f"convert again with --llm NAME or DIRECTORY, or set model.llm.name in {RUN_RECIPE}"
        ]
    if found is None:
        return [
            f"the LLM {name} is not on this computer: `emrrg generate` and `evaluate` will download it with its "
            "tokenizer (or convert again with --llm DIRECTORY)"
        ]
    width, tokenizer = found
    if width != hidden:
        raise UsageError(
            f"{imported.file}: llama_proj needs an LLM of width {hidden}, but {name} has width {width}",
            hint="Name the LLM that it was trained with: --llm NAME or DIRECTORY.",
        )
    tokenizer.save_pretrained(directory / "tokenizer")
    return []


def _llm_here(name: str) -> tuple[int, Any] | None:
    """Returns width and tokenizer of an LLM in a directory or in the local cache; None if it is not there.

    Raises:
        RunError: It is a directory without an LLM, or a path that does not exist.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        check_model_directory(name)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **options)
        return config.hidden_size, AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # not cached, or broken: the errors have many types
        # A hub name has at most one slash.
        if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RunError(f"{name}: no LLM with its tokenizer in this directory: {reason}") from error
        return None
