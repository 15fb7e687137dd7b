"""The studies of a dataset directory for `generate`. Their images are read on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyarrow.compute import list_value_length

from emrrg_cli.console import printable
from emrrg_cli.datasets.context import without_report
from emrrg_cli.datasets.directory import find_split, open_dataset
from emrrg_cli.datasets.stored_images import stored_image
from emrrg_cli.decoding.studies import StudyFiles, path_name
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.vocabulary import CONTEXT_FIELDS


class StoredImage:
    """An image of a dataset directory; its text is directory, split, study and number.

    Args:
        split: a `datasets.Dataset` from `open_dataset`.
        row: row of the study.
        place: number of the image in the study.
        name: name of the image.
    """

    __slots__ = ("name", "place", "row", "split")

    def __init__(self, split: Any, row: int, place: int, name: str) -> None:
        self.split, self.row, self.place, self.name = split, row, place, name

    def __str__(self) -> str:
        return self.name

    def content(self) -> bytes | Path:
        """Returns the encoded image, or its file.

        Raises:
            ImageError: the image does not exist.
        """
        try:
            return stored_image(self.split[self.row]["images"][self.place], self.split, self.name)
        except RunError as error:
            raise ImageError(self.name, "missing image", error.message.removeprefix(f"{self.name}: ")) from error


def stored_studies(root: str, split: str | None = None) -> list[StudyFiles]:
    """Returns the studies of a split of a dataset directory.

    Args:
        split: name of the split; None: `test`, or the only split.

    Raises:
        UsageError: the split does not exist, or two studies have the same id.
        RunError: the directory is broken.
    """
    splits = open_dataset(root)
    only = next(iter(splits)) if len(splits) == 1 else "test"
    chosen = find_split(splits, split or only, root)
    rows = splits[chosen]
    studies: dict[str, StudyFiles] = {}
    counts = list_value_length(rows.data.column("images")).to_pylist()  # reads no image
    context_fields = [name for name in CONTEXT_FIELDS if name in rows.column_names]
    texts = ["findings", "impression", "report"] if context_fields else []
    for row, record in enumerate(rows.select_columns(["study_id", "views", *texts, *context_fields])):
        count, name = counts[row] or 0, printable(str(record["study_id"]))
        views = tuple(view or "" for view in [*(record["views"] or ()), *[""] * count][:count])
        if name in studies:
            raise UsageError(f"{printable(root)}: two studies of the {chosen} split have the id {name}")
        where = f"{path_name(Path(root))}/{chosen}/{name}"
        films = tuple(StoredImage(rows, row, place, f"{where}/{place}") for place in range(count))
        studies[name] = StudyFiles(
            name, films, views, {field: without_report(record, field) for field in context_fields}
        )
    return list(studies.values())
