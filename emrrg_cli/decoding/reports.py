"""Writes reports for a split of a dataset directory, and for images from Python (`load_generator`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from emrrg_cli.datasets.epochs import evaluation_batches
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.datasets.report_dataset import ReportDataset, collate
from emrrg_cli.decoding.contexts import read_context
from emrrg_cli.decoding.grounding import ground_reports
from emrrg_cli.decoding.read_studies import unused_note, view_limit
from emrrg_cli.decoding.writer import Studies, Writer, WrittenReport, autocast_of, autocast_without_cache
from emrrg_cli.default_model import find_default_model
from emrrg_cli.errors import UsageError, require_path
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.dicom.facts import find_dicom_facts
from emrrg_cli.imaging.raster import resize_square
from emrrg_cli.imaging.read import read_image
from emrrg_cli.imaging.views import view_of_path, view_token
from emrrg_cli.models.film_distance import FilmDistance
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.finetuning import FinetuneRecipe, GenerationSettings
from emrrg_cli.runtime import choose_device
from emrrg_cli.vocabulary import ContextField

if TYPE_CHECKING:
    Picture = Image | Path | str | bytes
    Study = Picture | Sequence[Picture]


def write_split(
    model: ReportGenerator,
    dataset: ReportDataset,
    settings: GenerationSettings,
    accelerator: Any,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    advance: Callable[[int], None] = lambda n: None,
    keep: Callable[[Sequence[WrittenReport]], None] = lambda reports: None,
) -> list[str]:
    """Writes a report for each study of a dataset, divided among all processes.

    Args:
        indices: the studies; None: all.
        advance: called with the number of newly finished studies.
        keep: called with new reports of this process; their keys are indices of studies.

    Returns:
        The reports in the order of `indices`, on every process.
    """
    indices = range(len(dataset)) if indices is None else indices
    mine = evaluation_batches(len(indices), settings.batch_size, accelerator.process_index, accelerator.num_processes)
    batches = [[indices[place] for place in batch] for batch in mine]
    writer = Writer(model, settings, accelerator.device, autocast_without_cache(accelerator))

    def studies() -> Iterator[Studies]:
        for batch in load_batches(dataset, batches, collate, workers=workers):
            yield Studies(batch.indices, batch.indices, batch.pixels, batch.views, batch.contexts, batch.projections)

    written: list[tuple[int, str]] = []
    for done in writer.write(studies()):
        written += [(study.key, study.text) for study in done]
        keep(done)
        advance(len(done) * accelerator.num_processes)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        written = gather_object(written)
    by_index = dict(written)
    return [by_index[index] for index in indices]


class Generator:
    """Writes reports for images with the model of a run; `load_generator` creates it."""

    def __init__(
        self,
        model: ReportGenerator,
        recipe: FinetuneRecipe,
        device: torch.device,
        precision: str,
        film_distance: FilmDistance | None = None,
    ) -> None:
        self.model = model.to(device)
        self.recipe = recipe
        self.device = device
        self.precision = precision
        autocast = autocast_of(device, precision)
        self.writer = Writer(
            self.model, recipe.generation, device, autocast, confident=True, film_distance=film_distance
        )

    def generate(self, studies: Iterable[Study], context: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
        """Writes a report for each study.

        Args:
            studies: a list, column or generator with an image or a list of images (the views of one study) for each
                study, as paths, bytes or PIL images. As in `emrrg generate`, the first `data.max_views` images of a
                study are used, or 16 with a warning, and a model with `model.view_tokens` gets the projections
                from DICOM headers and from names such as `view1_frontal.jpg`.
            context: context of each study, such as `{"indication": "cough", "age": 45}`, with fields of the run's
                `data.context`; None: no context.

        Returns:
            One report per study, in order; empty for a study without a readable image. A warning names each image that
            cannot be read; the other images of its study are used. Research output: not for diagnosis.

        Raises:
            ImageError: if no image of any study can be read; the message names the first.
            UsageError: for a study without images, a single study instead of a list, or a context that the model does
                not read. All studies are checked first, except those of a generator without `context`: they are
                requested one batch at a time, so that they need little memory.
        """
        if (
            isinstance(studies, str | bytes | Mapping | set)
            or not isinstance(studies, Iterable)
            or hasattr(studies, "columns")
        ):
            raise UsageError("generate takes a list of studies", hint="For one image: generate([image]).")
        if not isinstance(context, Sequence | None) or not all(isinstance(one, Mapping) for one in context or ()):
            raise UsageError("context must be a list of dictionaries", hint='For one study: [{"age": 45}].')
        contexts = None if context is None else [read_context(one, self.recipe.data) for one in context]
        if contexts is not None or not isinstance(studies, Iterator):
            studies = list(studies)
            for study in studies:
                _pictures(study)
            if contexts is not None and len(contexts) != len(studies):
                raise UsageError(
                    f"there are {len(studies)} studies and {len(contexts)} contexts", hint="Give one for each."
                )
        unread: list[ImageError] = []
        reports = self._write(self._read(studies, unread), contexts)
        if unread and not any(reports):
            raise unread[0]
        return reports

    def _read(self, studies: Iterable[Study], unread: list[ImageError]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        size, most = self.recipe.model.encoder.image_size, self.recipe.data.max_views
        for number, study in enumerate(studies):

            def skip(error: ImageError, number: int = number) -> None:
                warnings.warn(f"study {number}: {error.message}", stacklevel=2)
                unread[:] = unread or [error]  # only the first: each holds the frames in which it was raised

            yield _read_views(study, size, most, skip)

    def write(self, studies: Iterable[Studies]) -> Iterator[list[WrittenReport]]:
        """Yields reports as soon as they are finished; see `Writer.write`."""
        return self.writer.write(studies)

    def ground(
        self,
        pixels: Sequence[torch.Tensor],
        reports: Sequence[WrittenReport],
        contexts: Sequence[Mapping[ContextField, str]] = (),
        projections: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Computes maps of where the model looked when it wrote each sentence; see `ground_reports`.

        Args:
            pixels: uint8 `[views, size, size]` of each study.
            reports: the reports that `write` yielded for these studies.
            contexts, projections: as in `Studies`.

        Returns:
            Maps of each study, fp32 `[sentences, views, grid, grid]`.
        """
        views = torch.tensor([len(images) for images in pixels]).to(self.device)
        sentences = [[] if report.confidence is None else report.confidence.sentence_of_token for report in reports]
        tokens = [report.tokens for report in reports]
        with self.writer.autocast():
            all_pixels = torch.cat(list(pixels)).to(self.device)
            return ground_reports(self.model, all_pixels, views, tokens, sentences, contexts, projections)

    def generate_pixels(
        self, studies: Iterable[torch.Tensor], contexts: Sequence[Mapping[ContextField, str]] | None = None
    ) -> list[str]:
        """Writes a report for each study; each is uint8 `[views, size, size]`. Without views it is empty.

        Args:
            studies: requested one batch at a time.
            contexts: context of each study from `read_context`; None: no context.
        """
        return self._write(((pixels, [view_token("")] * len(pixels)) for pixels in studies), contexts)

    def _write(
        self,
        studies: Iterable[tuple[torch.Tensor, list[int]]],
        contexts: Sequence[Mapping[ContextField, str]] | None,
    ) -> list[str]:
        # Each study: its views, and their indices into `VIEW_TOKENS`.
        reports: list[str] = []

        def batches() -> Iterator[Studies]:
            numbered = enumerate(studies)  # the numbers seed sampling
            while some := list(islice(numbered, self.recipe.generation.batch_size)):
                reports.extend("" for _ in some)
                read = {number: study for number, study in some if len(study[0])}
                if read:
                    views = torch.tensor([len(pixels) for pixels, _ in read.values()])
                    projections = torch.tensor([place for _, places in read.values() for place in places])
                    known = [contexts[number] for number in read] if contexts else ()
                    pixels = torch.cat([pixels for pixels, _ in read.values()])
                    yield Studies([*read], [*read], pixels, views, known, projections)

        for done in self.writer.write(batches()):
            for study in done:
                reports[study.key] = study.text
        return reports


