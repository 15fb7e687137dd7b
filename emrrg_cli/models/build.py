"""Builds the stage 3 model from a recipe, writes it into a run directory and reads it back.

The top level of a run directory contains the parts that never change (`tokenizer/`, `llm.json` or `llm/`, and
`encoder.safetensors` of a frozen encoder). `model/` contains the trained parts (`bridge.safetensors`,
`adapters/encoder`, `adapters/llm`, and `encoder.safetensors` and `llm/` if all their weights are trained). It is
replaced as a whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from emrrg_cli.checksums import check_run, write_checksums
from emrrg_cli.datasets.finding_targets import FINDING_SETS
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_directory, atomic_write_text, read_directory, whole_directory
from emrrg_cli.files.records import read_record
from emrrg_cli.models import adapters
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.findings_prompt import FindingsPrompt
from emrrg_cli.models.hybrid_decoder import add_hybrid_layers, hybrid_parameters
from emrrg_cli.models.llm import add_dropout, build_scratch_llm, llm_record, load_llm, load_tokenizer
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.models.weights import fitting_tensors
from emrrg_cli.recipe.common import EncoderSettings
from emrrg_cli.recipe.finetuning import ModelSettings


def build_encoder(settings: EncoderSettings, scan: str = "auto") -> ArmEncoder:
    """Builds an encoder of the recipe's size with random weights."""
    width, depth = settings.width_and_depth
    return ArmEncoder(
        width,
        depth,
        image_size=settings.image_size,
        d_state=settings.d_state,
        drop_path=settings.drop_path,
        scan=scan,
    )


def assemble(settings: ModelSettings, encoder: ArmEncoder, llm: Any, tokenizer: Any) -> ReportGenerator:
    """Builds the model from its towers: adds hybrid layers and adapters, and freezes what is not trained.

    Raises:
        UsageError: The recipe does not fit the LLM.
    """
    _add_hybrid_layers(llm, settings)
    if settings.llm.name == "scratch":
        add_dropout(llm, settings.llm.scratch.dropout)
    targets = settings.adapter.targets
    names = targets if isinstance(targets, list) else []
    options = (settings.adapter.rank, settings.adapter.alpha, settings.adapter.dropout)
    encoder_config = adapters.encoder_lora(names, *options)
    llm_config = adapters.llm_lora(names, *options)
    model = _join(settings, _with_lora(encoder, encoder_config), _with_lora(llm, llm_config), tokenizer)
    set_trainable(model, encoder=targets == "full", llm=not settings.llm.is_frozen)
    return model


def _join(settings: ModelSettings, encoder: nn.Module, llm: Any, tokenizer: Any) -> ReportGenerator:
    text = settings.llm
    model = ReportGenerator(
        encoder,
        llm,
        tokenizer,
        settings.visual_prompt,
        settings.views,
        text.begin_token_id,
        text.end_text,
        settings.prompt,
    )
    if settings.view_tokens:
        model.add_view_embedding()
    if settings.findings:
        names = FINDING_SETS[settings.findings_set]
        prompt = FindingsPrompt(
            tokenizer,
            names,
            threshold=settings.findings_threshold,
            labels_in_training=settings.findings_prompt_labels,
        )
        model.add_findings_head(len(names), prompt if settings.findings_prompt else None)
    return model


def _add_hybrid_layers(llm: Any, settings: ModelSettings) -> None:
    hybrid = settings.hybrid
    if hybrid.every is not None:
        add_hybrid_layers(llm, hybrid.every, gate=hybrid.gate, query=hybrid.query)


def _lora_config(settings: ModelSettings, tower: str) -> Any:
    """Returns the LoRA configuration of the tower `encoder` or `llm`; None if the recipe has none for it."""
    targets = settings.adapter.targets
    make = adapters.encoder_lora if tower == "encoder" else adapters.llm_lora
    return make(targets if isinstance(targets, list) else [], settings.adapter.rank, settings.adapter.alpha)


def _adapted_towers(settings: ModelSettings) -> set[str]:
    targets = settings.adapter.targets
    return {"llm" if target == "llm" else "encoder" for target in targets} if isinstance(targets, list) else set()


