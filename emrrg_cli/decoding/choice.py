"""Chooses the engine that decodes an LLM: ours if a trial shows equal results, else transformers' `generate`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.decoding.search import BeamSearch, State
from emrrg_cli.decoding.slots import Prompts, Slots
from emrrg_cli.errors import UsageError
from emrrg_cli.models.adapters import plain
from emrrg_cli.recipe.finetuning import GenerationSettings

_tried: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def choose_engine(llm: Any, settings: GenerationSettings, longest: int) -> str:
    """Returns `own` or `transformers`.

    Args:
        longest: number of tokens of the longest prompt and report together.

    Raises:
        UsageError: if our own engine is requested but does not support the LLM.
    """
    if settings.engine == "transformers":
        return "transformers"
    reason = _short_window(llm, longest) or _trial(llm)
    if reason is None:
        return "own"
    if settings.engine == "own":
        raise UsageError(
            f"generation.engine=own does not support {type(plain(llm)).__name__}: {reason}",
            hint="Set generation.engine=transformers or auto.",
        )
    return "transformers"


def _short_window(llm: Any, longest: int) -> str | None:
    config = plain(llm).config.get_text_config(decoder=True)
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    short = [window for window in windows if isinstance(window, int) and window < longest]
    return f"it attends only to the last {short[0]} tokens" if short else None


def _trial(llm: Any) -> str | None:
    # Compares a few steps on a made-up prompt with forward passes without a cache. -> the problem, or None.
    base = plain(llm)
    if base not in _tried:
        try:
            ours, theirs = _trial_logits(llm)
        except Exception as error:  # unsupported families fail in different ways
            _tried[base] = next(iter(str(error).strip().splitlines()), type(error).__name__)
        else:
            tolerance = (2e-3 if theirs.dtype == torch.float32 else 0.25) * theirs.float().std()
            same = bool((ours.float() - theirs.float()).abs().max() <= tolerance)
            _tried[base] = None if same else "its logits with our cache differ from those without one"
    return _tried[base]


class _Recorder(BeamSearch):
    """Records the beams and the logits of every step."""

    steps: list[tuple[Tensor, Tensor]]

    def advance(self, state: State, logits: Tensor) -> None:
        tokens, length = state["tokens"].clone(), state["length"].clone()
        self.steps.append((tokens[:, :, : int(length[0])], logits))
        super().advance(state, logits)


@torch.no_grad()
def _trial_logits(llm: Any) -> tuple[Tensor, Tensor]:
    embedding = plain(llm).get_input_embeddings()
    device = embedding.weight.device
    search = _Recorder(GenerationSettings(num_beams=2, max_new_tokens=4), [], device)
    search.steps = []
    ids = (torch.arange(14, device=device) * 7 + 3).view(2, 7) % embedding.weight.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 2:4] = 0  # a hole, as a missing view leaves one
    prompts = Prompts([0, 1], [0, 0], embedding(ids), mask)
    slots = Slots(llm, search, 2, step_buckets=2)
    slots.enter(prompts, [0, 1])
    for step in range(3):
        slots.step(2, slots.bucket(step + 1))
    ours, theirs = [], []
    for tokens, logits in search.steps[1:]:
        b, k, t = tokens.shape
        written = embedding(tokens.flatten(0, 1))  # [b * k, t, hidden]
        whole = torch.cat([prompts.embeddings.repeat_interleave(k, 0), written], dim=1)
        seen = torch.cat([mask.repeat_interleave(k, 0), mask.new_ones(b * k, t)], dim=1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        out = llm(inputs_embeds=whole, attention_mask=seen, position_ids=positions, use_cache=False, logits_to_keep=1)
        theirs.append(out.logits[:, -1])
        ours.append(logits.flatten(0, 1))
    return torch.cat(ours), torch.cat(theirs)
