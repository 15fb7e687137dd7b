"""Converts a published checkpoint to our tensors and records how each tensor was used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from emrrg_cli.console import counted
from emrrg_cli.errors import RunError
from emrrg_cli.models.encoder_files import EncoderConfig
from emrrg_cli.models.published.checkpoint import Checkpoint, read_checkpoint
from emrrg_cli.models.published.layout import to_ours, to_published
from emrrg_cli.models.published.stages import LABELS, TEXT, Expected, Stage, expect, stage_of

# The prefix that DataParallel adds to every name.
PARALLEL = "module."
_SHOWN = 5  # problems in one message


@dataclass
class Imported:
    """A published checkpoint in our layout. Published names are those of the file.

    Args:
        file: The file.
        stage: The stage that wrote it.
        checkpoint: The content of the file.
        config: Sizes of the encoder; None if the file has no encoder (stage 3 with a frozen backbone).
        ours: Tensors by our names (`emrrg_cli.models.published.layout`), in the dtypes of the file.
        used: Published tensors that are used, with the names that they have in our layout.
        left_out: Published tensors that our layout does not have, with the reason.
        made: Published tensors that are missing in the file, as allowed; ours have initial values.
        notes: Messages for the user.
    """

    file: Path
    stage: Stage
    checkpoint: Checkpoint
    config: EncoderConfig | None
    ours: dict[str, Tensor]
    used: dict[str, tuple[str, ...]]
    left_out: dict[str, str]
    made: list[str]
    notes: list[str] = field(default_factory=list)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Returns our tensors whose names start with `prefix`; the prefix is removed."""
        return {name.removeprefix(prefix): t for name, t in self.ours.items() if name.startswith(prefix)}

    def lines(self, *, verbose: bool = False) -> list[str]:
        """Returns the record as text: stage, sizes, counts and notes; with `verbose` also one line per tensor."""
        what = LABELS[self.stage]
        if (config := self.config) is not None:
            what += f", width {config.d_model}, depth {config.depth}, state {config.d_state}, {config.image_size} px"
        counts = (
            f"{counted(len(self.used), 'tensor')} used, {len(self.left_out)} left out, {len(self.made)} initialised"
        )
        lines = [f"{self.file}: {what}: {counts}{'' if verbose else ' (--verbose names them)'}"]
        beside = [*(f"{name} {value}" for name, value in self.checkpoint.kept.items())]
        beside += [f"{name} (dropped)" for name in self.checkpoint.dropped]
        lines += [f"other content of the file: {', '.join(beside)}"] if beside else []
        lines += self.notes
        if verbose:
            lines += [f"  used      {name} -> {', '.join(ours)}" for name, ours in self.used.items()]
            lines += [f"  left out  {name}: {reason}" for name, reason in self.left_out.items()]
            lines += [f"  new       {name}: initial values" for name in self.made]
        return lines


def import_checkpoint(file: Path, allow: Sequence[str] = ()) -> Imported:
    """Reads a published checkpoint of any stage.

    Args:
        file: `.pth` or safetensors.
        allow: Names of published tensors, with wildcards as in a shell, that may be unknown (they are left out),
            missing (they get initial values), or of a wrong shape (both).

    Raises:
        UsageError: The path is not a file.
        RunError: The file cannot be read, is a checkpoint of another network, or has tensors that are unknown, missing
            or of a wrong shape and not in `allow`. The message names them.
    """
    checkpoint = read_checkpoint(file)
    parallel = PARALLEL if checkpoint.tensors and all(n.startswith(PARALLEL) for n in checkpoint.tensors) else ""
    tensors = {name.removeprefix(parallel): tensor for name, tensor in checkpoint.tensors.items()}
    try:
        stage = stage_of(tensors)
        expected = expect(stage, tensors)
    except RunError as error:
        raise RunError(f"{file}: {error.message}", hint=error.hint) from error
    problems = _problems(expected, tensors)
    patterns = [pattern.removeprefix(parallel) for pattern in allow]
    allowed = [name for name in problems if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if refused := [text for name, text in problems.items() if name not in allowed]:
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise RunError(
            f"{file}: this is not a complete checkpoint of {LABELS[stage]}: {'; '.join(refused[:_SHOWN])}{more}",
            hint="--allow NAME (or wildcards) leaves out an unknown tensor and gives a missing one initial values.",
        )
    left_out = expected.left_out | {name: f"{problems[name]} (allowed)" for name in allowed if name in tensors}
    usable = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    # Missing tensors of a text tower get no initial values: only the existing tensors are used.
    pieces = [p for p in expected.pieces if not p.ours[0].startswith(TEXT) or set(p.published) <= usable.keys()]
    made = {name: tensor for name, tensor in _made(expected, usable).items() if name not in usable}
    ours = to_ours(pieces, usable | made)
    notes = ["every name begins with `module.` (DataParallel); this prefix is removed"] if parallel else []
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in problems)]
    notes += [f"--allow {pattern}: no tensor of this name is unknown, missing or of a wrong shape" for pattern in idle]
    return Imported(
        file,
        stage,
        checkpoint,
        expected.config,
        ours,
        {parallel + name: piece.ours for piece in pieces for name in piece.published if name not in made},
        {parallel + name: reason for name, reason in left_out.items()},
        [parallel + name for name in made],
        notes + expected.notes,
    )


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _problems(expected: Expected, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Returns the tensors that are missing, unknown or of a wrong shape, each with a sentence that names it."""
    problems = dict(expected.problems)
    known = set(expected.left_out)
    for piece in expected.pieces:
        for name, shape in piece.published.items():
            known.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                problems.setdefault(name, f"{name} is missing")
            elif tuple(tensor.shape) != shape:
                problems.setdefault(name, f"{name} is {list(tensor.shape)}, expected {list(shape)}")
            elif tensor.dtype not in _DTYPES:
                kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
                problems.setdefault(name, f"{name} holds {tensor.dtype}, not one of {kinds}")
            elif tensor.is_meta:
                problems.setdefault(name, f"{name} holds no data")
    for name in tensors:
        if name not in known:
            problems.setdefault(name, f"{name} is unknown")
    return problems


def _made(expected: Expected, usable: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns initial values for the incomplete pieces, by their published names, in the dtype of the file."""
    lacking = [p for p in expected.pieces if not p.ours[0].startswith(TEXT) and not set(p.published) <= usable.keys()]
    if not lacking:
        return {}
    fresh: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for prefix, make in expected.modules:
            fresh |= {prefix + name: tensor for name, tensor in make().state_dict().items()}
    dtype = next(iter(usable.values())).dtype
    return {name: tensor.to(dtype) for name, tensor in to_published(lacking, fresh).items()}
