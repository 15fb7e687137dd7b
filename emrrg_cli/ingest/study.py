"""The studies that a source yields for the dataset writer, and the log of what cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from emrrg_cli.console import counted, printable
from emrrg_cli.datasets.directory import Column
from emrrg_cli.datasets.report_text import unix_line_ends
from emrrg_cli.vocabulary import Split

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGE_DROPPED = "image dropped"


@dataclass(frozen=True)
class ImageProblem:
    """An image that cannot be used: `reason` is one of a few fixed phrases (counted), `detail` is about this file."""

    path: str
    reason: str
    detail: str = ""


class RenderedImage(Protocol):
    """An image that a worker process draws, instead of reading it from a file."""

    @property
    def name(self) -> str:
        """File name of the image in the dataset."""

    def render(self, size: int) -> Image:
        """Draws the image: mode `L`, shorter side of `size` pixels."""


def image_name(image: Path | RenderedImage, root: Path | None) -> str:
    """Returns the name of an image in the dataset: its path below the root of the raw data."""
    if not isinstance(image, Path):
        return image.name
    return printable((image if root is None else image.relative_to(root)).as_posix())


@dataclass(frozen=True)
class Study:
    """One examination as its source describes it; nothing is decoded yet.

    Attributes:
        image_paths: Files of the views, inside the source's root; only links that lead out of it are not resolved.
        views: Projection of each image (`PA`, `AP`, `LATERAL`, ..., or `unknown`): files first, then `rendered`.
        report: The text by the source's own rule; `findings` and `impression` if the source separates them. Lines of
            all texts end in LF.
        problems: Listed images that are already known to be unusable.
        rendered: Images that are drawn, not read from files.
        extra: Values of the columns that only this source has; see `HasColumns`.
    """

    study_id: str
    patient_id: str | None
    split: Split
    image_paths: tuple[Path, ...]
    views: tuple[str, ...]
    findings: str | None
    impression: str | None
    report: str | None
    source: str
    problems: tuple[ImageProblem, ...] = ()
    rendered: tuple[RenderedImage, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.views) != (images := len(self.image_paths) + len(self.rendered)):
            raise ValueError(f"{len(self.views)} views for {images} images")
        for name in ("findings", "impression", "report"):
            if text := getattr(self, name):
                object.__setattr__(self, name, unix_line_ends(text))
        if any(isinstance(value, str) and "\r" in value for value in self.extra.values()):
            extra = {
                name: unix_line_ends(value) if isinstance(value, str) else value for name, value in self.extra.items()
            }
            object.__setattr__(self, "extra", extra)


@dataclass
class Skipped:
    """One reason to skip items: its count and the first examples."""

    unit: Literal["study", "image"]
    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def counted(self) -> str:
        """`3 images`, `1 study`, `2,955 studies`."""
        return counted(self.count, self.unit)


@dataclass
class ImportLog:
    """Lists skipped items, and notes about used items. Its memory does not grow with the number of studies.

    Every study is either written, or counted here once under its first problem. Images dropped from a written study are
    counted under `image dropped`.

    Attributes:
        notes: Notes about written images, such as `not chest`.
        remarks: Sentences about the whole data set.
    """

    max_examples: int = 5
    read: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    notes: dict[str, Skipped] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def skip_study(self, reason: str, study_id: str, *, path: str = "", detail: str = "") -> None:
        """Counts a skipped study."""
        self._add(self.skipped, "study", reason, study_id, path, detail)

    def drop_image(self, study_id: str, problem: ImageProblem) -> None:
        """Count an image that is left out of a study that is written."""
        detail = f"{problem.reason}: {problem.detail}" if problem.detail else problem.reason
        self._add(self.skipped, "image", IMAGE_DROPPED, study_id, problem.path, detail)

    def leave_out_image(self, study_id: str, path: str, reason: str, detail: str = "") -> None:
        """Count a usable image that the recipe does not ask for."""
        self._add(self.skipped, "image", reason, study_id, path, detail)

    def note_image(self, study_id: str, path: str, note: str) -> None:
        """Count a note about an image that is written unchanged. Notes are grouped by their text before the colon."""
        reason, _, detail = note.partition(": ")
        self._add(self.notes, "image", reason, study_id, path, detail)

    def _add(
        self,
        entries: dict[str, Skipped],
        unit: Literal["study", "image"],
        reason: str,
        study_id: str,
        path: str,
        detail: str,
    ) -> None:
        entry = entries.setdefault(reason, Skipped(unit))
        entry.count += 1
        if len(entry.examples) < self.max_examples:
            example = {"id": study_id, "path": path, "detail": detail}
            entry.examples.append({key: printable(value) for key, value in example.items() if value})

    @property
    def studies_skipped(self) -> int:
        """Number of skipped studies, for all reasons together."""
        return sum(entry.count for entry in self.skipped.values() if entry.unit == "study")

    def add(self, skipped: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Add the content of another log, given as its `as_dict` and `notes_as_dict`. Its examples come last."""
        for entries, others in ((self.skipped, skipped), (self.notes, notes)):
            for reason, other in others.items():
                entry = entries.setdefault(reason, Skipped(other["unit"]))
                entry.count += other["count"]
                entry.examples += other["examples"][: self.max_examples - len(entry.examples)]

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's form: `{reason: {"unit", "count", "examples": [{"id", "path", "detail"}]}}`."""
        return _counted(self.skipped)

    def notes_as_dict(self) -> dict[str, Any]:
        """Returns the notes in the same form as `as_dict`."""
        return _counted(self.notes)


def _counted(entries: dict[str, Skipped]) -> dict[str, Any]:
    return {
        reason: {"unit": entry.unit, "count": entry.count, "examples": entry.examples}
        for reason, entry in entries.items()
    }


class StudySource(Protocol):
    """A raw data set that the dataset writer reads."""

    @property
    def name(self) -> str:
        """Value of the `source` column; the cleaning rule `auto` depends on it."""

    @property
    def root(self) -> Path | None:
        """Resolved folder that contains every image; None if images are rendered."""

    @property
    def image_folders(self) -> tuple[Path, ...]:
        """Folders in which image paths are looked up, first match first."""

    def __len__(self) -> int:
        """Number of studies that `studies` reads, including skipped ones."""

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields the studies, always in the same order; records unusable items in `log`."""


@runtime_checkable
class HasColumns(Protocol):
    """A source with further columns (`Study.extra`) and a paragraph for the dataset card."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The columns by name; every study's `extra` has exactly these."""

    @property
    def about(self) -> str:
        """A paragraph for the dataset card."""
