"""Groups files into studies by their DICOM header, their folder or a table."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from PIL.Image import Image

from emrrg_cli.console import counted, err, printable
from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.base import DICOM_SUFFIXES, NOT_AN_IMAGE, RASTER_SUFFIXES, ImageError, open_stream
from emrrg_cli.imaging.dicom.facts import DicomFacts, find_dicom_facts, study_name
from emrrg_cli.imaging.image_paths import find_images
from emrrg_cli.imaging.raster import open_header
from emrrg_cli.imaging.views import view_of_path
from emrrg_cli.vocabulary import CONTEXT_FIELDS, ContextField

StudyBy = Literal["auto", "folder", "file"]
_OWN_FILE = re.compile(r"(?:reports|skipped|page)[\w-]*\.(?:jsonl|csv|html|done)(?:\.partial)?$")
MOST_FILES = 8  # a folder with more of them is a collection, not a study


class Stored(Protocol):
    """An image that is not a separate file; its text is its name."""

    def content(self) -> bytes | Path | Image:
        """Returns the input of `read_image`."""


Film = Path | Stored


@dataclass(frozen=True, slots=True)
class StudyFiles:
    """The images of one study.

    Args:
        name: Study Instance UID, path of the folder or file, or the name in a table or dataset directory.
        files: the files, sorted by name.
        views: view of each file, from DICOM headers or names such as `view1_frontal.jpg`; "" if unknown.
        context: context from a table or DICOM headers; not cleaned yet.
    """

    name: str
    files: tuple[Film, ...]
    views: tuple[str, ...]
    context: Mapping[ContextField, str] = field(default_factory=dict)

    @classmethod
    def single(cls, file: Path) -> StudyFiles:
        """Makes a study of one image, named by its path."""
        return cls.of(path_name(file), [(file, find_dicom_facts(file))])

    @classmethod
    def of(
        cls,
        name: str,
        members: Iterable[tuple[Film, DicomFacts | None]],
        context: Mapping[ContextField, str] | None = None,
    ) -> StudyFiles:
        """Makes a study of files with their DICOM facts; values of a table take precedence over headers.

        Args:
            context: context from the table.
        """
        facts_of = dict(members)
        found: dict[ContextField, str] = {}
        for facts in filter(None, facts_of.values()):
            for field_name, text in (("indication", facts.indication), ("age", facts.age), ("sex", facts.sex)):
                if text:
                    found.setdefault(field_name, text)  # type: ignore[arg-type]
        views = tuple((facts.view if facts else "") or view_of_path(str(file)) for file, facts in facts_of.items())
        return cls(name, tuple(facts_of), views, found | dict(context or {}))

    @property
    def number(self) -> int:
        """A number that depends only on the name. It seeds sampling, so it is the same in every shard and order."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")


