"""transformers' `generate`, the engine to which ours is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from emrrg_cli.decoding.search import Report
from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.decoding.teacher_forcing import token_log_probabilities
from emrrg_cli.errors import RunError
from emrrg_cli.models.adapters import plain
from emrrg_cli.recipe.finetuning import GenerationSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig

_HOOKS = ("_get_running_beams_for_next_iteration", "_check_early_stop_heuristic")


def generate_reports(
    llm: Any, prompts: Prompts, settings: GenerationSettings, end: list[int], pad: int
) -> list[Report]:
    """Writes a report for each prompt; the log-probability after the decoding options is unknown (0).

    Args:
        end: tokens that end a report.
        pad: token that fills positions after the end.
    """
    config = generation_config(settings)()
    config.pad_token_id, config.eos_token_id = pad, end
    visual: dict[str, Tensor | None] = {}
    if prompts.visual_tokens is not None:
        visual = {"visual_tokens": prompts.visual_tokens, "visual_mask": prompts.visual_mask}
    with beam_stop(plain(llm), settings):
        rows = llm.generate(
            inputs_embeds=prompts.embeddings, attention_mask=prompts.mask, generation_config=config, **visual
        )
    reports = [_until_end(row, end) for row in rows.tolist()]
    given = token_log_probabilities(llm, prompts, reports, pad)
    return [Report(tokens, 0.0, each) for tokens, each in zip(reports, given, strict=True)]


def _until_end(tokens: list[int], end: list[int]) -> list[int]:
    last = next((place for place, token in enumerate(tokens) if token in end), len(tokens))
    return tokens[: last + 1]


@contextmanager
def beam_stop(llm: Any, settings: GenerationSettings) -> Iterator[None]:
    """Makes the beam search of transformers stop by `generation.beam_stop` inside the block.

    transformers 5 compares finished reports with the running beams; 4.44 compared them with the best candidate of the
    step, even if that candidate has just ended.

    Raises:
        RunError: if the installed transformers does not allow this change of its beam search.
    """
    if settings.num_beams == 1 or settings.beam_stop == "running":
        yield
        return
    if missing := [name for name in _HOOKS if not hasattr(llm, name)]:
        raise RunError(
            f"the installed transformers has no {missing[0]}, so its beam search cannot stop as in 4.44",
            hint="Set generation.engine=own, or generation.beam_stop=running.",
        )
    choose, check = (getattr(llm, name) for name in _HOOKS)
    best: list[Tensor] = []

    def choosing(*args: Any, **kwargs: Any) -> Any:
        best[:] = [kwargs["topk_log_probs"][:, :1]]
        return choose(*args, **kwargs)

    def checking(*args: Any, **kwargs: Any) -> Any:
        return check(*args, **(kwargs | {"running_beam_scores": best[0]}))

    try:
        for name, hook in zip(_HOOKS, (choosing, checking), strict=True):
            setattr(llm, name, hook)
        yield
    finally:
        for name in _HOOKS:
            llm.__dict__.pop(name, None)


def generation_config(settings: Any) -> Callable[[], GenerationConfig]:
    """Returns a factory of `transformers.GenerationConfig` with the decoding options of a recipe."""
    from transformers import GenerationConfig

    options: dict[str, Any] = {
        "num_beams": settings.num_beams,
        "min_new_tokens": settings.min_new_tokens or None,
        "max_new_tokens": settings.max_new_tokens,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "do_sample": settings.do_sample,
    }
    if settings.num_beams > 1:
        options["length_penalty"] = settings.length_penalty
    if settings.do_sample:
        options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return lambda: GenerationConfig(**options)