def study_pixels(study: Study, size: int, most: int | None = None) -> torch.Tensor:
    """Reads the first `most` (None: 16, with a warning) views of a study for the model: uint8 `[views, size, size]`.

    Raises:
        ImageError: for an image that cannot be read.
        UsageError: for a study without images, or a value that is not an image.
    """
    return _read_views(study, size, most, None)[0]


def _read_views(
    study: Study, size: int, most: int | None, skip: Callable[[ImageError], None] | None
) -> tuple[torch.Tensor, list[int]]:
    # Views and their indices into `VIEW_TOKENS`. `skip` is called for each image that cannot be read and is left out.
    pictures = _pictures(study)
    read: list[NDArray[np.uint8]] = []
    projections: list[int] = []
    for picture in pictures:
        if len(read) == view_limit(most):
            if most is None:
                first = str(pictures[0]) if isinstance(pictures[0], str | Path) else "<image>"
                warnings.warn(unused_note(len(pictures), first), stacklevel=2)
            break
        try:
            read.append(resize_square(read_image(picture), size))
        except ImageError as error:
            if skip is None:
                raise
            skip(error)
        else:
            projections.append(_projection(picture))
    return torch.from_numpy(np.stack(read) if read else np.zeros((0, size, size), np.uint8)), projections


def _projection(picture: Picture) -> int:
    """Returns the index into `VIEW_TOKENS` of an image, from its DICOM header or the name of its file."""
    source = Path(picture) if isinstance(picture, str) else picture
    facts = find_dicom_facts(source) if isinstance(source, Path | bytes) else None
    name = view_of_path(str(source)) if isinstance(source, Path) else ""
    return view_token((facts.view if facts else "") or name)