def find_studies(paths: Sequence[str], by: StudyBy = "auto", output: Path | None = None) -> list[StudyFiles]:
    """Finds studies in files, folders and glob patterns, in the order of their first files.

    Args:
        paths: paths and patterns of the user.
        by: `file`: each file is a study. `folder`: the files directly in a folder are one study. `auto`: DICOM files
            are grouped by `study_name`; other images in a subfolder of a named folder are one study if there are
            at most 8; any other file is a study. A file that is not an image is never grouped with others.
        output: folder of the reports; it is not searched. If it is a named folder, only its report files are skipped.

    Raises:
        UsageError: for a path that does not exist, or if there is no file.
    """
    named = [name for path in paths for name in _expanded(path)]
    files = find_images(named)
    roots = {Path(name) for name in named if Path(name).is_dir()}
    if output is not None and output.is_dir():
        files = _without_output(files, roots, output.absolute())
    if by == "file":
        return [StudyFiles.single(file) for file in files]
    groups: dict[str, list[tuple[Path, DicomFacts | None]]] = {}
    of_folder: dict[Path, list[Path]] = {}
    patients: dict[str, str] = {}
    for file in files:
        facts = find_dicom_facts(file)
        if study := study_name(facts, patients) if by == "auto" else "":
            groups.setdefault(study, []).append((file, facts))
        elif (by == "folder" or _is_below(file, roots)) and (facts or _may_be_image(file)):
            of_folder.setdefault(file.parent, []).append(file)
            groups.setdefault(path_name(file.parent), []).append((file, facts))
        else:
            groups.setdefault(path_name(file), []).append((file, facts))
    joined = [folder for folder, inside in of_folder.items() if by == "auto" and 1 < len(inside) <= MOST_FILES]
    if joined:
        err.print(
            f"{printable(str(joined[0]))}: its {len(of_folder[joined[0]])} images are one study, and so are those of "
            f"every subfolder with at most {MOST_FILES} images; --study-by file: a report for each image",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    large = {path_name(folder) for folder, inside in of_folder.items() if by == "auto" and len(inside) > MOST_FILES}
    studies: list[StudyFiles] = []
    for name, members in groups.items():
        if name in large:
            studies += [StudyFiles.single(file) for file, _ in members]
        else:
            studies.append(StudyFiles.of(name, members))
    return studies


def table_studies(table: Path, image_column: str = "image", study_column: str | None = None) -> list[StudyFiles]:
    """Reads the studies that the rows of a table list; paths are relative to the folder of the table.

    Columns named `indication`, `comparison`, `technique`, `age` and `sex` are the context of a study.

    Args:
        table: CSV, TSV or JSON lines.
        image_column: column with paths, as `listed_images` reads them.
        study_column: column by which rows are grouped into studies; None: each row is a study, and equal rows are one.

    Raises:
        UsageError: if the table or a column does not exist, or no row names an image.
        RunError: if the table cannot be read.
    """
    from emrrg_cli.ingest.sources.image_paths import listed_images, with_slashes
    from emrrg_cli.ingest.sources.table import cell_text, read_table

    rows = read_table(table)
    wanted = {"--image-column": image_column} | ({"--study-column": study_column} if study_column else {})
    rows.check_columns(wanted)
    groups: dict[str, list[Path]] = {}
    contexts: dict[str, dict[ContextField, str]] = {}
    ragged: list[int] = []
    folders = (table.parent,)
    for line, row in rows.rows():
        if row is None:
            ragged.append(line)
            continue
        paths = listed_images(row.get(image_column), folders)
        files = [table.parent / with_slashes(path, folders) for path in paths]
        if not files:
            continue
        stated = {field_name: cell_text(row.get(field_name)) for field_name in CONTEXT_FIELDS}
        context = {field_name: text for field_name, text in stated.items() if text}
        name = printable(cell_text(row.get(study_column))) if study_column else ""
        if not name:
            name = path_name(files[0])
            if name in groups and (groups[name], contexts[name]) == (files, context):
                continue
            name = f"{name} (row {line})" if name in groups else name
        groups.setdefault(name, []).extend(files)
        contexts[name] = context | contexts.get(name, {})
    if ragged:
        lines = ", ".join(map(str, ragged[:5])) + (", ..." if len(ragged) > 5 else "")
        err.print(
            f"{table}: {counted(len(ragged), 'row')} skipped, because row and header differ in length (line {lines})",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if not groups:
        raise UsageError(f"{table} names no images in its column {image_column!r}")
    found = []
    for name, files in groups.items():
        once: dict[str, Path] = {}  # a file may be listed in several spellings
        for file in files:
            once.setdefault(os.path.realpath(file), file)
        found.append(StudyFiles.of(name, [(file, find_dicom_facts(file)) for file in once.values()], contexts[name]))
    return found


def path_name(path: Film) -> str:
    """Converts a path (or a stored image) to text for JSON: bytes that are not UTF-8 become escapes."""
    name = str(path)
    # Returns the same object if possible, because there may be millions of paths.
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode("utf-8")


def _expanded(name: str) -> Iterable[str]:
    # Expands patterns that the shell did not expand, such as quoted ones.
    if not any(sign in name for sign in "*?[") or Path(name).exists():
        return [name]
    found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
    if not found:
        raise UsageError(f"{printable(name)}: no file matches this pattern")
    return found


def _without_output(files: Sequence[Path], roots: set[Path], output: Path) -> list[Path]:
    searched = {root.absolute() for root in roots}
    if searched & set(output.parents):
        found = [file for file in files if output not in file.absolute().parents]
    elif output in searched:
        found = [file for file in files if not (_OWN_FILE.match(file.name) and file.absolute().parent == output)]
    else:
        return list(files)
    if not found:
        raise UsageError(f"there are no images outside of the output {output}")
    return found


def _is_below(file: Path, roots: set[Path]) -> bool:
    return file.parent not in roots and any(root in file.parents for root in roots)


def _may_be_image(file: Path) -> bool:
    # Whether a file is an image by its name, even if it is broken, or by its first bytes.
    if file.suffix.lower() in (*RASTER_SUFFIXES, *DICOM_SUFFIXES):
        return True
    try:
        with open_stream(file, str(file)) as (stream, _):
            open_header(stream, str(file))
    except ImageError as error:
        return error.reason != NOT_AN_IMAGE
    return True
