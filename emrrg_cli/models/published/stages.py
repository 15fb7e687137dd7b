"""The tensors that a published checkpoint of each stage must contain."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from emrrg_cli.errors import RunError
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.arm.pretrainer import ArmPretrainer
from emrrg_cli.models.encoder_files import EncoderConfig, depth_of
from emrrg_cli.models.published.bert import HEAD_WIDTH, bert_config, bert_shapes
from emrrg_cli.models.published.layout import (
    Piece,
    alignment_pieces,
    bridge_pieces,
    decoder_pieces,
    encoder_pieces,
    is_block_causal,
    sizes_of,
)
from emrrg_cli.models.report_generator import Bridge

Stage = Literal["pretrain", "align", "finetune", "encoder"]

LABELS: dict[Stage, str] = {
    "pretrain": "stage 1 (pretrain)",
    "align": "stage 2 (align)",
    "finetune": "stage 3 (finetune)",
    "encoder": "the encoder of stages 2 and 3",
}
ENCODER = "visual_encoder."
TEXT = "text_encoder."
# Names that only this stage has; if stages share a name, the later stage is first.
_MARKS: dict[Stage, tuple[str, ...]] = {
    "pretrain": ("ar_token", "ar_norm.", "ar_pred.", "dec_block.", "enc2dec."),
    "finetune": ("llama_proj.", "layer_norm."),
    "align": ("vision_proj.", "text_proj.", "logit_scale", TEXT),
    "encoder": (f"{ENCODER}layers.", "layers.0.mixer."),
}
_ADAPTER = re.compile(r"visual_encoder\.layers\.\d+\.mixer\.lora_X\.adapter_(down|up)\.weight")
_ADAPTERS_LEFT_OUT = (
    "the adapters (lora_X) are left out: adapter_up is [d/2, r], but LoRA on X needs [d, r]. The released code calls "
    "the last block's mixer from every block and adds the update to half of the mixer's output; on IU X-Ray the update "
    "is frozen at its initial value, and the test script of CheXpert Plus ignores it"
)


@dataclass
class Expected:
    """The expected tensors of a checkpoint, and the problems that were found.

    Args:
        pieces: The conversion of its tensors to ours.
        config: Sizes of its encoder; None if it has no encoder.
        left_out: Known tensors that our layout does not have, with the reason.
        problems: Names of wrong or missing tensors, with a sentence that names them.
        notes: Messages for the user.
        modules: For initial values of missing tensors: prefixes of our names, with functions that build the modules.
    """

    pieces: list[Piece] = field(default_factory=list)
    config: EncoderConfig | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    modules: list[tuple[str, Callable[[], nn.Module]]] = field(default_factory=list)


def stage_of(tensors: Mapping[str, Tensor]) -> Stage:
    """Returns the stage of tensors, from their names.

    Raises:
        RunError: They belong to another network. The message does not name the file.
    """
    for stage, marks in _MARKS.items():
        if any(name.startswith(marks) for name in tensors):
            return stage
    shown = ", ".join(list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
    raise RunError(
        f"this is a checkpoint of another network: its tensors are {shown}" if tensors else "it contains no tensors",
        hint="`emrrg convert` reads the published checkpoints of MambaXray-VL and EMRRG.",
    )


def expect(stage: Stage, tensors: Mapping[str, Tensor]) -> Expected:
    """Returns the expected tensors of a checkpoint of a stage, with the sizes that its tensors show.

    Raises:
        RunError: Too many tensors are missing to find the sizes. The message does not name the file.
    """
    expected = Expected()
    if stage == "pretrain":
        _expect_pretrainer(tensors, expected)
        return expected
    own = [name for name in tensors if name.startswith(ENCODER) and not _ADAPTER.fullmatch(name)]
    if own or stage != "finetune":  # stage 3 with a frozen backbone has saved no encoder
        _expect_encoder(tensors, ENCODER if own or stage != "encoder" else "", expected)
    if stage == "align":
        _expect_alignment(tensors, expected)
    elif stage == "finetune":
        _expect_bridge(tensors, expected)
    return expected


def _sizes(tensors: Mapping[str, Tensor], *, class_token: bool) -> EncoderConfig:
    config = sizes_of(tensors, class_token=class_token)
    if config is None:
        raise RunError("the encoder is incomplete: pos_embed, norm1 or A_log, which give its sizes, is missing")
    return config


def _expect_encoder(tensors: Mapping[str, Tensor], prefix: str, expected: Expected) -> None:
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    config = expected.config = _sizes(inner, class_token=True)
    expected.pieces += [piece.prefixed(prefix, "encoder.") for piece in encoder_pieces(config)]
    sizes = (config.d_model, config.depth, config.image_size, config.d_state)
    expected.modules.append(("encoder.", lambda: ArmEncoder(*sizes)))


def _expect_pretrainer(tensors: Mapping[str, Tensor], expected: Expected) -> None:
    config = expected.config = _sizes(tensors, class_token=False)
    axes = {"ar_token": -1, "ar_norm.weight": 0, "ar_norm.bias": 0, "ar_pred.weight": -1}
    widths = [tensors[name].shape[axis] for name, axis in axes.items() if name in tensors and tensors[name].dim()]
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"dec_block\.(\d+)\.", name))}
    if not widths or not blocks:
        raise RunError("the decoder is incomplete: ar_token or dec_block, which give its sizes, is missing")
    width, depth = max(set(widths), key=widths.count), depth_of(blocks)
    expected.pieces += [piece.prefixed("", "encoder.") for piece in encoder_pieces(config)]
    expected.pieces += decoder_pieces(config, width, depth)
    sizes = (config.d_model, config.depth, config.image_size, config.d_state, width, depth)
    expected.modules.append(("", lambda: ArmPretrainer(*sizes)))
    if "mask" not in tensors:
        return
    if is_block_causal(tensors["mask"], config.grid):
        expected.left_out["mask"] = "follows from the image size"
    else:
        shape = list(tensors["mask"].shape)
        expected.problems["mask"] = f"mask {shape} is not the block-causal mask of {config.image_size} px"


def _expect_alignment(tensors: Mapping[str, Tensor], expected: Expected) -> None:
    text = {name.removeprefix(TEXT): tensor for name, tensor in tensors.items() if name.startswith(TEXT)}
    _expect_text(text, expected)
    image, report = (tensors.get(f"{name}_proj.weight") for name in ("vision", "text"))
    matrices = [tensor for tensor in (report, image) if tensor is not None and tensor.dim() == 2]
    if not matrices and any(name.startswith(("vision_proj.", "text_proj.", "logit_scale")) for name in tensors):
        raise RunError("the projections are incomplete: vision_proj.weight and text_proj.weight are missing")
    if not matrices:
        expected.notes.append("this file has no projections (vision_proj, text_proj): only its encoder can be used")
        return
    assert expected.config is not None
    words = text.get("embeddings.word_embeddings.weight")
    text_width = next((t.shape[1] for t in (report, words) if t is not None and t.dim() == 2), 0)
    dim = matrices[0].shape[0]
    scale = tensors.get("logit_scale")
    scale_shape = (1,) if scale is not None and scale.shape == (1,) else ()
    expected.pieces += alignment_pieces(expected.config.d_model, text_width, dim, scale_shape)
    width = expected.config.d_model
    expected.modules += [
        ("vision_proj.", lambda: nn.Linear(width, dim)),
        ("text_proj.", lambda: nn.Linear(text_width, dim)),
        ("", _Scale),
    ]


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from emrrg_cli.models.alignment import FIRST_LOGIT_SCALE

        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))


def _expect_text(text: Mapping[str, Tensor], expected: Expected) -> None:
    if not text:
        expected.notes.append("this file has no text tower (text_encoder): `emrrg align` needs one by name")
        return
    for name, tensor in text.items():
        if name.endswith("position_ids"):  # a buffer that older versions of transformers saved
            expected.left_out[TEXT + name] = "the numbers 0, 1, 2, ..."
        else:
            shape = tuple(tensor.shape)
            expected.pieces.append(Piece({TEXT + name: shape}, (TEXT + name,), "same", shape=shape))
    config = bert_config(text)
    if config is None:
        expected.notes.append("the text tower is not a BERT: its tensors are kept unchanged, without a configuration")
        return
    if config.hidden_size % HEAD_WIDTH:
        expected.notes.append(
            f"the width of the text tower, {config.hidden_size}, is not a multiple of 64: one head is assumed"
        )
    shapes = bert_shapes(config, pooler=any(name.startswith("pooler.") for name in text))
    for name, shape in shapes.items():
        if name not in text:
            expected.problems[TEXT + name] = f"{TEXT}{name} is missing"
        elif text[name].shape != shape:
            expected.problems[TEXT + name] = f"{TEXT}{name} is {list(text[name].shape)}, expected {list(shape)}"
    for name in text:
        if name not in shapes and TEXT + name not in expected.left_out:
            expected.problems[TEXT + name] = f"{TEXT}{name} is unknown"


def _expect_bridge(tensors: Mapping[str, Tensor], expected: Expected) -> None:
    weight = tensors.get("llama_proj.weight")
    if weight is None or weight.dim() != 2:
        raise RunError("the bridge is incomplete: llama_proj.weight, which gives its sizes, is missing")
    hidden, width = weight.shape
    if expected.config is not None:
        width = expected.config.d_model
    expected.pieces += bridge_pieces(width, hidden)
    expected.modules.append(("bridge.", lambda: Bridge(width, hidden)))
    adapters = [name for name in tensors if _ADAPTER.fullmatch(name)]
    for name in adapters:
        shape = list(tensors[name].shape)
        if name.endswith("up.weight") and (len(shape) != 2 or shape[0] != width // 2):
            expected.problems[name] = f"{name} is {shape}, expected [{width // 2}, r]"
        else:
            expected.left_out[name] = "an adapter of the released code"
    if adapters:
        idle = not any(tensors[name].any() for name in adapters if name.endswith("up.weight"))
        expected.notes.append(
            _ADAPTERS_LEFT_OUT + (". Here every adapter_up is zero, so they have no effect" if idle else "")
        )
