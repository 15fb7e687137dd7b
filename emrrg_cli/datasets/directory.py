"""The dataset directory: Parquet shards, a dataset card and a manifest, which `datasets.load_dataset` opens as it is.

OUT/
  README.md                               dataset card; its YAML names the splits' files
  manifest.json                           counts, skipped items with reasons, versions, options
  data/train-00000-of-00003.parquet       studies with their encoded images
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Features, List, Value
from datasets import Image as ImageFeature

from emrrg_cli.console import err
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files import whole_directory
from emrrg_cli.vocabulary import SPLITS

MANIFEST = "manifest.json"
CARD = "README.md"

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

_SHARD = re.compile(r"(train|validation|test)-(\d{5})-of-(\d{5})\.parquet")


def dataset_features(columns: Mapping[str, Column]) -> Features:
    """`FEATURES` and the columns that only one source has."""
    kinds = {"text": Value("string"), "texts": List(Value("string"))}
    return Features({**FEATURES, **{name: kinds[column.kind] for name, column in columns.items()}})


def card(manifest: dict[str, Any], columns: Mapping[str, Column], about: str | None) -> str:
    """The dataset card. Its YAML header tells `datasets` which files make which split.

    `load_dataset(directory)` keys its Arrow copy by the directory's last name and this header alone: without the
    fingerprint, two directories of the same name, or one that was overwritten, would show the rows of the first.
    """
    counts: dict[str, dict[str, int]] = manifest["splits"]
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in counts)
    extra = "".join(f"\n| `{name}` | {column.content} |" for name, column in columns.items())
    table = "\n".join(f"| {split} | {count['studies']:,} | {count['images']:,} |" for split, count in counts.items())
    return f"""---
configs:
- config_name: default
  description: fingerprint {manifest["fingerprint"]}
  data_files:
{files}
---

# Chest X-ray studies with reports ({manifest.get("source", "unknown source")})

Written by `emrrg preprocess`; `{MANIFEST}` says from what, with which options, and what was left out.

```python
from datasets import load_dataset

studies = load_dataset("path/to/this/directory")
```

| split | studies | images |
|---|---|---|
{table}

| column | content |
|---|---|
| `study_id`, `patient_id` | as in the source; `patient_id` is null where it has none |
| `images` | the views of the study, 8-bit grey |
| `views` | projection of each image, `unknown` where the source does not say |
| `findings`, `impression`, `report` | raw text, null where absent; cleaned when read, by the recipe's rule |
| `source` | data set |{extra}

{about or "The terms of the source apply to these images and reports."}
"""


def is_dataset_dir(root: str | Path) -> bool:
    """Whether a folder is meant as a dataset directory, rather than one of images."""
    folder = whole_directory(Path(root))
    return (folder / MANIFEST).is_file() or any((folder / "data").glob("*.parquet"))


def open_dataset(root: str | Path) -> datasets.DatasetDict:
    """Opens a dataset directory with its images as encoded bytes.

    At first use `datasets` makes a memory-mapped Arrow copy of the Parquet files in its cache; where, and about how
    large, is said on stderr before it begins. Nothing is fetched from a network.

    Args:
        root: Directory written by `emrrg preprocess`, or any with Parquet files of the same columns in `data/`.

    Returns:
        Those of `train`, `validation`, `test` that exist. `images` is a list of `{"bytes": ..., "path": ...}`.

    Raises:
        UsageError: No such directory, or not a dataset directory.
        RunError: Its files are broken, columns are missing, or the disk is full.
    """
    folder = whole_directory(Path(root))
    shards = find_shards(folder)
    size = sum(file.stat().st_size for files in shards.values() for file in files)
    # The files are named one by one: then the copy is keyed by their paths and times, not by the directory's last name.
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
        # `datasets` wraps what went wrong in its own exception; the cause is the part that helps.
        cause = error.__cause__ or error
        raise RunError(
            f"cannot open the dataset {folder}: {str(cause).strip() or type(cause).__name__}",
            hint="If a file is broken, write the directory again with `emrrg preprocess`.",
        ) from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    for split, rows in opened.items():
        if missing := [name for name in FEATURES if name not in rows.column_names]:
            raise RunError(f"{folder}: split {split} lacks the columns {', '.join(missing)}")
    return opened.cast_column("images", List(ImageFeature(decode=False)))


def read_manifest(root: str | Path) -> dict[str, Any]:
    """The manifest of a dataset directory.

    Raises:
        UsageError: No such directory, or it has no manifest.
        RunError: The manifest is not valid JSON.
    """
    folder = whole_directory(Path(root))
    _check_folder(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} has no {MANIFEST}", hint="It is written by `emrrg preprocess`.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise RunError(f"{path} is not a manifest")
    return manifest


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UsageError(f"no such dataset directory: {folder}", hint="Make one with `emrrg preprocess`.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a dataset directory", hint="Make one with `emrrg preprocess`.")


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split of a dataset directory, in order, all there.

    Raises:
        UsageError: No such directory, or not a dataset directory.
        RunError: Files are missing.
    """
    _check_folder(folder)
    found: dict[str, dict[int, Path]] = {}
    totals: dict[str, int] = {}
    for file in sorted((folder / "data").glob("*.parquet")):
        match = _SHARD.fullmatch(file.name)
        if match is None:
            raise UsageError(
                f"{file} is not named like a shard of a dataset directory",
                hint="Shards are named data/train-00000-of-00003.parquet; splits are train, validation and test.",
            )
        split, index, total = match[1], int(match[2]), int(match[3])
        found.setdefault(split, {})[index] = file
        if totals.setdefault(split, total) != total:
            raise RunError(f"{folder}: split {split} has shards of different runs: {file.name} does not fit the others")
    for split, total in totals.items():
        if missing := sorted(set(range(total)) - set(found[split])):
            raise RunError(
                f"{folder}: shard {missing[0]} of {total} of split {split} is missing", hint="Write it again."
            )
    if not found:
        if (folder / MANIFEST).is_file():
            raise RunError(f"{folder} has lost its Parquet files (data/*.parquet)", hint="Write it again.")
        raise UsageError(
            f"{folder} is not a dataset directory: it has no data/*.parquet",
            hint="`emrrg preprocess` makes one from raw data.",
        )
    return {split: list(found[split].values()) for split in SPLITS if split in found}


def _readable(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@dataclass(frozen=True)
class Column:
    """A column beside those of every dataset directory: one text, or a list of texts, and what it holds."""

    kind: Literal["text", "texts"]
    content: str
