"""Data sets as they are shipped, written from the public descriptions of their formats, with invented reports."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from emrrg_cli.ingest.study import ImportLog, Study, StudySource

Read = Callable[[StudySource], tuple[list[Study], ImportLog]]

LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip


@pytest.fixture(scope="session")
def read() -> Read:
    """All studies of a source and its log, which must name every study once."""

    def _read(source: StudySource) -> tuple[list[Study], ImportLog]:
        log = ImportLog()
        studies = list(source.studies(log))
        assert log.read == len(source) == len(studies) + log.studies_skipped
        assert studies == list(source.studies(ImportLog()))  # it is read twice, once to look and once to decode
        return studies, log

    return _read


def save_image(path: Path, value: int = 90) -> None:
    """A grey image of 40 x 36 pixels, no two values alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (40, 36), value)
    image.putpixel((3, 3), 255 - value)
    image.save(path)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, as data frames write it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


# MIMIC-CXR.


def mimic_note(*lines: str) -> str:
    """A note as the data set breaks it: every line after the first begins with a space, empty ones too."""
    return "\n ".join(("                                 FINAL REPORT", *lines)) + "\n"


def usual_note(number: int) -> str:
    """A note with all the usual sections."""
    return mimic_note(
        "EXAMINATION:  CHEST (PA AND LAT)", "", "INDICATION:  ___-year-old woman with cough.", "",
        "COMPARISON:  None.", "", "FINDINGS: ", "", f"The lungs are clear in study {number}.  The heart is not",
        "enlarged.", "", "IMPRESSION: ", "", "No acute disease.",
    )  # fmt: skip


class Mimic:
    """MIMIC-CXR-JPG in small: three patients, one to a split, with two, one and one studies; notes beside them."""

    studies: ClassVar[dict[tuple[int, int], tuple[str, tuple[str, ...]]]] = {
        (10000032, 50000001): ("train", ("PA", "LATERAL")), (10000032, 50000002): ("train", ("AP",)),
               (11000033, 50000003): ("validate", ("",)), (12000034, 50000004): ("test", ("LL", "PA")),
    }  # fmt: skip

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[tuple[str, int, int, str, str]] = []
        for (subject, study), (split, views) in self.studies.items():
            for index, view in enumerate(views):
                dicom = "-".join([f"{100 * (study - 50_000_000) + index:08x}"] * 5)
                self.images.append((dicom, subject, study, split, view))
                save_image(self.image(dicom, subject, study), study % 50 + 10 * index)
            self.write_note(subject, study, usual_note(study))
        # The tables are in no order that helps.
        self.write_table("split", "dicom_id,study_id,subject_id,split",
                         [(d, study, subject, split) for d, subject, study, split, _ in self.images[::-1]])  # fmt: skip
        self.write_table(
            "metadata",
            "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns",
            [(d, subject, study, "CHEST (PA AND LAT)", view, 36, 40) for d, subject, study, _, view in self.images],
        )
        labels = {50000001: {"Cardiomegaly": 1.0, "Edema": 0.0, "Pneumonia": -1.0}, 50000004: {"No Finding": 1.0}}
        rows = [(subject, study, *(labels.get(study, {}).get(label, "") for label in LABELS))
                for subject, study in self.studies]  # fmt: skip
        self.write_table("chexpert", ",".join(["subject_id", "study_id", *LABELS]), rows)

    def image(self, dicom: str, subject: int, study: int) -> Path:
        return self.root / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg"

    def note(self, subject: int, study: int) -> Path:
        return self.root / f"mimic-cxr-reports/files/p{str(subject)[:2]}/p{subject}/s{study}.txt"

    def write_note(self, subject: int, study: int, text: str | bytes) -> None:
        self.note(subject, study).parent.mkdir(parents=True, exist_ok=True)
        self.note(subject, study).write_bytes(text.encode() if isinstance(text, str) else text)

    def table(self, kind: str) -> Path:
        return self.root / f"mimic-cxr-2.0.0-{kind}.csv.gz"

    def write_table(self, kind: str, header: str, rows: Iterable[Sequence[object]]) -> None:
        self.table(kind).write_bytes(gzip.compress(csv_text(header.split(","), rows).encode(), mtime=0))

    def zip_notes(self, path: Path) -> Path:
        notes = self.root / "mimic-cxr-reports"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(notes.rglob("*.txt")):
                archive.write(file, file.relative_to(notes).as_posix())
        return path


@pytest.fixture
def mimic(tmp_path: Path) -> Mimic:
    """See `Mimic`."""
    return Mimic(tmp_path / "mimic")


# CheXpert Plus.

CHEXPERT_HEADER = (
    "path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order",
    "report", "section_narrative", "section_clinical_history", "section_history", "section_comparison",
    "section_technique", "section_procedure_comments", "section_findings", "section_impression",
    "section_end_of_impression", "section_summary", "section_accession_number", "age", "sex", "race", "ethnicity",
    "interpreter_needed", "insurance_type", "recent_bmi", "deceased", "split",
)  # fmt: skip


