"""Transfers an encoder from one stage to the next and lists how each tensor was used.

An encoder of stage 1 has one scan direction and no class token; those of stages 2 and 3 have four directions and a
class token in the middle. Image sizes may differ between stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from emrrg_cli.console import counted
from emrrg_cli.errors import RunError, UsageError, require_path
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.encoder_files import EncoderConfig, EncoderSource, encoder_source

# Tensors of a mixer with a leading axis over the directions.
_PER_DIRECTION = ("conv_weight", "conv_bias", "A_log", "D")


@dataclass
class TransferReport:
    """How each tensor of a source was used, and where the rest of the encoder comes from.

    Args:
        source: The file.
        used: Tensors of the source that are in the encoder, with the change made to them ("" for a plain copy).
        dropped: Tensors of the source that are not used, with the reason.
        made: Tensors of the encoder that the source does not have, with their initial values.
        notes: Messages that are always shown.
    """

    source: Path
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self, *, verbose: bool = False) -> list[str]:
        """Returns the report as text: one line of counts and the notes; with `verbose` also one line per tensor."""
        counts = f"{counted(len(self.used), 'tensor')} used, {len(self.dropped)} dropped, {len(self.made)} initialised"
        lines = [f"encoder from {self.source}: {counts}{'' if verbose else ' (--verbose names them)'}", *self.notes]
        if verbose:
            for label, tensors in (("used", self.used), ("dropped", self.dropped), ("new", self.made)):
                lines += [f"  {label:7}  {name}{f'  {how}' if how else ''}" for name, how in tensors.items()]
        return lines

    def show(self, *, verbose: bool = False) -> None:
        """Prints the report on stderr."""
        from emrrg_cli.console import err

        for line in self.lines(verbose=verbose):
            err.print(line, markup=False, soft_wrap=True)


def fill_encoder(encoder: ArmEncoder, source: EncoderSource | Path | str) -> TransferReport:
    """Fills an encoder with the weights of an earlier stage.

    One direction is copied to four. The position embedding is interpolated bicubically to another grid; the row of
    the class token is kept, or is zero if the source has none. Tensors that the source does not have (class token and
    final norm after stage 1) keep their initial values.

    Args:
        encoder: An encoder of any stage; changed in place.
        source: The result of `encoder_source`, or a path for it.

    Returns:
        The report. Every tensor of the source is used or dropped; all other tensors of the encoder are made.

    Raises:
        UsageError: The path has no encoder, or its encoder has another width, depth or state size.
        RunError: A file cannot be read, or a tensor is missing, unknown or has a wrong shape. The message names it.

    Source: MambaXray-VL (arXiv 2410.00379) section 3; the published stage 2 code's loading of stage 1.
    """
    if not isinstance(source, EncoderSource):
        source = encoder_source(source)
    own = encoder.state_dict()
    config = EncoderConfig.of(own)
    _check_sizes(source, config)
    report = TransferReport(source.file, dropped=dict(source.others), notes=list(source.notes))
    filled: dict[str, Tensor] = {}
    problems = []
    for name, tensor in source.tensors.items():
        targets, how = _fitted(name, tensor, source.config, config)
        stored = source.names[name]
        if not targets:
            report.dropped[stored] = how
            continue
        report.used[stored] = how
        for target, value in targets.items():
            if target not in own:
                problems.append(f"{stored} is unknown")
            elif value.shape != own[target].shape:
                problems.append(f"{stored} is {list(tensor.shape)}, expected {_expected(tensor, value, own[target])}")
            filled[target] = value
    for name in own:
        if name in filled:
            continue
        if name == "pos_embed" and not config.class_token:
            report.made[name] = "sines and cosines for the image size"
        elif name.startswith(("cls_token", "norm_f.")) and source.config.directions == 1:
            report.made[name] = "as initialised"
        else:
            problems.append(f"{name} is missing")
    if problems:
        problems = list(dict.fromkeys(problems))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RunError(f"{source.file}: this encoder does not fit: {problems[0]}{more}")
    encoder.load_state_dict(own | filled)
    return report


def _expected(tensor: Tensor, value: Tensor, own: Tensor) -> list[int]:
    # The shape that the tensor of the source should have; 1 for a direction axis that is expanded.
    stretched = value.dim() == own.dim() and tensor.shape[:1] == (1,) and value.shape[0] == own.shape[0] != 1
    return [1, *own.shape[1:]] if stretched else list(own.shape)


def _check_sizes(source: EncoderSource, config: EncoderConfig) -> None:
    found = source.config
    labels = {"width": "d_model", "depth": "depth", "state size": "d_state"}
    values = {label: (getattr(found, name), getattr(config, name)) for label, name in labels.items()}
    if different := {label: pair for label, pair in values.items() if pair[0] != pair[1]}:
        listed = "; ".join(f"{label} {theirs}, the model has {ours}" for label, (theirs, ours) in different.items())
        hint = (
            f"Set its sizes: model.encoder.size=null model.encoder.d_model={found.d_model} "
            f"model.encoder.depth={found.depth} model.encoder.d_state={found.d_state}"
        )
        raise UsageError(f"{source.file}: this encoder is of another size: {listed}", hint=hint)
    if found.directions not in (1, config.directions):
        raise UsageError(
            f"{source.file}: this encoder has {found.directions} scan directions, the model has {config.directions}",
            hint="Stage 1 has one direction and comes first: it cannot start from a later stage.",
        )


def _fitted(name: str, tensor: Tensor, source: EncoderConfig, own: EncoderConfig) -> tuple[dict[str, Tensor], str]:
    """Returns the encoder's tensors for a tensor of the source, and the change; if it is dropped, {} and the reason."""
    if name == "pos_embed":
        if not own.class_token:
            same = source.grid == own.grid
            return ({name: tensor}, "") if same else ({}, "fixed by the image size")
        return {name: fit_positions(tensor, own.grid, class_token=source.class_token)}, _position_steps(source, own)
    _, mixer, rest = name.partition(".mixer.")
    if source.directions == own.directions or not mixer:
        return {name: tensor}, ""
    count = own.directions
    how = f"1 direction to {count}"
    if rest in _PER_DIRECTION:
        return {name: tensor.expand(count, *tensor.shape[1:])}, how
    if rest.startswith("directions.0."):
        return {name.replace(".directions.0.", f".directions.{k}."): tensor for k in range(count)}, how
    return {name: tensor}, ""


