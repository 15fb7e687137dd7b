"""Reference reports for scoring, and one line that lists the settings that affect the scores."""

from __future__ import annotations

from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.finetuning import FinetuneRecipe


def reference_reports(model: ReportGenerator, reports: list[str], recipe: FinetuneRecipe) -> list[str]:
    """Returns the references: whole reports, or reports cut to the training length as in the released code.

    Words are joined by single spaces, as in generated reports, because ROUGE-L splits at each space.
    """
    if recipe.evaluation.references == "whole":
        return [" ".join(report.split()) for report in reports]
    limit = recipe.data.max_report_tokens
    return [model.decode(model.encode_report(report)[:limit]) for report in reports]


def describe_protocol(recipe: FinetuneRecipe) -> str:
    """Returns one line that lists the settings that affect the scores; it is printed with every score."""
    generation = recipe.generation
    decoding = f"beams {generation.num_beams}, new tokens {generation.min_new_tokens}-{generation.max_new_tokens}"
    if generation.do_sample:
        decoding += f", sampled (temperature {generation.temperature}, top-p {generation.top_p})"
    if generation.consensus is not None:
        by = " and ".join(generation.consensus_scores)
        decoding += f", consensus of {generation.consensus} samples by {by}"
    targets = recipe.model.adapter.targets
    backbone = {"full": "trained whole", "none": "frozen"}.get(targets) if isinstance(targets, str) else None
    context = f", context {', '.join(recipe.data.context)}" if recipe.data.context else ""
    return (
        f"protocol {recipe.protocol}: section {recipe.data.section}, cleaning {recipe.data.cleaning}, "
        f"references {recipe.evaluation.references}, tokenizer {recipe.evaluation.tokenizer}{context}, "
        f"backbone {backbone or 'frozen with LoRA on ' + ', '.join(targets)}; {decoding}, "
        f"repetition penalty {generation.repetition_penalty}, length penalty {generation.length_penalty}"
    )