def _with_lora(module: nn.Module, config: Any) -> nn.Module:
    if config is None:
        return module
    from peft import get_peft_model

    try:
        return get_peft_model(module, config)  # type: ignore[no-any-return]
    except ValueError as error:
        raise UsageError(f"LoRA does not fit {type(module).__name__}: {error}") from error


def set_trainable(model: ReportGenerator, *, encoder: bool, llm: bool) -> None:
    """Freezes everything but bridge, hybrid layers and adapters; `encoder` and `llm` also train all of these towers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name
    for _, parameter in model.bridge_parameters():
        parameter.requires_grad = True
    for tower, trained in ((model.encoder, encoder), (model.llm, llm)):
        if trained:
            for parameter in tower.parameters():
                parameter.requires_grad = True


def save_static(run_dir: Path, settings: ModelSettings, encoder: ArmEncoder, llm: Any, tokenizer: Any) -> None:
    """Writes the parts that training does not change. Called before hybrid layers and adapters are added."""
    if not (run_dir / "tokenizer").exists():
        with atomic_directory(run_dir / "tokenizer") as temporary:
            tokenizer.save_pretrained(temporary)
    if (
        settings.adapter.targets != "full" and not (run_dir / "encoder.safetensors").exists()
    ):  # a resumed run has loaded it from there
        temporary_file = run_dir / "encoder.safetensors.tmp"
        save_file(encoder.state_dict(), temporary_file)
        temporary_file.replace(run_dir / "encoder.safetensors")
    if settings.llm.is_frozen:
        atomic_write_text(run_dir / "llm.json", json.dumps(llm_record(settings.llm, llm), indent=2) + "\n")
        if settings.llm.save and not (run_dir / "llm").exists():
            with atomic_directory(run_dir / "llm") as temporary:
                llm.save_pretrained(temporary)


def save_trained(run_dir: Path, settings: ModelSettings, model: ReportGenerator) -> None:
    """Replaces `run_dir/model` by the current trained parts of the model."""
    with atomic_directory(run_dir / "model") as directory:
        bridge = {name: p.detach().cpu().contiguous() for name, p in model.bridge_parameters()}
        save_file(bridge, directory / "bridge.safetensors")
        if settings.adapter.targets == "full":
            state = {name: tensor.cpu().contiguous() for name, tensor in model.encoder.state_dict().items()}
            save_file(state, directory / "encoder.safetensors")
        for name, tower in (("encoder", model.encoder), ("llm", model.llm)):
            if adapters.is_adapted(tower):
                adapters.save_adapters(tower, directory / "adapters" / name)
        if not settings.llm.is_frozen:
            added = {name for name, _ in hybrid_parameters(model.llm)}
            state = {name: tensor for name, tensor in model.llm.state_dict().items() if name not in added}
            model.llm.save_pretrained(directory / "llm", state_dict=state)
        write_checksums(directory)


def load_model(run_dir: Path, settings: ModelSettings, dtype: torch.dtype, *, merge: bool = True) -> ReportGenerator:
    """Loads the model of a run in evaluation mode, with merged adapters unless `merge` is false.

    The run may still be training: all parts come from the same export.

    Args:
        dtype: dtype of the weights of a frozen LLM.

    Raises:
        RunError: The run has no trained model yet, or its parts do not fit together.
    """
    return read_directory(run_dir / "model", lambda trained: _load_model(run_dir, trained, settings, dtype, merge))


def _load_model(
    run_dir: Path, trained: Path, settings: ModelSettings, dtype: torch.dtype, merge: bool
) -> ReportGenerator:
    if not (trained / "bridge.safetensors").is_file():
        raise RunError(
            f"{run_dir}: this run has no trained model yet",
            hint="Wait for the first validation or the end of its training.",
        )
    check_run(run_dir, trained)
    tokenizer = _run_tokenizer(run_dir, settings)
    encoder = _load_encoder(run_dir, trained, settings)
    llm = load_run_llm(run_dir, settings, dtype)
    _add_hybrid_layers(llm, settings)
    llm = _with_adapters(llm, "llm", trained, settings)
    model = _join(settings, encoder, llm, tokenizer)
    parameters = dict(model.bridge_parameters())
    with torch.no_grad():
        for name, tensor in fitting_tensors(parameters, trained / "bridge.safetensors").items():
            parameters[name].copy_(tensor)
    if merge:
        model.encoder = adapters.merge(model.encoder)
        if settings.llm.quantization == "none":  # merged into quantised weights, updates would be lost by rounding
            model.llm = adapters.merge(model.llm)
    return model.requires_grad_(False).eval()


def load_run_encoder(run_dir: Path, settings: ModelSettings) -> nn.Module:
    """Loads only the encoder of a run, as it was exported, in evaluation mode with merged adapters.

    Raises:
        RunError: As in `load_model`.
    """
    encoder = read_directory(run_dir / "model", lambda trained: _load_encoder(run_dir, trained, settings))
    merged: nn.Module = adapters.merge(encoder)
    return merged.requires_grad_(False).eval()


def _load_encoder(run_dir: Path, trained: Path, settings: ModelSettings) -> nn.Module:
    whole = trained / "encoder.safetensors"
    with torch.device("meta"):  # shapes without memory: the recipe of a stranger may ask for an encoder of any size
        shapes = build_encoder(settings.encoder, settings.scan).state_dict()
    tensors = fitting_tensors(shapes, whole if whole.is_file() else run_dir / "encoder.safetensors")
    encoder = build_encoder(settings.encoder, settings.scan)
    encoder.load_state_dict(tensors)
    adapted: nn.Module = _with_adapters(encoder, "encoder", trained, settings)
    return adapted


def _with_adapters(tower: Any, name: str, trained: Path, settings: ModelSettings) -> Any:
    directory = trained / "adapters" / name
    if directory.is_dir():
        return adapters.load_adapters(tower, directory, _lora_config(settings, name))
    if name in _adapted_towers(settings):
        raise RunError(f"{directory}: the adapters of this run are missing")
    return tower


def _run_tokenizer(run_dir: Path, settings: ModelSettings) -> Any:
    # A converted checkpoint may have no tokenizer: then it is the tokenizer of its LLM, which was never trained.
    own = run_dir / "tokenizer"
    if settings.llm.is_frozen and not own.is_dir():
        return load_tokenizer(settings.llm.name, settings.llm.revision)
    return load_tokenizer(str(own))


def load_run_llm(run_dir: Path, settings: ModelSettings, dtype: torch.dtype) -> Any:
    """Loads the LLM of a run: its own copy if it has one, else the LLM that the run names."""
    for own in (whole_directory(run_dir / "model") / "llm", run_dir / "llm"):
        if own.is_dir():
            return load_llm(str(own), None, dtype if settings.llm.is_frozen else torch.float32)
    if not settings.llm.is_frozen:
        raise RunError(f"{run_dir / 'model' / 'llm'}: the trained LLM of this run is missing")
    hint = "Put it back from a copy of the run; if you delete it, the LLM of recipe.yaml is used without a check."
    record = read_record(run_dir / "llm.json", "the record of this run's LLM", hint) or {}
    revision = record.get("commit") or settings.llm.revision
    llm = load_llm(settings.llm.name, revision, dtype, settings.llm.quantization)
    found = llm_record(settings.llm, llm)
    for key in ("weights_fingerprint", "config_sha256"):
        if record.get(key) is not None and record[key] != found[key]:
            raise RunError(
                f"the LLM at {settings.llm.name} is not the one that {run_dir} was trained with ({key} differs)",
                hint="Put back the LLM of the training, or train with model.llm.save=true to keep a copy in the run.",
            )
    return llm


def fresh_llm(settings: ModelSettings, tokenizer: Any, dtype: torch.dtype) -> Any:
    """Builds or loads the LLM that training starts from."""
    if settings.llm.name == "scratch":
        return build_scratch_llm(settings.llm.scratch, tokenizer)
    own = dtype if settings.llm.is_frozen else torch.float32
    return load_llm(settings.llm.name, settings.llm.revision, own, settings.llm.quantization)
