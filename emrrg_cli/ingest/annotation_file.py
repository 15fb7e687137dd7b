"""Exports a dataset directory as R2Gen's annotation file, with the images in a folder beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.output_paths import check_writable
from emrrg_cli.files.write_errors import reason, space_hint
from emrrg_cli.vocabulary import SPLITS, Split

_KEYS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_ENDINGS = {b"\xff\xd8": "jpg", b"\x89P": "png"}


def check_annotation(path: Path, *, out: Path, raw: Path | None, overwrite: bool) -> None:
    """Checks that an annotation file can be exported to `path`.

    Args:
        path: The file to write; images go to `images/` beside it.
        out: The dataset directory that is made in the same run.
        raw: The raw data; None: there are none.
        overwrite: Whether an existing annotation file and its images may be replaced.

    Raises:
        UsageError: `path` is a directory or inside `out`; it exists, and `overwrite` is false or it is in the folder of
            the raw data; or there is already an `images` folder beside it.
        RunError: Its folder is read-only.
    """
    hint = "Name a file in a folder of its own, such as r2gen/annotation.json."
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint=hint)
    folder = path.parent.resolve()
    if folder.is_relative_to(out.resolve()):
        raise UsageError(f"{path} is inside {out}, which is replaced as a whole", hint=hint)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", hint="Name another file, or pass --overwrite.")
    if path.exists() and raw is not None and (raw.resolve() in folder.parents or raw.resolve().is_relative_to(folder)):
        raise UsageError(f"{path} is in the folder of the raw data, so --overwrite does not replace it", hint=hint)
    images = path.parent / "images"
    if not path.exists() and images.exists() and (not images.is_dir() or any(images.iterdir())):
        raise UsageError(
            f"{images} exists: the images of {path.name} would be mixed with others",
            hint=hint,
        )
    check_writable(path.parent)


def export_annotation(dataset: Path, path: Path) -> None:
    """Writes `{"train": [...], "val": [...], "test": [...]}` and the images it names, in R2Gen's layout.

    A row has `id`, `report` (raw; "" if there is none), `image_path` (below `images/`: `<id>/0.jpg`, ...), `split` and,
    if the patient is known, `subject_id`. The file is written after all images. `emrrg preprocess r2gen` reads it back.

    Args:
        dataset: A dataset directory.
        path: The file to write.

    Raises:
        RunError: A file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        growing = path.with_name(f".{path.name}.growing")
        with growing.open("w", encoding="utf-8") as file:
            for split in SPLITS:
                file.write("{" if split == "train" else ",\n")
                file.write(f'"{_KEYS[split]}": [')
                for number, row in enumerate(_rows(dataset, split)):
                    file.write(",\n" if number else "\n")
                    file.write(json.dumps(_exported(row, split, path.parent / "images"), ensure_ascii=False))
                file.write("]")
            file.write("}\n")
            file.flush()
            os.fsync(file.fileno())
        growing.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or path}: {reason(error)}", hint=space_hint(error, path)
        ) from error


def _rows(dataset: Path, split: Split) -> Iterator[dict[str, Any]]:
    for shard in sorted((dataset / "data").glob(f"{split}-*-of-*.parquet")):
        with pq.ParquetFile(shard) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).to_pylist()


def _exported(row: dict[str, Any], split: Split, images: Path) -> dict[str, Any]:
    name = _file_name(row["study_id"])
    paths = []
    for number, image in enumerate(row["images"]):
        path = f"{name}/{number}.{_ENDINGS[image['bytes'][:2]]}"
        paths.append(path)
        target = images / path
        if not target.is_file() or target.read_bytes() != image["bytes"]:
            target.parent.mkdir(parents=True, exist_ok=True)
            growing = target.with_name(f".{target.name}.growing")
            growing.write_bytes(image["bytes"])
            growing.replace(target)
    patient = {} if row["patient_id"] is None else {"subject_id": row["patient_id"]}
    return {
        "id": row["study_id"],
        "report": row["report"] or "",
        "image_path": paths,
        "split": _KEYS[split],
        **patient,
    }


def _file_name(study_id: str) -> str:
    """Returns the id itself if every file system accepts it, or else a shortened id with a hash."""
    if _PLAIN.fullmatch(study_id):
        return study_id
    digest = hashlib.blake2b(study_id.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{quote(study_id, safe='', errors='replace').replace('%', '_').replace('.', '_')[:80]}-{digest}"
