"""Reads IU X-Ray (the Indiana University collection of Open-i) in each of its three layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.directory import Column
from emrrg_cli.datasets.splits import draw_splits, drawn_remark
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources.annotation import UNREADABLE, Annotation
from emrrg_cli.ingest.sources.image_paths import find_image, split_found
from emrrg_cli.ingest.sources.iu_layouts import (
    Collection,
    Entry,
    Layout,
    detect_layout,
    find_image_folders,
    read_flat_layout,
    read_openi_layout,
)
from emrrg_cli.ingest.sources.openi import OpeniReport
from emrrg_cli.ingest.sources.r2gen import IU_ID, R2GenSource
from emrrg_cli.ingest.sources.texts import with_text
from emrrg_cli.ingest.study import ImportLog, Study
from emrrg_cli.vocabulary import SPLITS, UNKNOWN_VIEW, Section, Split

NAME = "iu_xray"

_COLUMNS = {
    "labels": Column("texts", "headings of the manual MeSH terms; `normal` if nothing was found"),
    "mesh": Column("texts", "complete manual MeSH terms with location and degree: `Opacity/lung/upper lobe/right`"),
    "mesh_automatic": Column("texts", "automatic MeSH terms; not in the flat release"),
    "indication": Column("text", "section of the report"),
    "comparison": Column("text", "section of the report"),
}
_ABOUT = (
    "Chest X-rays and reports of the Indiana University collection of Open-i (Demner-Fushman et al., JAMIA 2016), "
    "CC BY-NC-ND 4.0. De-identification replaced words by XXXX. Each patient has one study."
)


class IuXraySource:
    """IU X-Ray in the Open-i layout (`openi`) or the flat layout (`flat`); ids are `CXR` and the study number.

    openi: `NLMCXR_reports.tgz`, read without unpacking, or its folder `ecgen-radiology`. Views are unknown unless
    `indiana_projections.csv` is in the same folder. flat: `indiana_reports.csv` and `indiana_projections.csv`. Images
    are looked up under the names of both releases.

    `report` is the findings section, as in R2Gen. Each patient has one study, whose number is the `patient_id`.

    Args:
        root: Folder of the reports.
        section: Section that becomes the report; `report`: the findings, and studies without findings are skipped.
        layout: `openi` or `flat`; None: `detect_layout` chooses.
        images: Folder of the images; None: `NLMCXR_png`, `images_normalized` or `images` in `root`, or `root`.
        annotation: R2Gen's file, whose ids select the studies and their splits; None: all studies in a random split.
        fractions: Fractions of train, validation and test in a random split.
        seed: Random seed of the split. Only studies with images are drawn, so both layouts get the same split.
        limit: Number of studies to read from the start of each split; None: all.

    Raises:
        UsageError: A folder or file does not exist.
        RunError: A file cannot be read or has the wrong format.
    """

    name = NAME
    columns = _COLUMNS
    about = _ABOUT

    def __init__(
        self,
        root: Path,
        *,
        section: Section = "report",
        layout: Layout | None = None,
        images: Path | None = None,
        annotation: Path | None = None,
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        layout = layout or detect_layout(root)
        self.image_folders = find_image_folders(root, images)
        self.root = (images or root).resolve()
        self._section = section
        read = read_openi_layout(root) if layout == "openi" else read_flat_layout(root)
        self.remarks = [*read.remarks, read.counted()]
        splits = self._published(annotation, read) if annotation else self._drawn(read.entries, fractions, seed)
        by_split: dict[Split, list[Entry]] = {split: [] for split in SPLITS}
        for uid in sorted(splits, key=int):
            by_split[splits[uid]].append(read.entries[uid])
        self._entries = [(split, entry) for split in SPLITS for entry in by_split[split][:limit]]
        self._skipped = read.skipped

    def __len__(self) -> int:
        return len(self._entries) + len(self._skipped)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields the studies of train, validation and test, each by study number.

        Reports that cannot be read or are empty, and studies that the annotation does not name, are skipped and
        counted in `log`. Missing images are listed in `Study.problems`.
        """
        log.remarks += self.remarks
        for row in self._skipped:
            log.read += 1
            log.skip_study(**row)
        yield from with_text(self._listed(log), self._section, log)

    def _listed(self, log: ImportLog) -> Iterator[Study]:
        for split, entry in self._entries:
            log.read += 1
            yield self._study(split, entry)

    def _study(self, split: Split, entry: Entry) -> Study:
        report = entry.report
        images, views, problems = split_found(
            (find_image(names, self.root, self.image_folders), view)
            for names, view in zip(entry.images, entry.views, strict=True)
        )
        return Study(
            study_id=f"CXR{report.uid}",
            patient_id=report.uid,
            split=split,
            image_paths=images,
            views=views,
            findings=report.findings or None,
            impression=report.impression or None,
            report=report.findings or None,
            source=self.name,
            problems=problems,
            extra=_extra(report),
        )

    # Splits.

    def _drawn(self, entries: dict[str, Entry], fractions: Sequence[float], seed: int) -> dict[str, Split]:
        with_images = [uid for uid, entry in entries.items() if entry.images]
        splits = draw_splits(with_images, fractions, seed)
        self.remarks.append(drawn_remark(fractions, seed))
        # Studies without images cannot be written; they are counted under train.
        return {uid: splits.get(uid, "train") for uid in entries}

    def _published(self, annotation: Path, read: Collection) -> dict[str, Split]:
        splits: dict[str, Split] = {}
        rows = Annotation(annotation)
        for place, problem in rows.skipped:
            read.skip(UNREADABLE, place, f"{annotation.name}: {problem}")
        for row in rows:
            match = IU_ID.fullmatch(row.study_id)
            if match is None:
                raise RunError(
                    f"{annotation}: id {row.study_id!r} is not an id of IU X-Ray",
                    hint="R2Gen's ids look like CXR2384_IM-0942, those of Open-i like CXR2384.",
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


def _extra(report: OpeniReport | None) -> dict[str, Any]:
    if report is None:
        return {name: [] if column.kind == "texts" else None for name, column in _COLUMNS.items()}
    return {
        "labels": list(dict.fromkeys(term.partition("/")[0] for term in report.mesh)),
        "mesh": list(report.mesh),
        "mesh_automatic": list(report.mesh_automatic),
        "indication": report.indication or None,
        "comparison": report.comparison or None,
    }


class R2GenWithReports:
    """R2Gen's studies of IU X-Ray, extended from the reports of Open-i or of the flat release.

    Adds impression, indication, comparison and MeSH terms. If `indiana_projections.csv` is next to Open-i's reports, it
    also adds views: R2Gen's image `k` is image `k` in the XML. The flat release lists images in another order.

    Args:
        studies: R2Gen's studies.
        reports: `NLMCXR_reports.tgz`, or a folder with it or with the tables of the flat release.

    Raises:
        UsageError: There are no reports, or the studies are not in R2Gen's layout.
        RunError: The reports cannot be read.
    """

    name = NAME
    columns = _COLUMNS
    about = _ABOUT

    def __init__(self, studies: IuXraySource | R2GenSource, reports: Path) -> None:
        if not isinstance(studies, R2GenSource):
            raise UsageError("--reports works only with R2Gen's layout; the other layouts have reports in ROOT")
        self._studies = studies
        self.root, self.image_folders = studies.root, studies.image_folders
        if not reports.exists():
            raise UsageError(f"--reports: no such file or folder: {reports}")
        folder = reports.parent if reports.is_file() else reports
        self._in_order = detect_layout(folder) != "flat"
        self._entries = (read_openi_layout(folder) if self._in_order else read_flat_layout(folder)).entries

    def __len__(self) -> int:
        return len(self._studies)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        """Yields R2Gen's studies with the additions; a remark counts studies without a report."""
        missing = 0
        for study in self._studies.studies(log):
            entry = self._entries.get(study.patient_id or "")
            missing += entry is None
            yield replace(
                study,
                impression=(entry.report.impression if entry else "") or None,
                views=tuple(_view(entry if self._in_order else None, path) for path in study.image_paths),
                extra=_extra(entry.report if entry else None),
            )
        if missing:
            log.remarks.append(f"Studies that --reports does not have, so without context and labels: {missing:,}.")


def _view(entry: Entry | None, image: Path) -> str:
    known = entry is not None and image.stem.isdecimal() and int(image.stem) < len(entry.views)
    return entry.views[int(image.stem)] if entry and known else UNKNOWN_VIEW


def iu_xray_source(
    root: Path,
    *,
    section: Section = "report",
    layout: Layout | None = None,
    images: Path | None = None,
    annotation: Path | None = None,
    fractions: Sequence[float] | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> IuXraySource | R2GenSource:
    """Returns the source for the layout of `root`; see `IuXraySource`.

    In R2Gen's layout the reports are findings: all 2,955 studies have the findings of Open-i's XML. `R2GenWithReports`
    adds the other content of the XML.

    Raises:
        UsageError: As `IuXraySource`, or an option cannot be used with R2Gen's layout.
        RunError: As `IuXraySource`.
    """
    layout = layout or detect_layout(root)
    if layout == "r2gen":
        for option, value in (("--annotation", annotation), ("--images", images), ("--split", fractions)):
            if value is not None:
                raise UsageError(f"{option} cannot be used with R2Gen's layout: annotation.json defines it")
        return R2GenSource(root, source=NAME, findings=True, limit=limit)
    if annotation is not None and fractions is not None:
        raise UsageError("--annotation and --split cannot be used together")
    return IuXraySource(
        root, section=section, layout=layout, images=images, annotation=annotation,
        fractions=fractions or (0.8, 0.1, 0.1), seed=seed, limit=limit,
    )  # fmt: skip
