"""Examples and batches of X-rays and reports from a dataset directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute
import torch
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.console import printable
from emrrg_cli.datasets.context import drop_fields, select_context
from emrrg_cli.datasets.finding_targets import finding_targets
from emrrg_cli.datasets.report_text import clean_report, cleaning_for, select_section
from emrrg_cli.datasets.stored_images import stored_image
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.raster import resize_square
from emrrg_cli.imaging.read import read_image
from emrrg_cli.imaging.views import view_token
from emrrg_cli.recipe.common import DataSettings
from emrrg_cli.vocabulary import ContextField

IGNORE = -100  # label of a position without loss


@dataclass(frozen=True)
class Example:
    """One study as input of the model: `pixels` is uint8 `[views, size, size]`, grey; `context` goes into the prompt.

    `projections` are indices into `VIEW_TOKENS`, one per view; empty if unknown. `findings` `[23]` are targets of the
    findings head from labels; None: they are read from the report.
    """

    index: int
    study_id: str
    pixels: Tensor
    report: str
    context: Mapping[ContextField, str] = field(default_factory=dict)
    projections: tuple[int, ...] = ()
    findings: Tensor | None = None


@dataclass
class Batch:
    """A batch of studies.

    `pixels`: uint8 `[n, size, size]`, the views of all studies in sequence; `views`: int64 `[b]`, views of each study,
    which sum to `n`; `contexts`: context of each study (empty: no study has any); `projections`: int64 `[n]`, indices
    into `VIEW_TOKENS` (None: all unknown); `labels`: int64 `[b, t]`, report tokens, padded with `IGNORE` (None for
    generation); `findings`: `[b, 23]` from `finding_targets` (None if no head learns them); `advantages`: `[b * k]`,
    weights of the log-probabilities, if `labels` are `[b * k, t]` sampled reports, k per study; `temperatures`:
    `[b * k]`, temperatures of these probabilities (None: 1).
    """

    indices: list[int]
    study_ids: list[str]
    pixels: Tensor
    views: Tensor
    reports: list[str]
    contexts: list[Mapping[ContextField, str]] = field(default_factory=list)
    projections: Tensor | None = None
    labels: Tensor | None = None
    findings: Tensor | None = None
    advantages: Tensor | None = None
    temperatures: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Returns the same batch with its tensors on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Returns page-locked tensors, so that copies to a GPU overlap with computation; the DataLoader calls it."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        mapped = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(mapped, name, function(value))
        return mapped


class ReportDataset(Dataset[Example]):
    """Studies of one split with their cleaned reports.

    Args:
        split: a `datasets.Dataset` with the columns of a dataset directory, images not decoded.
        settings: section, cleaning, context, number of views, limit.
        image_size: side in pixels that images are resized to.
        seed: random seed for dropping context fields in training.

    Attributes:
        reports, study_ids, patient_ids, contexts: values of the studies, in order; a patient may be None.

    Raises:
        UsageError: if the split has no column for a field of `settings.context`.
        RunError: if no study of the split has the text of `settings.section`; on access to a study, if it has no
            images or one that cannot be read.
    """

    def __init__(self, split: Any, settings: DataSettings, image_size: int, seed: int = 0) -> None:
        self.split = split
        self.image_size = image_size
        self.settings, self.seed = settings, seed
        self._epoch: int | None = None  # of the training
        _check_context(split, settings)
        patient = ["patient_id"] if "patient_id" in split.column_names else []
        columns = ("study_id", *patient, "findings", "impression", "report", "source", *settings.context)
        texts = split.select_columns(list(columns))
        self.rows: list[int] = []
        self.reports: list[str] = []
        self.contexts: list[dict[ContextField, str]] = []
        self.patient_ids: list[str | None] = []
        self.study_ids: list[str] = []  # read once, because every access reads the whole column
        for row, record in enumerate(texts):
            text = select_section(record, settings.section)
            if not text.strip():
                continue
            self.rows.append(row)
            self.study_ids.append(record["study_id"])
            self.patient_ids.append(record.get("patient_id") or None)
            self.reports.append(clean_report(text, cleaning_for(record["source"] or "", settings.cleaning)))
            self.contexts.append(select_context(record, settings.context, settings.cleaning, settings.context_words))
            if settings.limit is not None and len(self.rows) == settings.limit:
                break
        self.without_text = 0 if settings.limit is not None else len(split) - len(self.rows)
        if not self.rows:
            raise RunError(
                f"{settings.root or 'the data set'}: no study of the {split.split} split has text for "
                f"data.section={settings.section}",
                hint="Check the columns of the dataset directory, or choose another section.",
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        record = self.split[self.rows[index]]
        pixels = read_views(record, self.split, self.settings.max_views, self.image_size)
        projections = projections_of(record["views"], len(pixels))
        return Example(index, record["study_id"], pixels, self.reports[index], self._context(index), projections)

    @property
    def knows_views(self) -> bool:
        """Whether the data set gives the projection of any film."""
        rows = self.split.select_columns(["views"]).select(self.rows)
        return any(any(projections_of(row["views"], len(row["views"] or ()))) for row in rows)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; training calls it before each study. From then on, context fields are dropped."""
        self._epoch = epoch

    def _context(self, index: int) -> dict[ContextField, str]:
        context = self.contexts[index]
        if self._epoch is None or not context:
            return context
        return drop_fields(context, self.settings.context_dropout, self.seed, self._epoch, self.study_ids[index])


