"""Stage 3, `finetune`: report generation from X-rays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from emrrg_cli.console import err
from emrrg_cli.datasets.balance import BalancedStudies
from emrrg_cli.datasets.context import context_sentence
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.epochs import epoch_length
from emrrg_cli.datasets.finding_targets import finding_targets
from emrrg_cli.datasets.report_dataset import IGNORE, Batch, Example, ReportDataset, collate
from emrrg_cli.decoding.reports import write_split
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.evaluation.findings import finding_scores
from emrrg_cli.evaluation.language import require_java, score
from emrrg_cli.evaluation.protocol import reference_reports
from emrrg_cli.files.atomic import atomic_directory
from emrrg_cli.files.write_errors import writing
from emrrg_cli.labeling import positive_labels
from emrrg_cli.models.build import (
    assemble,
    build_encoder,
    fresh_llm,
    load_run_llm,
    save_static,
    save_trained,
)
from emrrg_cli.models.build_alignment import FINDINGS_FILE
from emrrg_cli.models.findings_head import FindingsHead
from emrrg_cli.models.llm import load_tokenizer, train_tokenizer
from emrrg_cli.models.report_generator import ReportGenerator, encode_report
from emrrg_cli.models.transfer import fill_encoder
from emrrg_cli.models.weights import load_weights
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.runtime import llm_dtype
from emrrg_cli.scoring.reward import Reward
from emrrg_cli.silence_libraries import silence_libraries
from emrrg_cli.training.checkpoint import trained_bytes
from emrrg_cli.training.measure_films import measure_film_distance
from emrrg_cli.training.progress import TrainingDisplay
from emrrg_cli.training.run_setup import Session, check_studies, open_session, validation_loss
from emrrg_cli.training.schedule import self_critical_note
from emrrg_cli.training.selection import MIN_BLEU_4
from emrrg_cli.training.self_critical import Sampler
from emrrg_cli.training.summary import Summary
from emrrg_cli.vocabulary import F1_RULES, METEOR


@dataclass
class FinetuneStage:
    """The report generator with its objective, validation and export (`emrrg_cli.training.stage.Stage`)."""

    model: ReportGenerator
    recipe: FinetuneRecipe
    validation: ReportDataset | None
    run_dir: Path
    accelerator: Any
    score_explained: bool = False
    sampler: Sampler | None = None

    def items(self, batch: Batch) -> int:
        """Returns the number of report tokens in a batch."""
        assert batch.labels is not None
        return int((batch.labels != IGNORE).sum())

    def prepare_step(self, batches: list[Batch], epoch: int) -> list[Batch]:
        """Replaces the references by sampled reports, once self-critical training has begun."""
        settings = self.recipe.train.self_critical
        if settings is None or epoch < settings.after_epochs:
            return batches
        assert self.sampler is not None
        return self.sampler.sampled_batches(batches)

    @property
    def collate(self) -> Callable[[Sequence[Example]], Batch]:
        """The function that joins examples into a batch. Loading processes get the tokenizer, but not the model."""
        data = self.recipe.data
        encode = partial(
            encode_report,
            self.model.tokenizer,
            max_tokens=data.max_report_tokens,
            end_at_limit=data.end_at_limit,
            end_text=self.recipe.model.llm.end_text,
        )
        return partial(collate, encode=encode, findings=self.recipe.model.findings)

    def validate(self, display: TrainingDisplay) -> dict[str, float]:
        """Returns the validation loss and, unless `train.select` is `loss`, the scores of generated reports."""
        if self.validation is None:
            return {}
        figures = {"validation/loss": self._validation_loss(display)}
        settings = self.recipe.train
        if settings.select == "loss":
            return figures
        limit = settings.validation_limit
        count = len(self.validation) if limit is None else min(limit, len(self.validation))
        with display.phase("validation: writing reports", count) as advance:
            hypotheses = write_split(
                self.model,
                self.validation,
                self.recipe.generation,
                self.accelerator,
                indices=range(count),
                workers=self.recipe.data.workers,
                advance=advance,
            )
        self._comment(hypotheses, display)
        references = reference_reports(self.model, self.validation.reports[:count], self.recipe)
        weights = settings.score_weights
        scores = score(references, hypotheses, tokenizer=self.recipe.evaluation.tokenizer, meteor=METEOR in weights)
        if F1_RULES in weights:
            scores[F1_RULES] = finding_scores(positive_labels(references), positive_labels(hypotheses))["micro"]["f1"]
        figures |= {f"validation/{name}": value for name, value in scores.items() if value is not None}
        figures["validation/score"] = sum(weight * (scores[name] or 0.0) for name, weight in weights.items())
        return figures

    def _comment(self, reports: Sequence[str], display: TrainingDisplay) -> None:
        """Explains the score once, and warns whenever nearly all reports are the same text."""
        if not self.score_explained:
            self.score_explained = True
            parts = " + ".join(f"{weight:g} {name}" for name, weight in self.recipe.train.score_weights.items())
            display.message(f"score = {parts}; the loss chooses the best model until BLEU_4 is above {MIN_BLEU_4}")
        same = Counter(reports).most_common(1)[0][1] if reports else 0
        if len(reports) >= 8 and same >= 0.9 * len(reports):
            display.message(
                f"warning: {same} of {len(reports)} validation reports are the same text, so they do not depend on the "
                "image. Train longer, or look at the loss: it should fall."
            )

    def _validation_loss(self, display: TrainingDisplay) -> float:
        assert self.validation is not None
        return validation_loss(
            self.model,
            self.validation,
            self.collate,
            self.recipe.train,
            self.accelerator,
            display,
            workers=self.recipe.data.workers,
        )

    def export(self) -> None:
        """Replaces `model/` of the run directory."""
        with writing(self.run_dir / "model", trained_bytes(self.model)):
            save_trained(self.run_dir, self.recipe.model, self.model)


def run_finetune(
    recipe: FinetuneRecipe, run_dir: Path, *, resume: bool, expected_processes: int, verbose: bool = False
) -> Summary:
    """Trains the report generator of a recipe and writes a run directory.

    Args:
        verbose: Print how each tensor of the encoder weights is used.

    Raises:
        UsageError: The recipe does not fit the data, the LLM or the computer.
        RunError: A part of the model or of the data cannot be loaded, Java is missing for the scores of the
            validation, or training fails.
        Interrupted: A stop signal arrived. The checkpoint is written.
    """
    if recipe.data.root is None:
        raise UsageError(
            "data.root is not set", hint="Set data.root=DIR to a dataset directory, as `emrrg preprocess` writes."
        )
    llm = recipe.model.llm
    # The recipe itself allows these dtypes, so that older runs can still be resumed, evaluated and used.
    if not resume and not llm.is_frozen and llm.dtype in ("bf16", "fp16"):
        raise UsageError(
            f"model.llm.dtype={llm.dtype} is only for a frozen LLM; a trained LLM has fp32 weights",
            hint="Set it to auto. train.precision sets the precision in which a trained LLM computes.",
        )
    silence_libraries()
    splits = open_dataset(recipe.data.root)
    if "train" not in splits:
        raise RunError(f"{recipe.data.root}: this dataset directory has no split named train")
    if "validation" in splits and recipe.train.select == "score":
        # A missing METEOR would count as 0, so the other scores or the loss would choose the model.
        require_java(recipe.evaluation.tokenizer, meteor=bool(recipe.train.score_weights.get(METEOR)))
    size = recipe.model.encoder.image_size
    training = ReportDataset(splits["train"], recipe.data, size, recipe.train.seed)
    validation = ReportDataset(splits["validation"], recipe.data, size) if "validation" in splits else None
    for dataset in (training, validation):
        if dataset is not None:
            check_studies(dataset)
    if recipe.model.view_tokens and not resume and not training.knows_views:
        raise UsageError(
            f"model.view_tokens: {recipe.data.root} does not say whether its films are frontal or lateral",
            hint="Write the directory again with views (for R2Gen's IU X-Ray: `emrrg preprocess iu_xray --reports`).",
        )

    with open_session(
        recipe, recipe.train, recipe.model.scan, run_dir, resume=resume, expected_processes=expected_processes
    ) as session:
        summary = _train(recipe, training, validation, session, verbose)
        if session.accelerator.is_main_process:
            measure_film_distance(recipe, run_dir, training, validation, session.accelerator.device)
        return summary


def _train(
    recipe: FinetuneRecipe,
    training: ReportDataset,
    validation: ReportDataset | None,
    session: Session,
    verbose: bool,
) -> Summary:
    run_dir, accelerator, resume = session.run_dir, session.accelerator, session.resume
    session.check_batch(training)
    settings = recipe.train.self_critical
    if settings is not None and settings.contrast and recipe.train.batch_size < 2 * accelerator.num_processes:
        raise UsageError(
            "train.self_critical.contrast compares studies of a step, but each process has only one",
            hint=f"Use train.batch_size={2 * accelerator.num_processes} or more, or train.self_critical.contrast=0.",
        )
    tokenizer = _tokenizer(recipe, training, run_dir, accelerator)
    encoder = build_encoder(recipe.model.encoder, session.scan)
    frozen, head = run_dir / "encoder.safetensors", None
    if resume and frozen.is_file():
        load_weights(encoder, frozen)
    elif recipe.model.encoder.weights is not None and not (session.begun and recipe.model.adapter.targets == "full"):
        transfer = fill_encoder(encoder, recipe.model.encoder.weights)
        if recipe.model.findings and (transfer.source.parent / FINDINGS_FILE).is_file():
            head = transfer.source.parent / FINDINGS_FILE
            transfer.notes.append("the findings head starts from the head of stage 2")
        if accelerator.is_main_process:
            transfer.show(verbose=verbose)
    dtype = llm_dtype(recipe.model.llm.dtype, session.precision)
    if resume and (run_dir / "llm.json").is_file():
        llm = load_run_llm(run_dir, recipe.model, dtype)  # the LLM that the run was started with
    else:
        llm = fresh_llm(recipe.model, tokenizer, dtype)
    if accelerator.is_main_process:
        with writing(run_dir):
            save_static(run_dir, recipe.model, encoder, llm, tokenizer)
    model = assemble(recipe.model, encoder, llm, tokenizer)
    if head is not None:
        assert model.findings is not None
        _require_same_findings(model.findings, head)
        load_weights(model.findings, head)
    _set_objective(model, recipe, training.reports)
    model.set_gradient_checkpointing(recipe.train.gradient_checkpointing)
    stage = FinetuneStage(model, recipe, validation, run_dir, accelerator)
    if settings is not None:
        stage.sampler = Sampler(model, settings, Reward(training.reports, settings.rewards), accelerator)
    balance = recipe.data.balance
    shown = training if balance == 1 else BalancedStudies(training, balance)
    note = self_critical_note(epoch_length(shown) // recipe.train.batch_size, recipe.train)
    if note is not None and accelerator.is_main_process:
        err.print(note, markup=False, soft_wrap=True)
    return session.train(stage, shown, stage.collate, workers=recipe.data.workers)


def _require_same_findings(head: FindingsHead, file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        before = tensors.get_slice("evidence.bias").get_shape()[0]
    if before != len(head.balance):
        raise UsageError(
            f"the findings head of stage 2 has {before} findings, and model.findings_set has {len(head.balance)}",
            hint="Set model.findings_set as in stage 2: chexpert has 14, extended 23.",
        )


def _set_objective(model: ReportGenerator, recipe: FinetuneRecipe, reports: Sequence[str]) -> None:
    """Sets the options that the model uses only in training."""
    model.label_smoothing = recipe.train.label_smoothing
    model.augment = recipe.data.augment
    if model.findings is not None:
        model.findings.weight = recipe.train.findings_weight
        model.findings.set_balance(finding_targets(reports), recipe.train.findings_balance)
        limit = recipe.data.max_report_tokens
        model.report_tokens = sum(len(model.encode_report(report, limit)) for report in reports) / len(reports)


def _tokenizer(recipe: FinetuneRecipe, training: ReportDataset, run_dir: Path, accelerator: Any) -> Any:
    if recipe.model.llm.name != "scratch":
        return load_tokenizer(recipe.model.llm.name, recipe.model.llm.revision)
    target = run_dir / "tokenizer"
    if accelerator.is_main_process and not target.exists():
        with atomic_directory(target) as temporary:
            texts = [*training.reports, *filter(None, map(context_sentence, training.contexts))]
            tokenizer = train_tokenizer(texts, recipe.model.llm.scratch.vocab_size, recipe.model.prompt)
            tokenizer.save_pretrained(temporary)
    accelerator.wait_for_everyone()
    return load_tokenizer(str(target))
