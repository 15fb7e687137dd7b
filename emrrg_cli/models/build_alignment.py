"""Builds the stage 2 model from a recipe, writes it into a run directory and reads it back.

A run directory contains `tokenizer/` and `model/`. The latter is replaced as a whole and contains
`encoder.safetensors` with `encoder.json`, `text_encoder/` as Hugging Face writes it, `alignment.safetensors`
(`vision_proj.*`, `text_proj.*`, `logit_scale`), `alignment.json` and, if findings are learned, `findings.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from emrrg_cli.checksums import check_run, write_checksums
from emrrg_cli.datasets.finding_targets import FINDING_SETS
from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_directory, atomic_write_text
from emrrg_cli.files.records import read_bounded
from emrrg_cli.models.alignment import Alignment
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.encoder_files import save_encoder
from emrrg_cli.models.findings_head import FindingsHead
from emrrg_cli.models.text_encoder import build_scratch_text_encoder, load_text_encoder, load_text_tokenizer
from emrrg_cli.models.transfer import load_encoder
from emrrg_cli.models.weights import fitting_tensors
from emrrg_cli.recipe.alignment import AlignRecipe

FORMAT = 1
PUBLISHED_TEXT_ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
HEAD_FILE = "alignment.safetensors"
FINDINGS_FILE = "findings.safetensors"
_CONFIG = "alignment.json"
_TEXT_ENCODER = "text_encoder"


def fresh_alignment(recipe: AlignRecipe, encoder: ArmEncoder, tokenizer: Any, run_dir: Path | None) -> Alignment:
    """Builds the model that training starts from.

    Args:
        encoder: An encoder of the recipe's size, with the weights that training starts from.
        run_dir: A resumed run, whose text tower is used if it has one; None: a new run.

    Raises:
        RunError: The text tower cannot be loaded.
    """
    settings, max_tokens = recipe.model.text, recipe.data.max_text_tokens
    own = None if run_dir is None else run_dir / "model" / _TEXT_ENCODER
    if own is not None and own.is_dir():
        text_encoder = load_text_encoder(str(own), None, max_tokens)
    elif settings.name == "scratch":
        text_encoder = build_scratch_text_encoder(settings.scratch, tokenizer, max_tokens)
    else:
        text_encoder = load_text_encoder(settings.name, settings.revision, max_tokens)
    if settings.frozen:
        text_encoder.requires_grad_(False)
    model = Alignment(encoder, text_encoder, tokenizer, recipe.model.dim, settings.pooling, max_tokens)
    if recipe.model.findings:
        model.findings = FindingsHead(encoder.d_model, len(FINDING_SETS[recipe.model.findings_set]))
    model.set_gradient_checkpointing(recipe.train.gradient_checkpointing)
    return model


def save_alignment(run_dir: Path, model: Alignment) -> None:
    """Replaces `run_dir/model` by the current model."""
    with atomic_directory(run_dir / "model") as directory:
        save_encoder(directory, model.encoder)
        head = {name: parameter.detach().cpu().contiguous() for name, parameter in model.head_parameters().items()}
        save_file(head, directory / HEAD_FILE)
        if model.findings is not None:
            save_file(model.findings.state_dict(), directory / FINDINGS_FILE)
        model.text_encoder.save_pretrained(directory / _TEXT_ENCODER)
        config = {
            "format": FORMAT,
            "kind": "alignment",
            "dim": model.vision_proj.out_features,
            "pooling": model.pooling,
            "max_text_tokens": model.max_text_tokens,
        }
        atomic_write_text(directory / _CONFIG, json.dumps(config, indent=2) + "\n")
        write_checksums(directory)


def load_alignment(run_dir: Path | str, scan: str = "auto", tokenizer: str | None = None) -> Alignment:
    """Loads the model of an `align` run or of a converted stage 2 checkpoint, in evaluation mode.

    Args:
        scan: Engine of the scan (`emrrg_cli.models.scan`).
        tokenizer: Hub name or directory of the text tower's tokenizer; None: the tokenizer of the run, or of the
            published text tower, because a published checkpoint contains no tokenizer.

    Raises:
        RunError: The run has no trained model yet, its parts do not fit together, or there is no tokenizer.
    """
    run_dir = Path(run_dir)
    trained = next((place for place in (run_dir / "model", run_dir) if (place / HEAD_FILE).is_file()), None)
    if trained is None:
        raise RunError(
            f"{run_dir}: there is no trained stage 2 model here",
            hint="Name a run directory of `emrrg align`, after the first validation or the end of its training.",
        )
    check_run(run_dir, trained)
    try:
        config = json.loads(read_bounded(trained / _CONFIG, 2**20))
        dim, pooling, max_text_tokens = config["dim"], config["pooling"], config["max_text_tokens"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{trained / _CONFIG} cannot be read: {error}") from error
    encoder = load_encoder(run_dir, scan)
    text_encoder = load_text_encoder(str(trained / _TEXT_ENCODER), None, max_text_tokens)
    own = run_dir / "tokenizer"
    words = load_text_tokenizer(tokenizer or (str(own) if own.is_dir() else PUBLISHED_TEXT_ENCODER))
    model = Alignment(encoder, text_encoder, words, dim, pooling, max_text_tokens)
    parameters = model.head_parameters()
    with torch.no_grad():
        for name, tensor in fitting_tensors(parameters, trained / HEAD_FILE).items():
            parameters[name].copy_(tensor)
    return model.requires_grad_(False).eval()
