"""The layouts of IU X-Ray: the Open-i release, the flat release, R2Gen's."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.image_paths import files_below
from emrrg_cli.imaging.views import view_name
from emrrg_cli.ingest.sources.image_paths import require_folder
from emrrg_cli.ingest.sources.openi import BadReport, OpeniReport, read_openi
from emrrg_cli.ingest.sources.table import CsvFile, whole_number
from emrrg_cli.ingest.sources.text_files import encoding_remarks

Layout = Literal["openi", "flat", "r2gen"]

ARCHIVES = ("NLMCXR_reports.tgz", "NLMCXR_reports.tar.gz", "NLMCXR_reports.tar")
REPORTS = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", "NLMCXR_reports")
REPORT_TABLE, VIEW_TABLE = "indiana_reports.csv", "indiana_projections.csv"
_IMAGES = ("NLMCXR_png", "images_normalized", "images/images_normalized", "images")
_IMAGE_ARCHIVE = "NLMCXR_png.tgz"

# Open-i writes CXR1000_IM-0003-1001.png (one study: CXR1_1_IM-0001-3001.png), the flat release
# 1000_IM-0003-1001.dcm.png (1_IM-0001-3001.dcm.png).
_OPENI_IMAGE = re.compile(r"CXR(\d+)_(?:\d+_)?(IM-.+)")

# A spreadsheet replaced three indications that begin with a sign by this.
_DAMAGED = "#NAME?"


@dataclass(frozen=True)
class Entry:
    """A report, the possible file names of each image, and the views."""

    report: OpeniReport
    images: tuple[tuple[str, ...], ...]
    views: tuple[str, ...]


@dataclass
class Collection:
    """The content of a layout: usable reports by study number, skipped items, and remarks."""

    entries: dict[str, Entry] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, entry: Entry, where: str) -> None:
        uid = entry.report.uid
        if uid in self.entries:
            self.skip("id seen before", f"CXR{uid}", where)
        else:
            self.entries[uid] = entry

    def skip(self, reason: str, study_id: str, detail: str = "") -> None:
        self.skipped.append({"reason": reason, "study_id": study_id, "detail": detail})

    def counted(self) -> str:
        """Returns the counts as a sentence."""
        reports = [entry.report for entry in self.entries.values()]
        findings, impression = sum(bool(r.findings) for r in reports), sum(bool(r.impression) for r in reports)
        neither = sum(not (r.findings or r.impression) for r in reports)
        return (
            f"{len(reports):,} reports: findings in {findings:,}, impression in {impression:,}, neither in "
            f"{neither:,}; {sum(len(r.images) for r in reports):,} images listed, none in "
            f"{sum(not r.images for r in reports):,} reports."
        )


def read_openi_layout(root: Path) -> Collection:
    """Reads the Open-i release.

    Raises:
        UsageError: There are no reports.
        RunError: The archive cannot be read or contains no report.
    """
    path = _reports(root) or root
    if path is root and not any(root.glob("*.xml")):
        raise UsageError(
            f"no reports of Open-i in {root}", hint=f"ROOT holds {ARCHIVES[0]} or its folder {REPORTS[0]}."
        )
    views: dict[str, str] = {}
    if (table := root / VIEW_TABLE).is_file():
        for _, cells in CsvFile(table, ("filename", "projection")):
            if cells is not None:
                views[cells[0]] = cells[1]
    read = Collection()
    for report in read_openi(path):
        if isinstance(report, BadReport):
            read.skip(report.reason, report.name, report.detail)
            continue
        names = tuple(_names(image) for image in report.images)
        seen = tuple(view_name(next((views[name] for name in known if name in views), "")) for known in names)
        read.add(Entry(report, names, seen), path.name)
    if not read.entries and not read.skipped:
        raise RunError(f"no XML reports in {path}")
    return read


def read_flat_layout(root: Path) -> Collection:
    """Reads the flat release.

    Raises:
        UsageError: A table does not exist.
        RunError: A table cannot be read.
    """
    for table in (REPORT_TABLE, VIEW_TABLE):
        if not (root / table).is_file():
            raise UsageError(f"no {table} in {root}", hint="The flat release has both tables.")
    read = Collection()
    images: defaultdict[str, dict[str, str]] = defaultdict(dict)
    views = CsvFile(root / VIEW_TABLE, ("uid", "filename", "projection"))
    for line, cells in views:
        if cells is None or (study := whole_number(cells[0])) is None or not cells[1]:
            read.skip("row of a table cannot be used", f"{VIEW_TABLE}:{line}", _row_problem(cells))
            continue
        images[str(study)].setdefault(cells[1], cells[2])
    sections = ("findings", "impression", "indication", "comparison", "MeSH")
    reports = CsvFile(root / REPORT_TABLE, ("uid", *sections))
    for line, cells in reports:
        where = f"{REPORT_TABLE}:{line}"
        if cells is None or (study := whole_number(cells[0])) is None:
            read.skip("row of a table cannot be used", where, _row_problem(cells))
            continue
        uid = str(study)
        findings, impression, indication, comparison, mesh = ("" if cell == _DAMAGED else cell for cell in cells[1:])
        terms = tuple(term for part in mesh.split(";") if (term := part.strip()))
        known = images.pop(uid, {})
        report = OpeniReport(uid, findings, impression, indication, comparison, terms, (), tuple(known))
        names = tuple(_names(name) for name in known)
        read.add(Entry(report, names, tuple(view_name(view) for view in known.values())), where)
    for uid, names_left in images.items():
        if uid not in read.entries:
            read.skip("report missing", f"CXR{uid}", f"{len(names_left)} images in {VIEW_TABLE}")
    for table_file in (views, reports):
        read.remarks += encoding_remarks(table_file.path, table_file.encoding)
    return read


def detect_layout(root: Path) -> Layout:
    """Detects the layout of a folder; if it has several, the first of `openi`, `flat`, `r2gen`.

    Raises:
        UsageError: It has none of them.
    """
    if not root.exists():
        raise UsageError(f"no such folder: {root}")
    if root.is_file() and root.suffix.lower() != ".json":
        raise UsageError(f"{root} is a file", hint="ROOT is the folder that holds it. Unpack a zip file first.")
    if _reports(root) is not None:
        return "openi"
    if (root / REPORT_TABLE).is_file():
        return "flat"
    if root.is_file() or (root / "annotation.json").is_file():
        return "r2gen"
    if any(root.glob("*.xml")):
        return "openi"
    raise UsageError(
        f"{root} does not have a known layout of IU X-Ray",
        hint=f"Open-i: {ARCHIVES[0]} or {REPORTS[0]}/; flat: {REPORT_TABLE}; R2Gen: annotation.json.",
    )


def _reports(root: Path) -> Path | None:
    archives = (root / name for name in ARCHIVES if (root / name).is_file())
    return next(archives, None) or next((root / name for name in REPORTS if any((root / name).glob("*.xml"))), None)


def find_image_folders(root: Path, images: Path | None) -> tuple[Path, ...]:
    """Returns the folders to look up images in: `images` and those below it, or the known folders in `root`.

    Raises:
        UsageError: The folder does not exist, or the images are still packed.
    """
    require_folder(root)
    if images is not None:
        if not images.is_dir():
            raise UsageError(f"no such folder of images: {images}")
        return _folders_of_images(images.resolve())
    known = [root.resolve() / name for name in _IMAGES if (root / name).is_dir()]
    if not known and (root / _IMAGE_ARCHIVE).is_file():
        archive, folder = shlex.quote(str(root / _IMAGE_ARCHIVE)), shlex.quote(str(root / _IMAGES[0]))
        raise UsageError(
            f"{root / _IMAGE_ARCHIVE} is still packed",
            hint=f"Unpack it: mkdir {folder} && tar xzf {archive} -C {folder}",
        )
    return (*known, root.resolve())


def _folders_of_images(images: Path) -> tuple[Path, ...]:
    """Returns the folder and all folders below it that contain files."""
    files = files_below(images, lambda error: None)
    return tuple(dict.fromkeys((images, *(file.parent for file in files))))


def _names(image: str) -> tuple[str, ...]:
    """Returns the possible file names of an image from its name in either release."""
    if match := _OPENI_IMAGE.fullmatch(image):
        return (f"{image}.png", f"{match[1]}_{match[2]}.dcm.png", f"{image}.jpg")
    stem = image.removesuffix(".png").removesuffix(".dcm")
    return (image, f"CXR{stem}.png", f"{stem}.png")


def _row_problem(cells: Iterable[str] | None) -> str:
    return "row and header differ in length" if cells is None else "no uid or file name"