class Chexpert:
    """CheXpert Plus in small: ten patients of one study each, the first with two views, the last without findings."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[dict[str, Any]] = []
        for number in range(1, 11):
            path = f"{'valid' if number == 9 else 'train'}/patient{number:05d}/study1/view1_frontal"
            findings = "" if number == 10 else f"\nThe lungs are clear in patient {number}."
            self.rows.append(self.row(path, section_findings=findings))
            save_image(root / "PNG" / f"{path}.png", 10 * number)
        lateral = self.row("train/patient00001/study1/view2_lateral", section_findings=self.rows[0]["section_findings"],
                           frontal_lateral="Lateral", ap_pa="")  # fmt: skip
        self.rows.insert(4, lateral)  # the rows of a study need not stand together
        save_image(root / "PNG" / "train/patient00001/study1/view2_lateral.png", 140)
        self.write()
        labels = [{"path_to_image": row["path_to_image"], **dict.fromkeys(LABELS), "Edema": 1.0, "Fracture": 0.0,
                   "Pneumonia": -1.0} for row in self.rows]  # fmt: skip
        self.write_labels("findings_fixed.json", labels)

    @staticmethod
    def row(path: str, **cells: Any) -> dict[str, Any]:
        given = {"path_to_image": f"{path}.jpg", "path_to_dcm": f"{path}.dcm", "frontal_lateral": "Frontal",
                 "ap_pa": "AP", "deid_patient_id": path.split("/")[1], "section_clinical_history": "Cough.",
                 "age": "61.0", "sex": "Female",
                 "section_impression": "\n1.  No acute disease.", "split": path.split("/")[0]}  # fmt: skip
        return dict.fromkeys(CHEXPERT_HEADER, "") | given | cells

    @property
    def table(self) -> Path:
        return self.root / "df_chexpert_plus_240401.csv"

    def write(self) -> None:
        self.table.write_text(csv_text(CHEXPERT_HEADER, [list(row.values()) for row in self.rows]))

    def write_labels(self, name: str, rows: Iterable[object]) -> None:
        (self.root / "chexbert_labels").mkdir(exist_ok=True)
        (self.root / "chexbert_labels" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def chexpert(tmp_path: Path) -> Chexpert:
    """See `Chexpert`."""
    return Chexpert(tmp_path / "chexpert")


# IU X-Ray.

OPENI_REPORT = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
  <uId id="CXR{uid}"/>
  <MedlineCitation><Article><Abstract>
    <AbstractText Label="COMPARISON">None.</AbstractText>
    <AbstractText Label="INDICATION">Cough &amp; fever.</AbstractText>
    <AbstractText Label="FINDINGS">{findings}</AbstractText>
    <AbstractText Label="IMPRESSION">{impression}</AbstractText>
  </Abstract></Article></MedlineCitation>
  <MeSH><major>Opacity/lung/upper lobe/right</major><major>Opacity/lung/lingula</major><major>Scoliosis</major>
    <automatic>opacity</automatic></MeSH>
  {images}
</eCitation>
"""


class Openi:
    """The Open-i release in small: six reports in a folder, two images each, and the same as the flat release."""

    def __init__(self, root: Path, flat: Path) -> None:
        self.root, self.flat = root, flat
        (root / "ecgen-radiology").mkdir(parents=True)
        reports, views = [], []
        for uid in range(1, 7):
            findings = "" if uid == 6 else f"The lungs are clear in study {uid}."
            images = [f"{uid}_IM-000{uid}-{view}001" for view in (1, 2)]
            self.write(uid, findings=findings, images=[f"CXR{image}" for image in images])
            for index, image in enumerate(images):
                save_image(root / "NLMCXR_png" / f"CXR{image}.png", 10 * uid + 5 * index)
                save_image(flat / "images_normalized" / f"{image}.dcm.png", 10 * uid + 5 * index)
                views.append((uid, f"{image}.dcm.png", ("Frontal", "Lateral")[index]))
            mesh = "Opacity/lung/upper lobe/right;Opacity/lung/lingula;Scoliosis"
            reports.append((uid, mesh, "Opacity;Scoliosis", "PA and lateral", "Cough & fever.", "None.", findings,
                            "No acute disease."))  # fmt: skip
        header = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
        (flat / "indiana_reports.csv").write_text(csv_text(header, reports))
        (flat / "indiana_projections.csv").write_text(csv_text(("uid", "filename", "projection"), views))

    def report(self, uid: int) -> Path:
        return self.root / "ecgen-radiology" / f"{uid}.xml"

    def write(self, uid: int, *, findings: str, images: Sequence[str], impression: str = "No acute disease.") -> None:
        parents = "".join(f'<parentImage id="{image}"/>' for image in images)
        text = OPENI_REPORT.format(uid=uid, findings=findings, impression=impression, images=parents)
        self.report(uid).write_text(text)


@pytest.fixture
def openi(tmp_path: Path) -> Openi:
    """See `Openi`."""
    return Openi(tmp_path / "openi", tmp_path / "flat")
