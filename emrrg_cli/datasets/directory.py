"""The dataset directory: Parquet shards, a dataset card and a manifest, which `datasets.load_dataset` can open.

OUT/
  README.md                               dataset card; its YAML names the splits' files
  manifest.json                           counts, skipped items with reasons, versions, options
  data/train-00000-of-00003.parquet       studies with their encoded images
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Features, List, Value
from datasets import Image as ImageFeature

from emrrg_cli.console import err, printable
from emrrg_cli.datasets.shard_files import find_shards
from emrrg_cli.datasets.stored_images import remember_folder
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import whole_directory
from emrrg_cli.vocabulary import SPLIT_NAMES

FEATURES = Features(
    {
        "study_id": Value("string"),
        "patient_id": Value("string"),
        "images": List(ImageFeature()),
        "views": List(Value("string")),
        "findings": Value("string"),
        "impression": Value("string"),
        "report": Value("string"),
        "source": Value("string"),
    }
)


_IDS = ("study_id", "patient_id")


def dataset_features(columns: Mapping[str, Column]) -> Features:
    """Returns `FEATURES` with the columns that only one source has."""
    kinds = {"text": Value("string"), "texts": List(Value("string"))}
    return Features({**FEATURES, **{name: kinds[column.kind] for name, column in columns.items()}})


def open_dataset(root: str | Path) -> datasets.DatasetDict:
    """Opens a dataset directory with its images as encoded bytes.

    At first use, `datasets` makes a memory-mapped Arrow copy of the Parquet files in its cache. A message on stderr
    gives its place and approximate size before it begins. Nothing is downloaded.

    Args:
        root: Directory written by `emrrg preprocess`, or any directory with Parquet files of these columns in `data/`.

    Returns:
        The existing splits among `train`, `validation`, `test`. `images` is a list of `{"bytes": ..., "path": ...}`.

    Raises:
        UsageError: `root` does not exist or is not a dataset directory.
        RunError: Its files are broken, columns are missing, or the disk is full.
    """
    folder = whole_directory(Path(root))
    shards = find_shards(folder)
    size = sum(file.stat().st_size for files in shards.values() for file in files)
    # Files are listed one by one, so that their paths and times identify the copy, not the directory's last name.
    data_files = {split: [glob.escape(str(file.resolve())) for file in files] for split, files in shards.items()}
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder("parquet", data_files=data_files)
        cache = Path(builder.cache_dir)
        if not cache.exists():
            err.print(
                f"datasets makes an Arrow copy of {folder} in {cache}, about {_readable(size)}; later runs reuse it.",
                markup=False,
                soft_wrap=True,
            )
        builder.download_and_prepare()
        opened = builder.as_dataset()
    except Exception as error:
        # `datasets` wraps the error in its own exception; the cause has the useful message.
        cause = error.__cause__ or error
        hint = "If a file is broken, write the directory again with `emrrg preprocess`."
        copies, place = Path(datasets.config.HF_DATASETS_CACHE), Path(str(getattr(cause, "filename", None)))
        if place in (copies, *copies.parents) or copies in place.parents:
            hint = "This is in the cache of `datasets`. Set HF_HOME to a folder that can be written."
        raise RunError(
            f"cannot open the dataset {folder}: {str(cause).strip() or type(cause).__name__}", hint=hint
        ) from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    for split, rows in list(opened.items()):
        _check_columns(folder, split, rows.features)
        remember_folder(rows, folder)
        images = List(ImageFeature(decode=False))
        if isinstance(rows.features["images"].feature, ImageFeature):
            rows.info.features["images"] = images  # `cast_column` would write all data to the cache again
        else:
            opened[split] = rows.cast_column("images", images)
    return opened


def find_split(splits: Mapping[str, Any], name: str, root: str | Path) -> str:
    """Returns the name of a split of a dataset directory; `val` is also a name of `validation`.

    Raises:
        UsageError: There is no such split.
    """
    found = name if name in splits else SPLIT_NAMES.get(name.lower(), name)
    if found not in splits:
        raise UsageError(
            f"{printable(str(root))}: this dataset directory has no split named {printable(name)}",
            hint=f"Its splits are: {', '.join(splits)}.",
        )
    return found


def _check_columns(folder: Path, split: str, found: Features) -> None:
    """Check that all columns exist and have the expected types.

    Raises:
        RunError: A column is missing or has the wrong type, such as numbers instead of text.
    """
    if missing := [name for name in FEATURES if name not in found]:
        raise RunError(f"{folder}: split {split} lacks the columns {', '.join(missing)}")
    for name in FEATURES:
        kind = found[name]
        if name == "images":
            fits, what = _holds_images(kind), "lists of images"
        elif name == "views":
            fits, what = isinstance(kind, List) and _is_text(kind.feature), "lists of text"
        else:
            # Ids may be whole numbers; floats would be shown with a fraction.
            fits, what = _is_text(kind) or (name in _IDS and "int" in str(getattr(kind, "dtype", ""))), "text"
        if not fits and getattr(kind, "dtype", "") != "null":
            raise RunError(
                f"{folder}: column {name} of split {split} is {_type_name(kind)}, not {what}",
                hint="Data frames turn ids into floats if values are missing: write text and nulls.",
            )


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string", "string_view", "null")


def _holds_images(kind: Any) -> bool:
    if not isinstance(kind, List):
        return False
    inner = kind.feature
    return isinstance(inner, ImageFeature) or (isinstance(inner, dict) and {"bytes", "path"} & set(inner) != set())


def _type_name(kind: Any) -> str:
    return str(kind.dtype) if isinstance(kind, Value) else type(kind).__name__.lower()


def _readable(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@dataclass(frozen=True)
class Column:
    """An additional column of a dataset directory: its kind (one text or a list of texts) and its content."""

    kind: Literal["text", "texts"]
    content: str