def read_views(record: Mapping[str, Any], split: Any, most: int | None, size: int) -> Tensor:
    """Reads the first views of a study, uint8 `[views, size, size]`, grey.

    Args:
        record: the study's row of `split`.
        most: largest number of views; None: all.

    Raises:
        RunError: the study has no images, or one that cannot be read.
    """
    where = f"study {printable(str(record['study_id']))}"
    images = (record["images"] or [])[:most]
    if not images:
        raise RunError(f"{where} has no images")
    try:
        views = [read_image(stored_image(image, split, where)) for image in images]
    except ImageError as error:
        raise RunError(f"{where}: {error}") from error
    return torch.stack([torch.from_numpy(resize_square(view, size)) for view in views])


def require_images(dataset: Any) -> None:
    """Checks that each study has an image, without reading any: a training run would notice only at the study's turn.

    Args:
        dataset: a `ReportDataset` or `LabelledFilms` over a whole split.

    Raises:
        RunError: a study has no images.
    """
    split = dataset.split
    counts = pyarrow.compute.list_value_length(split.data["images"]).to_pylist()
    for row in dataset.rows:
        if not counts[row]:
            study = printable(str(split[row]["study_id"]))
            raise RunError(
                f"{dataset.settings.root}: study {study} of the {split.split} split has no images",
                hint="Write the directory again with `emrrg preprocess`, or remove this study from it.",
            )


def projections_of(views: Sequence[str | None] | None, images: int) -> tuple[int, ...]:
    """Returns the indices into `VIEW_TOKENS` of the first images of a study, from the names of their views."""
    known = [view_token(view or "") for view in views or ()]
    return tuple((known + [0] * images)[:images])


def _check_context(split: Any, settings: DataSettings) -> None:
    missing = [name for name in settings.context if name not in split.column_names]
    if missing:
        raise UsageError(
            f"data.context names {', '.join(missing)}, but {settings.root or 'the data set'} has no such column",
            hint="Write the directory again with `emrrg preprocess`: iu_xray (for R2Gen's layout with --reports) and "
            "mimic_cxr store indication and comparison, mimic_cxr also technique, chexpert_plus all five, and folder "
            "with --table the columns of --indication-column and similar options. Or remove them from data.context.",
        )


def collate(
    examples: Sequence[Example], encode: Callable[[str], list[int]] | None = None, *, findings: bool = False
) -> Batch:
    """Joins examples into a batch; `encode` turns a report into label tokens; None: no labels.

    `findings` computes the targets of the findings head from the reports.
    """
    labels = None
    if encode is not None:
        tokens = [torch.tensor(encode(example.report)) for example in examples]
        labels = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=IGNORE)
    return Batch(
        indices=[example.index for example in examples],
        study_ids=[example.study_id for example in examples],
        pixels=torch.cat([example.pixels for example in examples]),
        views=torch.tensor([len(example.pixels) for example in examples]),
        reports=[example.report for example in examples],
        projections=torch.tensor(
            [place for example in examples for place in example.projections or (0,) * len(example.pixels)]
        ),
        contexts=[example.context for example in examples] if any(example.context for example in examples) else [],
        labels=labels,
        findings=finding_targets([example.report for example in examples]) if findings else None,
    )