def _pictures(study: Study) -> Sequence[Picture]:
    pictures = study if isinstance(study, Sequence) and not isinstance(study, str | bytes) else [study]
    if not pictures:
        raise UsageError("a study has no images")
    for picture in pictures:
        if not isinstance(picture, bytes | Image):
            require_path(picture, "an image that is neither bytes nor a PIL image")
    return pictures


def load_generator(
    run_dir: Path | str | None = None,
    *,
    device: str = "auto",
    overrides: Sequence[str] = (),
    recipe: FinetuneRecipe | None = None,
) -> Generator:
    """Loads the model of a run directory to write reports.

    Args:
        run_dir: run directory of `emrrg finetune`; None: the default model of the package, for synthetic films only.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`.
        overrides: `key=value` changes to the run's recipe, such as `generation.num_beams=1`.
        recipe: the run's recipe, with changes already applied.

    Raises:
        UsageError: if this is not a run directory, the package has no default model, or an override is wrong.
        RunError: if the run has no trained model yet, or its LLM is not available.
    """
    from emrrg_cli.models.build import load_model
    from emrrg_cli.recipe.load import load_run_recipe
    from emrrg_cli.runtime import inference_precision, llm_dtype

    if run_dir is None:
        run_dir = find_default_model("Name the run directory: load_generator(RUN).")
    run = require_path(run_dir, "the run directory")
    if recipe is None:
        recipe = load_run_recipe(run, None, overrides, "generate")
    chosen = choose_device(device)
    precision = inference_precision(recipe.train.precision, chosen.type)
    dtype = llm_dtype(recipe.model.llm.dtype, precision)
    model = load_model(run, recipe.model, dtype)
    return Generator(model, recipe, chosen, precision, FilmDistance.load(run))
