"""The parts that all training stages share: records, seeds, trackers, the curve, the validation loss."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from emrrg_cli.checksums import CHECKSUMS, check_directory, write_checksums
from emrrg_cli.console import err
from emrrg_cli.datasets.epochs import check_batch, epoch_length, evaluation_batches
from emrrg_cli.datasets.labelled_films import LabelledFilms
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.datasets.report_dataset import ReportDataset, require_images
from emrrg_cli.errors import EmrrgError, UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.locks import locked
from emrrg_cli.files.output_paths import refuse_links
from emrrg_cli.files.records import read_jsonl
from emrrg_cli.models.scan import choose_engine
from emrrg_cli.recipe.common import LoopSettings, Settings
from emrrg_cli.recipe.load import RUN_RECIPE, dump_recipe
from emrrg_cli.recipe.paths import with_absolute_paths
from emrrg_cli.reporting.plots import plot_curves
from emrrg_cli.runtime import choose_precision, fit_threads, make_accelerator
from emrrg_cli.training.checkpoint import require_checkpoint
from emrrg_cli.training.environment import ENVIRONMENT, make_trackers, record_environment, start_trackers
from emrrg_cli.training.launch import inside_launcher, is_first_process
from emrrg_cli.training.loop import train
from emrrg_cli.training.progress import TrainingDisplay
from emrrg_cli.training.run_dir import data_fingerprints
from emrrg_cli.training.stage import Stage
from emrrg_cli.training.summary import Summary

# Files and directories that a run may write before its first step.
_FILES = (RUN_RECIPE, ENVIRONMENT, CHECKSUMS, "encoder.safetensors", "llm.json", "images.json")
_DIRECTORIES = ("tokenizer", "llm", "tracking", "wandb")
# Those that do not change during training.
STATIC = ("encoder.safetensors", "llm.json", "images.json", "tokenizer", "llm")


@dataclass(frozen=True)
class Session:
    """One process of a training run: its directory, `accelerate.Accelerator`, precision and engine of the scan."""

    run_dir: Path
    settings: LoopSettings
    accelerator: Any
    precision: str
    scan: str
    resume: bool

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to continue from. It has the trained weights, so no other run is needed."""
        return self.resume and require_checkpoint(self.run_dir) is not None

    def check_batch(self, dataset: Dataset[Any]) -> None:
        """Checks that a data set has at least one batch. It is called before models are loaded.

        Raises:
            UsageError: The data set is too small. The message has a batch size that fits.
        """
        check_batch(self.settings.batch_size, self.accelerator.num_processes, epoch_length(dataset))

    def train(
        self, stage: Stage, dataset: Dataset[Any], collate: Callable[[Sequence[Any]], Any], *, workers: int
    ) -> Summary:
        """Trains a stage and draws its curve, also after an error; see `emrrg_cli.training.loop.train`."""
        from accelerate.utils import set_seed

        if self.accelerator.is_main_process and not (self.resume and (self.run_dir / CHECKSUMS).is_file()):
            write_checksums(self.run_dir, STATIC)
        # All processes start from the same weights, but each process has its own random numbers in training.
        set_seed(self.settings.seed, device_specific=True)
        start_trackers(self.accelerator)
        if not inside_launcher():  # a launcher divides the cores between its processes
            fit_threads(stage.model)
        try:
            return train(
                stage,
                dataset,
                collate,
                self.settings,
                self.run_dir,
                self.accelerator,
                workers=workers,
                resume=self.resume,
            )
        finally:
            failed = sys.exception() is not None
            history = self.run_dir / "history.jsonl"
            if self.accelerator.is_main_process and history.is_file():
                with suppress(EmrrgError) if failed else nullcontext():  # the first error says what happened
                    plot_curves(read_jsonl(history), self.run_dir / "curve.png")
            self.accelerator.end_training()


