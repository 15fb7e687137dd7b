"""Stage 2, `align`: contrastive learning on pairs of X-rays and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.console import err
from emrrg_cli.datasets.align_dataset import PairBatch, PairDataset, collate_pairs
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.epochs import evaluation_batches
from emrrg_cli.datasets.labelled_films import LabelledFilms
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.datasets.report_dataset import Example, ReportDataset
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.evaluation.retrieval import retrieval
from emrrg_cli.files.atomic import atomic_directory
from emrrg_cli.files.write_errors import writing
from emrrg_cli.models.alignment import MAX_LOGIT_SCALE, Alignment, CachedPairs, contrastive_losses
from emrrg_cli.models.build import build_encoder
from emrrg_cli.models.build_alignment import fresh_alignment, save_alignment
from emrrg_cli.models.text_encoder import load_text_tokenizer, train_text_tokenizer
from emrrg_cli.models.transfer import fill_encoder
from emrrg_cli.recipe.alignment import AlignDataSettings, AlignRecipe
from emrrg_cli.silence_libraries import silence_libraries
from emrrg_cli.training.checkpoint import trained_bytes
from emrrg_cli.training.launch import is_first_process
from emrrg_cli.training.progress import TrainingDisplay
from emrrg_cli.training.run_setup import Session, check_studies, open_session
from emrrg_cli.training.summary import Summary


@dataclass
class AlignStage:
    """The two towers with their objective, validation and export (`emrrg_cli.training.stage.Stage`)."""

    model: Alignment
    recipe: AlignRecipe
    validation: PairDataset | None
    run_dir: Path
    accelerator: Any
    validation_explained: bool = False  # whether the message on validation was printed

    def items(self, batch: PairBatch) -> int:
        """Returns the number of pairs in a batch."""
        return len(batch)

    @property
    def collate(self) -> Callable[[Sequence[Example]], PairBatch]:
        """The function that joins examples into a batch. Loading processes get the tokenizer, but not the model."""
        return partial(
            collate_pairs,
            tokenizer=self.model.tokenizer,
            max_tokens=self.model.max_text_tokens,
            findings=self.recipe.model.findings,
            labelled=any(self.recipe.data.labelled()),
        )

    def prepare_step(self, batches: list[PairBatch], epoch: int) -> list[PairBatch] | list[CachedPairs]:
        """Computes the gradients of the embeddings if a step has several micro-batches."""
        if len(batches) == 1:
            return batches
        with self.accelerator.autocast():
            return self.model.cache_gradients([batch.to(self.accelerator.device) for batch in batches])

    @cached_property
    def validated(self) -> list[int]:
        """Indices of the studies to validate on, in a fixed random order that mixes data sets and patients."""
        assert self.validation is not None
        generator = torch.Generator().manual_seed(self.recipe.train.seed)
        order: list[int] = torch.randperm(len(self.validation), generator=generator).tolist()
        return order[: self.recipe.train.validation_limit]

    def validate(self, display: TrainingDisplay) -> dict[str, float]:
        """Returns the loss over validation batches of the training batch size, and strict recall over the whole split.

        The loss depends on the number of negatives, so it leaves out the last studies if they do not fill a batch.
        Reports that are all equal give no figures: their recall is 1 for any model, so the first would stay the best.
        """
        if self.validation is None:
            return {}
        settings = self.recipe.train
        reports = truncated_tokens(self.model, [self.validation.reports[i] for i in self.validated])
        if len(set(reports)) < 2:
            self._explain(display, "the validation split has only one different report, so it is not used")
            return {}
        with display.phase("validation", len(self.validated)) as advance:
            images, texts = embed_pairs(
                self.model,
                self.validation,
                self.validated,
                settings.micro_batch_size or settings.batch_size,
                self.accelerator,
                workers=self.recipe.data.workers,
                advance=advance,
            )
        scale = self.model.logit_scale.detach().clamp(max=MAX_LOGIT_SCALE)
        size = min(settings.batch_size, len(images))
        starts = range(0, len(images) - size + 1, size)
        losses = [contrastive_losses(images[i : i + size], texts[i : i + size], scale.exp()).mean() for i in starts]
        figures = {"validation/loss": float(torch.stack(losses).mean()), "validation/logit_scale": float(scale)}
        found = retrieval(images, texts, reports)
        self._explain(
            display,
            f"validation on {found.studies:,} pairs with {found.distinct:,} different reports: recall@1 (R@1) is "
            f"{found.chance[1]:.4f} by chance and {found.ceiling[1]:.4f} at most",
        )
        for way, by_k in found.recall.items():
            figures |= {f"validation/{way}_R@{k}": value for k, value in by_k.items()}
        if settings.select == "score":
            figures["validation/score"] = found.mean_recall
        return figures

    def _explain(self, display: TrainingDisplay, message: str) -> None:
        if not self.validation_explained:
            self.validation_explained = True
            display.message(message)

    def export(self) -> None:
        """Replaces `model/` of the run directory."""
        with writing(self.run_dir / "model", trained_bytes(self.model)):
            save_alignment(self.run_dir, self.model)


@torch.no_grad()
def embed_pairs(
    model: Alignment,
    dataset: PairDataset,
    order: Sequence[int],
    batch_size: int,
    accelerator: Any,
    *,
    workers: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Returns the embeddings of the images and of the reports of studies, each fp32 `[len(order), dim]`, on the device.

    The processes share the work, and each process gets all embeddings.

    Args:
        model: The model in evaluation mode.
        order: Indices into `dataset`.
        batch_size: Number of studies in a forward pass.
        workers: Number of processes that load data.
        advance: Called with the number of studies done.
    """
    ranks, device = accelerator.num_processes, accelerator.device
    places = [batch for batch in evaluation_batches(len(order), batch_size, accelerator.process_index, ranks) if batch]
    collate = partial(collate_pairs, tokenizer=model.tokenizer, max_tokens=model.max_text_tokens)
    found = torch.zeros(2, len(order), model.vision_proj.out_features, device=device)
    batches = load_batches(dataset, [[order[place] for place in batch] for batch in places], collate, workers=workers)
    for batch, place in zip(batches, places, strict=True):
        with accelerator.autocast():
            image, text = model.embed(batch.to(device))
        found[0, place], found[1, place] = image, text
        advance(len(place) * ranks)
    if ranks > 1:
        found = accelerator.reduce(found, reduction="sum")
    return found[0], found[1]


