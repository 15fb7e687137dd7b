"""IU X-Ray (the Indiana University collection of Open-i), in each of the three forms in which people have it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emrrg_cli.data.report_text import ReportSection
from emrrg_cli.data.sources.annotation import Annotation
from emrrg_cli.data.sources.locate import find_image
from emrrg_cli.data.sources.openi import BadReport, OpeniReport, read_openi
from emrrg_cli.data.sources.r2gen import IU_ID, R2GenSource
from emrrg_cli.data.sources.splits import draw_splits, drawn_remark
from emrrg_cli.data.sources.table import CsvFile
from emrrg_cli.data.sources.texts import lacks_text
from emrrg_cli.data.sources.views import view_name
from emrrg_cli.data.study import SPLITS, Account, Column, ImageProblem, Split, Study
from emrrg_cli.errors import RunError, UsageError

NAME = "iu_xray"
Layout = Literal["openi", "flat", "r2gen"]

ARCHIVES = ("NLMCXR_reports.tgz", "NLMCXR_reports.tar.gz", "NLMCXR_reports.tar")
REPORTS = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", "NLMCXR_reports")
REPORT_TABLE, VIEW_TABLE = "indiana_reports.csv", "indiana_projections.csv"
_IMAGES = ("NLMCXR_png", "images_normalized", "images/images_normalized", "images")
_IMAGE_ARCHIVE = "NLMCXR_png.tgz"

# Open-i writes CXR1000_IM-0003-1001.png (one study: CXR1_1_IM-0001-3001.png), the flat release
# 1000_IM-0003-1001.dcm.png (1_IM-0001-3001.dcm.png).
_OPENI_IMAGE = re.compile(r"CXR(\d+)_(?:\d+_)?(IM-.+)")

# A spreadsheet made this of three indications that begin with a sign.
_DAMAGED = "#NAME?"

_COLUMNS = {
    "labels": Column("texts", "headings of the MeSH terms that people gave; `normal` where nothing was found"),
    "mesh": Column("texts", "those terms whole, with place and degree: `Opacity/lung/upper lobe/right`"),
    "mesh_automatic": Column("texts", "MeSH terms that a program found; not in the flat release"),
    "indication": Column("text", "section of the report"),
    "comparison": Column("text", "section of the report"),
}
_ABOUT = (
    "Chest X-rays and reports of the Indiana University collection of Open-i (Demner-Fushman et al., JAMIA 2016), "
    "CC BY-NC-ND 4.0. De-identification left XXXX in place of words. Each patient has one study."
)


@dataclass(frozen=True)
class _Entry:
    """A report with the names its images may have, and their views."""

    report: OpeniReport
    images: tuple[tuple[str, ...], ...]
    views: tuple[str, ...]


@dataclass
class _Read:
    """What a layout holds."""

    entries: dict[str, _Entry] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, entry: _Entry, where: str) -> None:
        uid = entry.report.uid
        if uid in self.entries:
            self.skip("id seen before", f"CXR{uid}", where)
        else:
            self.entries[uid] = entry

    def skip(self, reason: str, study_id: str, detail: str = "") -> None:
        self.skipped.append({"reason": reason, "study_id": study_id, "detail": detail})


class IuXraySource:
    """IU X-Ray as Open-i ships it (`openi`) or in its flat form (`flat`); ids are `CXR` and the number of the study.

    openi: `NLMCXR_reports.tgz`, read in place, or its folder `ecgen-radiology`. Views are unknown, unless
    `indiana_projections.csv` stands beside. flat: `indiana_reports.csv` and `indiana_projections.csv`. Images are
    looked up under the names of either release.

    `report` is the findings section, as in R2Gen. Each patient has one study, whose number is the `patient_id`.

    Args:
        root: Folder of the reports.
        section: What the report will be; `report`: the findings, and a study without them is left out.
        layout: Of the two; None: `openi` where its reports are there.
        images: Folder of the images; None: `NLMCXR_png`, `images_normalized` or `images` in `root`, or `root`.
        annotation: R2Gen's file, whose ids say which studies are read and into which split they go; None: all, in a
            split that is drawn.
        fractions: Parts of train, validation and test in a drawn split.
        seed: Of that draw, among the studies with images: the same for both layouts.
        limit: First studies of each split that are read; None: all.

    Raises:
        UsageError: A folder or file is not there.
        RunError: A file cannot be read, or is not what it should be.
    """

    name = NAME
    columns = _COLUMNS
    about = _ABOUT

    def __init__(
        self,
        root: Path,
        *,
        section: ReportSection = "report",
        layout: Layout | None = None,
        images: Path | None = None,
        annotation: Path | None = None,
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        layout = layout or detect_layout(root)
        self.image_folders = _image_folders(root, images)
        self.root = (images or root).resolve()
        self.remarks: list[str] = []
        self._section = section
        read = self._read_openi(root) if layout == "openi" else self._read_flat(root)
        self._count(read)
        splits = self._published(annotation, read) if annotation else self._drawn(read.entries, fractions, seed)
        by_split: dict[Split, list[_Entry]] = {split: [] for split in SPLITS}
        for uid in sorted(splits, key=int):
            by_split[splits[uid]].append(read.entries[uid])
        self._entries = [(split, entry) for split in SPLITS for entry in by_split[split][:limit]]
        self._skipped = read.skipped

    def __len__(self) -> int:
        return len(self._entries) + len(self._skipped)

    def studies(self, account: Account) -> Iterator[Study]:
        """Yields train, validation, test, each by the number of the study.

        Left out and counted in `account`: reports that cannot be read or are empty, and, with an annotation, studies
        that it does not name. Missing images travel with their study as problems.
        """
        account.remarks += self.remarks
        for row in self._skipped:
            account.read += 1
            account.skip_study(**row)
        for split, entry in self._entries:
            account.read += 1
            study = self._study(split, entry)
            if problem := lacks_text(study, self._section):
                account.skip_study(problem, study.study_id)
            else:
                yield study

    def _study(self, split: Split, entry: _Entry) -> Study:
        report = entry.report
        found = [find_image(names, self.root, self.image_folders) for names in entry.images]
        images = [(image, view) for image, view in zip(found, entry.views, strict=True) if isinstance(image, Path)]
        return Study(
            study_id=f"CXR{report.uid}",
            patient_id=report.uid,
            split=split,
            image_paths=tuple(image for image, _ in images),
            views=tuple(view for _, view in images),
            findings=report.findings or None,
            impression=report.impression or None,
            report=report.findings or None,
            source=self.name,
            problems=tuple(image for image in found if isinstance(image, ImageProblem)),
            extra={
                "labels": list(dict.fromkeys(term.partition("/")[0] for term in report.mesh)),
                "mesh": list(report.mesh),
                "mesh_automatic": list(report.mesh_automatic),
                "indication": report.indication or None,
                "comparison": report.comparison or None,
            },
        )

    # Reading.

    def _read_openi(self, root: Path) -> _Read:
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
        read = _Read()
        for report in read_openi(path):
            if isinstance(report, BadReport):
                read.skip(report.reason, report.name, report.detail)
                continue
            names = tuple(_names(image) for image in report.images)
            seen = tuple(view_name(next((views[name] for name in known if name in views), "")) for known in names)
            read.add(_Entry(report, names, seen), path.name)
        if not read.entries and not read.skipped:
            raise RunError(f"no XML reports in {path}")
        return read

    def _read_flat(self, root: Path) -> _Read:
        for table in (REPORT_TABLE, VIEW_TABLE):
            if not (root / table).is_file():
                raise UsageError(f"no {table} in {root}", hint="The flat release has both tables.")
        read = _Read()
        images: defaultdict[str, dict[str, str]] = defaultdict(dict)
        views = CsvFile(root / VIEW_TABLE, ("uid", "filename", "projection"))
        for line, cells in views:
            if cells is None or not cells[0].isdecimal() or not cells[1]:
                read.skip("row of a table cannot be used", f"{VIEW_TABLE}:{line}", _row_problem(cells))
                continue
            images[cells[0]].setdefault(cells[1], cells[2])
        sections = ("findings", "impression", "indication", "comparison", "MeSH")
        reports = CsvFile(root / REPORT_TABLE, ("uid", *sections))
        for line, cells in reports:
            where = f"{REPORT_TABLE}:{line}"
            if cells is None or not cells[0].isdecimal():
                read.skip("row of a table cannot be used", where, _row_problem(cells))
                continue
            uid, findings, impression, indication, comparison, mesh = (
                "" if cell == _DAMAGED else cell for cell in cells
            )
            terms = tuple(term for part in mesh.split(";") if (term := part.strip()))
            known = images.pop(uid, {})
            report = OpeniReport(uid, findings, impression, indication, comparison, terms, (), tuple(known))
            names = tuple(_names(name) for name in known)
            read.add(_Entry(report, names, tuple(view_name(view) for view in known.values())), where)
        for uid, names_left in images.items():
            if uid not in read.entries:
                read.skip("report missing", f"CXR{uid}", f"{len(names_left)} images in {VIEW_TABLE}")
        for table_file in (views, reports):
            if table_file.encoding == "cp1252":
                self.remarks.append(f"{table_file.path.name} is not UTF-8: it was read as Windows-1252.")
        return read

    def _count(self, read: _Read) -> None:
        reports = [entry.report for entry in read.entries.values()]
        findings, impression = sum(bool(r.findings) for r in reports), sum(bool(r.impression) for r in reports)
        neither = sum(not (r.findings or r.impression) for r in reports)
        self.remarks.append(
            f"{len(reports):,} reports: findings in {findings:,}, impression in {impression:,}, neither in "
            f"{neither:,}; {sum(len(r.images) for r in reports):,} images listed, none in "
            f"{sum(not r.images for r in reports):,} reports."
        )

    # Splits.

    def _drawn(self, entries: dict[str, _Entry], fractions: Sequence[float], seed: int) -> dict[str, Split]:
        with_images = [uid for uid, entry in entries.items() if entry.images]
        splits = draw_splits(with_images, fractions, seed)
        self.remarks.append(drawn_remark(fractions, seed))
        # The others cannot be written; they are counted under the first split.
        return {uid: splits.get(uid, "train") for uid in entries}

    def _published(self, annotation: Path, read: _Read) -> dict[str, Split]:
        splits: dict[str, Split] = {}
        for row in Annotation(annotation):
            match = IU_ID.fullmatch(row.study_id)
            if match is None:
                raise RunError(
                    f"{annotation}: id {row.study_id!r} is none of IU X-Ray",
                    hint="R2Gen's ids look like CXR2384_IM-0942.",
                )
            if splits.setdefault(match[1], row.split) != row.split:
                raise RunError(
                    f"{annotation}: study CXR{match[1]} is in two splits, {splits[match[1]]} and {row.split}"
                )
        for uid in sorted(splits.keys() - read.entries.keys(), key=int):
            read.skip("report missing", f"CXR{uid}", f"named in {annotation.name}")
        for uid in sorted(read.entries.keys() - splits.keys(), key=int):
            read.skip("not in the annotation", f"CXR{uid}")
        self.remarks.append(f"Split by the ids of {annotation.name}.")
        return {uid: split for uid, split in splits.items() if uid in read.entries}


def iu_xray_source(
    root: Path,
    *,
    section: ReportSection = "report",
    layout: Layout | None = None,
    images: Path | None = None,
    annotation: Path | None = None,
    fractions: Sequence[float] | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> IuXraySource | R2GenSource:
    """The source for the layout that `root` holds; see `IuXraySource`.

    In R2Gen's layout the reports are findings: those of its 2,955 studies equal the findings of Open-i's XML.

    Raises:
        UsageError: As `IuXraySource`, or an option does not fit R2Gen's layout.
        RunError: As `IuXraySource`.
    """
    layout = layout or detect_layout(root)
    if layout == "r2gen":
        for option, value in (("--annotation", annotation), ("--images", images), ("--split", fractions)):
            if value is not None:
                raise UsageError(f"{option} does not go with R2Gen's layout, whose annotation.json says it all")
        return R2GenSource(root, source=NAME, findings=True, limit=limit)
    if annotation is not None and fractions is not None:
        raise UsageError("--annotation and --split exclude each other")
    return IuXraySource(
        root, section=section, layout=layout, images=images, annotation=annotation,
        fractions=fractions or (0.8, 0.1, 0.1), seed=seed, limit=limit,
    )  # fmt: skip


def detect_layout(root: Path) -> Layout:
    """The layout of a folder; where it holds several, the first of `openi`, `flat`, `r2gen`.

    Raises:
        UsageError: It holds none.
    """
    if not root.exists():
        raise UsageError(f"no such folder: {root}")
    if root.is_file() and root.suffix.lower() != ".json":
        raise UsageError(f"{root} is a file", hint="ROOT is the folder that holds it.")
    if _reports(root) is not None:
        return "openi"
    if (root / REPORT_TABLE).is_file():
        return "flat"
    if root.is_file() or (root / "annotation.json").is_file():
        return "r2gen"
    if any(root.glob("*.xml")):
        return "openi"
    raise UsageError(
        f"{root} holds IU X-Ray in no known layout",
        hint=f"Open-i: {ARCHIVES[0]} or {REPORTS[0]}/; flat: {REPORT_TABLE}; R2Gen: annotation.json.",
    )


def _reports(root: Path) -> Path | None:
    archives = (root / name for name in ARCHIVES if (root / name).is_file())
    return next(archives, None) or next((root / name for name in REPORTS if any((root / name).glob("*.xml"))), None)


def _image_folders(root: Path, images: Path | None) -> tuple[Path, ...]:
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder" if root.exists() else f"no such folder: {root}")
    if images is not None:
        if not images.is_dir():
            raise UsageError(f"no such folder of images: {images}")
        return (images.resolve(),)
    known = [root.resolve() / name for name in _IMAGES if (root / name).is_dir()]
    if not known and (root / _IMAGE_ARCHIVE).is_file():
        raise UsageError(
            f"{root / _IMAGE_ARCHIVE} is still packed",
            hint=f"Unpack it: mkdir {root / _IMAGES[0]} && tar xzf {root / _IMAGE_ARCHIVE} -C {root / _IMAGES[0]}",
        )
    return (*known, root.resolve())


def _names(image: str) -> tuple[str, ...]:
    """File names an image may have, given its name in either release."""
    if match := _OPENI_IMAGE.fullmatch(image):
        return (f"{image}.png", f"{match[1]}_{match[2]}.dcm.png", f"{image}.jpg")
    stem = image.removesuffix(".png").removesuffix(".dcm")
    return (image, f"CXR{stem}.png")


def _row_problem(cells: Iterable[str] | None) -> str:
    return "another length than the header" if cells is None else "no uid or file name"