@contextmanager
def open_session(
    recipe: Settings,
    settings: LoopSettings,
    scan: str,
    run_dir: Path,
    *,
    resume: bool,
    expected_processes: int,
) -> Iterator[Session]:
    """Starts a run: writes its recipe and its environment, and sets the same seed in all processes.

    If the block fails before the first training step, the written files are removed.

    Args:
        recipe: Written as `recipe.yaml`, with absolute paths, unless the run is resumed.
        settings: Settings of the training loop.
        scan: `model.scan` of the recipe.
        expected_processes: The requested number of processes; 0 if none was requested.

    Raises:
        UsageError: The recipe does not fit the computer or the number of processes.
        RunError: The number of processes is not the requested one, or another process writes to `run_dir`.
    """
    precision = choose_precision(settings.precision)
    engine = choose_engine(scan, "cuda" if torch.cuda.is_available() else "cpu")
    trackers = make_trackers(settings.trackers, run_dir, recipe.model_dump())
    accelerator = make_accelerator(precision, expected_processes, trackers)
    check_batch(settings.batch_size, accelerator.num_processes)
    lock = locked(run_dir) if accelerator.is_main_process else nullcontext()
    # Not for a resumed run: this would remove its recipe and its tokenizer.
    clean = _no_false_start(run_dir) if accelerator.is_main_process and not resume else nullcontext()
    with lock, clean:
        if accelerator.is_main_process:
            if resume:
                refuse_links(run_dir)
                check_directory(run_dir)
            else:
                if (run_dir / RUN_RECIPE).exists():  # another command has created it
                    raise UsageError(f"{run_dir} already exists and is not empty", hint="Give another --output.")
                atomic_write_text(run_dir / RUN_RECIPE, dump_recipe(with_absolute_paths(recipe)))
            record_environment(run_dir, accelerator, precision, engine, data_fingerprints(recipe))
        accelerator.wait_for_everyone()
        from accelerate.utils import set_seed

        set_seed(settings.seed)
        yield Session(run_dir, settings, accelerator, precision, engine, resume)


def check_studies(dataset: ReportDataset | LabelledFilms) -> None:
    """Prints how many studies of a split are not used because they lack the text or the labels to learn.

    Raises:
        RunError: One of the others has no images.
    """
    require_images(dataset)
    if dataset.without_text and is_first_process():
        settings, split = dataset.settings, dataset.split
        lacking = "labels" if isinstance(dataset, LabelledFilms) else f"text for data.section={settings.section}"
        err.print(
            f"{settings.root}: {dataset.without_text:,} of {len(split):,} {split.split} studies have no {lacking} and "
            "are left out",
            markup=False,
            soft_wrap=True,
        )


@contextmanager
def _no_false_start(run_dir: Path) -> Iterator[None]:
    """Removes the files of a new run that fails before its first step, so that the directory can be used again."""
    try:
        yield
    except BaseException:
        if not any((run_dir / name).exists() for name in ("history.jsonl", "checkpoints", "model")):
            for name in _FILES:
                (run_dir / name).unlink(missing_ok=True)
            for name in _DIRECTORIES:
                shutil.rmtree(run_dir / name, ignore_errors=True)
            with suppress(OSError):  # not there, or not empty
                run_dir.rmdir()
        raise


@torch.no_grad()
def validation_loss(
    model: Any,
    dataset: Dataset[Any],
    collate: Callable[[Sequence[Any]], Any],
    settings: LoopSettings,
    accelerator: Any,
    display: TrainingDisplay,
    *,
    workers: int,
) -> float:
    """Returns the mean loss over all items of a split. It does not depend on batch size or number of processes.

    Args:
        model: Returns `StageOutput` for a batch.
        collate: See `emrrg_cli.training.loop.train`.
        workers: Number of processes that load data.
    """
    count = len(dataset)  # type: ignore[arg-type]
    size = settings.micro_batch_size or settings.batch_size
    batches = evaluation_batches(count, size, accelerator.process_index, accelerator.num_processes)
    sizes = [len(batch) for batch in batches if batch]
    total = torch.zeros(2, device=accelerator.device, dtype=torch.float32)
    with display.phase("validation: loss", count) as advance:
        for size, batch in zip(sizes, load_batches(dataset, batches, collate, workers=workers), strict=True):
            with accelerator.autocast():
                loss_sum, items = model(batch.to(accelerator.device))
            total += torch.stack([loss_sum.float(), items.float()])
            advance(size * accelerator.num_processes)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, reduction="sum")
    return float(total[0] / total[1])