def _position_steps(source: EncoderConfig, own: EncoderConfig) -> str:
    steps = []
    if source.grid != own.grid:
        steps.append(f"{source.grid} x {source.grid} to {own.grid} x {own.grid}, bicubic")
    if not source.class_token:
        steps.append("a zero row for the class token")
    return "; ".join(steps)


def fit_positions(pos_embed: Tensor, grid: int, *, class_token: bool) -> Tensor:
    """Resizes a position embedding to another grid, with a row for the class token in the middle.

    Args:
        pos_embed: `[1, l, d]`, or `[1, l + 1, d]` with the class token's row at `l // 2`; `l` is a square number.
        grid: Number of patches per side of the new grid.
        class_token: Whether `pos_embed` has the row of the class token; if not, the new row is zero.

    Returns:
        `[1, grid**2 + 1, d]`: the patches interpolated bicubically (pixel centres aligned, no antialiasing), or
        unchanged if the grid is the same.

    Source: MambaXray-VL (arXiv 2410.00379), stage 2 from stage 1.
    """
    patches = pos_embed.shape[1] - class_token
    middle = patches // 2
    row = torch.zeros_like(pos_embed[:, :1])
    if class_token:
        row = pos_embed[:, middle : middle + 1]
        pos_embed = torch.cat([pos_embed[:, :middle], pos_embed[:, middle + 1 :]], dim=1)
    old = math.isqrt(patches)
    if old != grid:
        image = pos_embed.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, d, old, old]
        image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
        pos_embed = image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    middle = grid * grid // 2
    return torch.cat([pos_embed[:, :middle], row.to(pos_embed.dtype), pos_embed[:, middle:]], dim=1)


def load_encoder(path: Path | str, scan: str = "auto") -> ArmEncoder:
    """Loads the four-direction encoder of a path in evaluation mode: `[b, 3, h, w] -> [b, l + 1, d]`.

    Images are normalised by ImageNet's mean and standard deviation; `h = w` is the image size of the source. The class
    token is token `l // 2`. A stage 1 source gives the encoder that stage 2 starts from at that image size: its
    direction is copied four times, the final norm is new, and the class token is random with a fixed seed.

    Args:
        path: As in `encoder_source`.
        scan: Engine of the scan (`emrrg_cli.models.scan`).

    Raises:
        UsageError: The path has no encoder.
        RunError: A file cannot be read, or a tensor is missing, unknown or has a wrong shape. The message names it.
    """
    source = encoder_source(require_path(path, "the source of the encoder"))
    config = source.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ArmEncoder(config.d_model, config.depth, config.image_size, config.d_state, scan=scan)
    report = fill_encoder(encoder, source)
    if report.notes:
        report.show()
    return encoder.eval()