def truncated_tokens(model: Alignment, reports: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns the tokens of each report for `retrieval`: equal for reports that the text tower cannot distinguish."""
    tokens = model.tokenizer(list(reports), truncation=True, max_length=model.max_text_tokens)["input_ids"]
    return [tuple(ids) for ids in tokens]


def open_pairs(
    settings: AlignDataSettings, split: str, image_size: int, *, required: bool = True, weighted: bool = False
) -> PairDataset | None:
    """Opens a split of the data sets of a recipe.

    Args:
        required: Whether each data set must have the split. If false, data sets without it are left out; the result
            is None if no data set has it.
        weighted: For training: use the weights of the recipe, and include films that have labels but no report.

    Raises:
        UsageError: The recipe names no data, or a folder that is not a dataset directory.
        RunError: A split is missing, or none of its studies has text.
    """
    sets = settings.all_sets()
    if not sets:
        raise UsageError(
            "data.root is not set",
            hint="Set data.root=DIR to a dataset directory, as `emrrg preprocess` writes; for several, use data.sets.",
        )
    parts: list[ReportDataset | LabelledFilms] = []
    weights = []
    for (one, weight), labelled in zip(sets, settings.labelled(), strict=True):
        assert one.root is not None
        if labelled and not weighted:
            continue
        splits = open_dataset(one.root)
        if split not in splits:
            if required:
                raise RunError(f"{one.root}: this dataset directory has no split named {split}")
            continue
        parts.append((LabelledFilms if labelled else ReportDataset)(splits[split], one, image_size))
        weights.append(weight if weighted else 1.0)
        check_studies(parts[-1])
    return PairDataset(parts, weights) if parts else None


def run_align(
    recipe: AlignRecipe, run_dir: Path, *, resume: bool, expected_processes: int, verbose: bool = False
) -> Summary:
    """Trains the image tower and the text tower of a recipe and writes a run directory.

    Args:
        verbose: Print how each tensor of the encoder weights is used.

    Raises:
        UsageError: The recipe does not fit the data or the computer.
        RunError: A part of the model or of the data cannot be loaded, or training fails.
        Interrupted: A stop signal arrived. The checkpoint is written.
    """
    silence_libraries()
    size = recipe.model.encoder.image_size
    training = open_pairs(recipe.data, "train", size, weighted=True)
    validation = open_pairs(recipe.data, "validation", size, required=False)
    assert training is not None
    if len(training.parts) > 1 and is_first_process():
        for (one, weight), part, count in zip(recipe.data.all_sets(), training.parts, training.counts, strict=True):
            err.print(
                f"{one.root}: {len(part):,} studies, weight {weight:g}, {count:,} in an epoch",
                markup=False,
                soft_wrap=True,
            )
    with open_session(
        recipe, recipe.train, recipe.model.scan, run_dir, resume=resume, expected_processes=expected_processes
    ) as session:
        session.check_batch(training)
        tokenizer = _tokenizer(recipe, training, session)
        encoder = build_encoder(recipe.model.encoder, session.scan)
        if recipe.model.encoder.weights is not None and not session.begun:
            transfer = fill_encoder(encoder, recipe.model.encoder.weights)
            if session.accelerator.is_main_process:
                transfer.show(verbose=verbose)
        model = fresh_alignment(recipe, encoder, tokenizer, run_dir if resume else None)
        model.augment = recipe.data.augment
        if model.findings is not None:
            model.findings.weight = recipe.train.findings_weight
            model.findings.set_balance(training.finding_targets(), recipe.train.findings_balance)
        stage = AlignStage(model, recipe, validation, run_dir, session.accelerator)
        return session.train(stage, training, stage.collate, workers=recipe.data.workers)


def _tokenizer(recipe: AlignRecipe, training: PairDataset, session: Session) -> Any:
    text, target = recipe.model.text, session.run_dir / "tokenizer"
    if session.accelerator.is_main_process and not target.exists():
        if text.name == "scratch":
            tokenizer = train_text_tokenizer(training.reports, text.scratch.vocab_size)
        else:
            tokenizer = load_text_tokenizer(text.name, text.revision)
        with atomic_directory(target) as temporary:
            tokenizer.save_pretrained(temporary)
    session.accelerator.wait_for_everyone()
    return load_text_tokenizer(str(target))
