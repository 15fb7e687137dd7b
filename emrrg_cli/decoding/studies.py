"""Which images belong together: files into studies, by their DICOM header, their folder or a table."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL.Image import Image

from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.base import DICOM_SUFFIXES, ImageError, is_dicom, open_stream
from emrrg_cli.imaging.dicom.facts import read_dicom_facts
from emrrg_cli.imaging.image_paths import find_images

StudyBy = Literal["auto", "folder", "file"]
MOST_FILES = 8  # a folder with more of them is a collection, not a study


class Stored(Protocol):
    """An image that is no file of its own; its text is its name."""

    def content(self) -> bytes | Path | Image:
        """What `read_image` reads."""


Film = Path | Stored


@dataclass(frozen=True, slots=True)
class StudyFiles:
    """The images of one study.

    Args:
        name: Study Instance UID, path of the folder or file, or what a table or dataset directory calls it.
        files: in the order of their names.
        views: of each file, as DICOM headers say; "" where it is not known.
    """

    name: str
    files: tuple[Film, ...]
    views: tuple[str, ...]

    @classmethod
    def single(cls, file: Path, view: str = "") -> StudyFiles:
        """A study of one image, named by its path."""
        return cls(path_name(file), (file,), (view,))

    @property
    def number(self) -> int:
        """A number that depends on the name alone, by which sampling draws: the same in every shard and order."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")


def find_studies(paths: Sequence[str], by: StudyBy = "auto") -> list[StudyFiles]:
    """Studies in files, folders and glob patterns, in the order in which their first files are found.

    Args:
        paths: as a user names them.
        by: `file`: each file is a study. `folder`: the files directly in a folder are one. `auto`: DICOM files by
            their Study Instance UID; other files in a subfolder of a named folder are one study where there are at
            most 8 of them; any other file is a study of its own.

    Raises:
        UsageError: for a path that does not exist, or when there is no file at all.
    """
    named = [name for path in paths for name in _expanded(path)]
    files = find_images(named)
    if by == "file":
        return [StudyFiles.single(file) for file in files]
    roots = {Path(name) for name in named if Path(name).is_dir()}
    groups: dict[str, list[tuple[Path, str]]] = {}
    of_folder: dict[Path, list[Path]] = {}
    for file in files:
        uid, view = _header(file) if by == "auto" else (None, "")
        if uid is not None:
            groups.setdefault(uid, []).append((file, view))
        elif by == "folder" or _is_below(file, roots):
            of_folder.setdefault(file.parent, []).append(file)
            groups.setdefault(path_name(file.parent), []).append((file, ""))
        else:
            groups.setdefault(path_name(file), []).append((file, ""))
    large = {path_name(folder) for folder, inside in of_folder.items() if by == "auto" and len(inside) > MOST_FILES}
    studies: list[StudyFiles] = []
    for name, members in groups.items():
        if name in large:
            studies += [StudyFiles.single(file) for file, _ in members]
        else:
            chosen, views = zip(*members, strict=True)
            studies.append(StudyFiles(name, chosen, views))
    return studies


def table_studies(table: Path, image_column: str = "image", study_column: str | None = None) -> list[StudyFiles]:
    """Studies as the rows of a table list them; paths are relative to the folder of the table.

    Args:
        table: CSV, TSV or JSON lines.
        image_column: paths, several of them divided by `|` or as a JSON list.
        study_column: rows of the same study belong together; None: each row is a study.

    Raises:
        UsageError: for a table or a column that is not there, or when no row names an image.
        RunError: when the table cannot be read.
    """
    from emrrg_cli.ingest.sources.table import cell_list, cell_text, read_table

    rows = read_table(table)
    wanted = {"--image-column": image_column} | ({"--study-column": study_column} if study_column else {})
    rows.check_columns(wanted)
    groups: dict[str, list[Path]] = {}
    for _, row in rows.rows():
        files = [table.parent / path for path in cell_list((row or {}).get(image_column))]
        name = cell_text((row or {}).get(study_column)) if study_column else None
        if files:
            groups.setdefault(printable(name) if name else path_name(files[0]), []).extend(files)
    if not groups:
        raise UsageError(f"{table} names no images in its column {image_column!r}")
    return [
        StudyFiles(name, tuple(dict.fromkeys(files)), ("",) * len(dict.fromkeys(files)))
        for name, files in groups.items()
    ]


def path_name(path: Film) -> str:
    """A path (or a stored image) as text that fits into a JSON file: bytes that are no UTF-8 are written as escapes."""
    name = str(path)
    # The same object where it can be: there may be millions of them.
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode("utf-8")


def _expanded(name: str) -> Iterable[str]:
    # Patterns that the shell left as they are, such as quoted ones.
    if not any(sign in name for sign in "*?[") or Path(name).exists():
        return [name]
    found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
    if not found:
        raise UsageError(f"{printable(name)}: no file matches this pattern")
    return found


def _is_below(file: Path, roots: set[Path]) -> bool:
    return file.parent not in roots and any(root in file.parents for root in roots)


def _header(file: Path) -> tuple[str | None, str]:
    # Study Instance UID and view of a DICOM file; a file that cannot be read says why when it is decoded.
    try:
        with open_stream(file, str(file)) as (stream, _):
            candidate = is_dicom(stream) or file.suffix.lower() in DICOM_SUFFIXES
        facts = read_dicom_facts(file) if candidate else None
    except ImageError:
        facts = None
    if facts is None:
        return None, ""
    return (printable(facts.study_uid) or None), facts.view
