"""The dataset directory: Parquet shards, a dataset card and a manifest, which `datasets.load_dataset` opens as it is.

OUT/
  README.md                               dataset card; its YAML names the splits' files
  manifest.json                           counts, skipped items with reasons, versions, options
  data/train-00000-of-00003.parquet       studies with their encoded images
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature

from emrrg_cli.console import err
from emrrg_cli.data.study import SPLITS, Column, Split, Study
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files import atomic_directory, recover_directory, whole_directory

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

# A row group is the least that a reader fetches and that the writer holds: small, so that a split streams.
_STUDIES_PER_ROW_GROUP = 100
_BYTES_PER_ROW_GROUP = 64 * 2**20


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of a JPEG or PNG file and the name it had, relative to the raw data's root."""

    name: str
    data: bytes


@dataclass
class _SplitWriter:
    """Appends studies to the shards of one split. Shards get their final names when their number is known."""

    folder: Path
    split: Split
    studies_per_shard: int
    features: Features
    studies: int = 0
    images: int = 0
    shards: list[Path] = field(default_factory=list)
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _bytes: int = 0
    _in_shard: int = 0
    _writer: pq.ParquetWriter | None = None

    def add(self, study: Study, images: Sequence[EncodedImage], views: Sequence[str]) -> None:
        text = {
            "study_id": study.study_id,
            "patient_id": study.patient_id,
            "views": list(views),
            "findings": study.findings,
            "impression": study.impression,
            "report": study.report,
            "source": study.source,
            **study.extra,
        }
        self._rows.append(text | {"images": [{"bytes": image.data, "path": image.name} for image in images]})
        self.digest.update(json.dumps([text, [(image.name, len(image.data)) for image in images]]).encode())
        for image in images:
            self.digest.update(image.data)
        self.studies += 1
        self.images += len(images)
        self._in_shard += 1
        self._bytes += sum(len(image.data) for image in images)
        if self._in_shard == self.studies_per_shard:
            self._end_shard()
        elif len(self._rows) == _STUDIES_PER_ROW_GROUP or self._bytes >= _BYTES_PER_ROW_GROUP:
            self._end_row_group()

    def _end_row_group(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self.shards.append(self.folder / f"{self.split}-{len(self.shards):05d}.parquet")
            self._writer = pq.ParquetWriter(self.shards[-1], self.features.arrow_schema, use_dictionary=False)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.features.arrow_schema))
        self._rows, self._bytes = [], 0

    def _end_shard(self) -> None:
        self._end_row_group()
        if self._writer is not None:
            self._writer.close()
        self._writer, self._in_shard = None, 0

    def finish(self) -> dict[str, int]:
        """Names the shards `train-00000-of-00003.parquet` and returns the split's counts."""
        self._end_shard()
        for index, shard in enumerate(self.shards):
            shard.rename(self.folder / f"{self.split}-{index:05d}-of-{len(self.shards):05d}.parquet")
        return {"studies": self.studies, "images": self.images, "shards": len(self.shards)}

    def close(self) -> None:
        """Lets go of the open file; used when the directory is given up."""
        if self._writer is not None:
            self._writer.close()


class DatasetWriter:
    """Fills the directory of a dataset; made by `new_dataset`."""

    def __init__(
        self,
        folder: Path,
        studies_per_shard: int,
        columns: Mapping[str, Column] | None = None,
        about: str | None = None,
    ) -> None:
        self._folder, self._columns, self._about = folder, columns or {}, about
        (folder / "data").mkdir()
        kinds = {"text": Value("string"), "texts": List(Value("string"))}
        features = Features({**FEATURES, **{name: kinds[column.kind] for name, column in self._columns.items()}})
        self._splits = {split: _SplitWriter(folder / "data", split, studies_per_shard, features) for split in SPLITS}
        self.finished = False

    @property
    def studies(self) -> int:
        """Studies added so far."""
        return sum(split.studies for split in self._splits.values())

    def add(self, study: Study, images: Sequence[EncodedImage], views: Sequence[str]) -> None:
        """Appends a study to its split.

        Args:
            study: Text and ids; its own image paths and views are not looked at.
            images: The encoded views, at least one.
            views: Projection of each image.
        """
        self._splits[study.split].add(study, images, views)

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Closes the shards and writes manifest and card.

        Args:
            manifest: What the writer does not know; `splits`, `images` and `fingerprint` (of all rows) are added.

        Returns:
            The manifest as written.
        """
        counts = {split: writer.finish() for split, writer in self._splits.items() if writer.studies}
        digests = [f"{split} {writer.digest.hexdigest()}" for split, writer in self._splits.items()]
        manifest = manifest | {
            "splits": counts,
            "images": sum(count["images"] for count in counts.values()),
            "fingerprint": hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest(),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (self._folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        (self._folder / CARD).write_text(_card(manifest, self._columns, self._about), encoding="utf-8")
        self.finished = True
        return manifest

    def close(self) -> None:
        """Lets go of the files of a dataset that is given up."""
        for split in self._splits.values():
            with contextlib.suppress(OSError):  # a full disk, most often: the error that led here says so
                split.close()


@contextlib.contextmanager
def new_dataset(
    out: Path,
    *,
    studies_per_shard: int,
    overwrite: bool = False,
    protect: Path | None = None,
    columns: Mapping[str, Column] | None = None,
    about: str | None = None,
) -> Iterator[DatasetWriter]:
    """A dataset directory that stands at `out` when the block ends, whole; if the block fails, nothing has changed.

    Args:
        out: The directory to make.
        studies_per_shard: Studies in one Parquet file.
        overwrite: Replace a dataset directory that stands at `out`, once the new one is complete.
        protect: A path (the raw data) that must not lie inside a directory that is replaced.
        columns: Those beside `FEATURES`; every study's `extra` fills them.
        about: A paragraph for the dataset card; None: that the terms of the source apply.

    Yields:
        The writer, whose `finish` ends the block.

    Raises:
        UsageError: `out` is a file; a directory that is not empty, without `overwrite`; or one that `preprocess` did
            not write, which is never removed.
        RunError: The disk refuses (full, read-only, ...).
    """
    _check_target(out, overwrite, protect)
    try:
        with atomic_directory(out) as folder:
            writer = DatasetWriter(folder, studies_per_shard, columns, about)
            try:
                yield writer
            finally:
                writer.close()
            if not writer.finished:
                raise RuntimeError("new_dataset: the block ended without finish()")
    except OSError as error:  # pyarrow's own I/O errors are OSErrors too
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error


def _check_target(out: Path, overwrite: bool, protect: Path | None) -> None:
    target = out.resolve()
    if not target.exists():
        recover_directory(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{out} is a file", hint="OUT is the directory to write.")
    if protect is not None and protect.resolve().is_relative_to(target):
        raise UsageError(f"{out} holds the raw data", hint="Choose another directory for the dataset.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} exists and is not empty", hint="Choose another directory, or pass --overwrite.")
    if not (target / MANIFEST).is_file():
        raise UsageError(
            f"{out} was not written by `emrrg preprocess` (it has no {MANIFEST}), so --overwrite does not remove it",
            hint="Choose another directory, or remove this one yourself.",
        )


def _card(manifest: dict[str, Any], columns: Mapping[str, Column], about: str | None) -> str:
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
    shards = _shards(folder)
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


def _shards(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split, in order, all there."""
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
