"""MIMIC-CXR in PhysioNet's layout and with R2Gen's annotation: studies, splits, views, labels, what is missing."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources.mimic_cxr import MimicCxrSource
from emrrg_cli.ingest.study import ImportLog, Study
from tests.ingest.sources.conftest import csv_text

Read = Callable[[Any], tuple[list[Study], ImportLog]]
_SPLIT = "dicom_id,study_id,subject_id,split"


def _reasons(log: ImportLog) -> dict[str, list[str]]:
    return {reason: [example["id"] for example in entry.examples] for reason, entry in log.skipped.items()}


def test_the_release(mimic: Any, read: Read) -> None:
    studies, log = read(MimicCxrSource(mimic.root))
    assert [(s.study_id, s.patient_id, s.split) for s in studies] == [
        ("50000001", "10000032", "train"), ("50000002", "10000032", "train"), ("50000003", "11000033", "validation"),
        ("50000004", "12000034", "test"),
    ]  # fmt: skip
    # The order of the split table, which is turned round here.
    assert [s.views for s in studies] == [("LATERAL", "PA"), ("AP",), ("unknown",), ("PA", "LATERAL")]
    first = studies[0]
    assert [path.parent.name for path in first.image_paths] == ["s50000001"] * 2
    assert first.findings == first.report == "The lungs are clear in study 50000001. The heart is not enlarged."
    assert (first.impression, first.source) == ("No acute disease.", "mimic_cxr")
    assert first.extra == {
        "labels": ["Cardiomegaly"], "labels_uncertain": ["Pneumonia"], "labels_absent": ["Edema"],
        "indication": "___-year-old woman with cough.", "comparison": "None.", "technique": None,
    }  # fmt: skip
    assert studies[1].extra["labels"] == []
    assert set(first.extra) == set(MimicCxrSource.columns)
    assert log.remarks == ["Labels: mimic-cxr-2.0.0-chexpert.csv.gz."]
    assert not log.skipped


def test_notes_in_a_zip_beside_the_images_or_elsewhere(mimic: Any, tmp_path: Path, read: Read) -> None:
    expected, _ = read(MimicCxrSource(mimic.root))
    elsewhere = mimic.zip_notes(tmp_path / "notes.zip")
    assert read(MimicCxrSource(mimic.root, reports=elsewhere))[0] == expected
    notes = mimic.root / "mimic-cxr-reports"
    assert read(MimicCxrSource(mimic.root, reports=notes / "files"))[0] == expected
    for file in list(notes.rglob("*.txt")):
        file.rename(mimic.root / file.relative_to(notes))
    notes.rename(tmp_path / "empty")
    assert read(MimicCxrSource(mimic.root))[0] == expected
    elsewhere.rename(mimic.root / "mimic-cxr-reports.zip")
    assert read(MimicCxrSource(mimic.root))[0] == expected
    # A zip of the folder with its own name.
    with zipfile.ZipFile(tmp_path / "named.zip", "w") as archive:
        for file in mimic.root.glob("files/p*/p*/s*.txt"):
            archive.write(file, f"mimic-cxr/2.0.0/mimic-cxr-reports/{file.relative_to(mimic.root).as_posix()}")
    assert read(MimicCxrSource(mimic.root, reports=tmp_path / "named.zip"))[0] == expected


def test_sections(mimic: Any, read: Read) -> None:
    mimic.write_note(10000032, 50000001, " FINAL REPORT\n IMPRESSION:  No change.\n")
    mimic.write_note(10000032, 50000002, " FINAL REPORT\n \n The lungs are clear.\n")
    mimic.write_note(11000033, 50000003, " FINAL REPORT\n INDICATION:  Cough.\n")
    studies, log = read(MimicCxrSource(mimic.root))
    assert [(s.study_id, s.findings, s.report) for s in studies[:1]] == [("50000002", None, "The lungs are clear.")]
    assert _reasons(log) == {"no findings": ["50000001"], "empty report": ["50000003"]}
    studies, log = read(MimicCxrSource(mimic.root, section="impression"))
    assert [(s.study_id, s.impression) for s in studies[:2]] == [("50000001", "No change."), ("50000002", None)]
    assert _reasons(log) == {"empty report": ["50000003"]}


def test_missing_pieces(mimic: Any, read: Read) -> None:
    mimic.note(10000032, 50000002).unlink()
    mimic.image(*mimic.images[0][:3]).unlink()
    for kind in ("metadata", "chexpert"):
        mimic.table(kind).unlink()
    studies, log = read(MimicCxrSource(mimic.root))
    assert _reasons(log) == {"report missing": ["50000002"]}
    assert [problem.reason for problem in studies[0].problems] == ["missing image"]
    assert studies[0].views == ("unknown",)
    assert studies[0].extra["labels"] == []
    assert log.remarks == [
        "No mimic-cxr-2.0.0-metadata.csv.gz: the views are unknown.",
        "No mimic-cxr-2.0.0-chexpert.csv.gz: the studies have no labels.",
    ]


def test_rows_that_cannot_be_used(mimic: Any, read: Read) -> None:
    rows = [(d, study, subject, split) for d, subject, study, split, _ in mimic.images]
    bad = [("", 50000009, 10000032, "train"), ("x", "nan", 10000032, "train"), ("y", 50000009, "1p", "train"),
           ("z", 50000009, 10000032, "mine"), ("w", 50000009, 10000032), (rows[0][0], 50000009, 10000032, "train"),
           rows[1]]  # fmt: skip
    floats = [(d, f"{study}.0", f"{subject}.0", split) for d, study, subject, split in rows]
    mimic.write_table("split", _SPLIT, floats + bad)
    studies, log = read(MimicCxrSource(mimic.root))
    assert [s.study_id for s in studies] == ["50000001", "50000002", "50000003", "50000004"]
    assert {reason: entry.count for reason, entry in log.skipped.items()} == {
        "no study id": 3, "unknown split": 1, "row and header differ in length": 1, "id seen before": 1,
    }  # fmt: skip
    assert [(p.path, p.reason, p.detail) for p in studies[0].problems] == [
        (f"{rows[1][0]}.jpg", "listed twice", "line 14")
    ]


def test_leaks_are_refused(mimic: Any) -> None:
    rows = [(d, study, subject, split) for d, subject, study, split, _ in mimic.images]
    mimic.write_table("split", _SPLIT, [*rows, ("x", 50000009, 10000032, "test")])
    with pytest.raises(RunError, match="patient 10000032 is in two splits, train and test"):
        MimicCxrSource(mimic.root)
    mimic.write_table("split", _SPLIT, [*rows, ("x", 50000001, 10000099, "train")])
    with pytest.raises(RunError, match="study 50000001 has two patients, 10000032 and 10000099"):
        MimicCxrSource(mimic.root)


def test_notes_that_cannot_be_read(mimic: Any, tmp_path: Path, read: Read) -> None:
    mimic.write_note(10000032, 50000001, b"FINDINGS:\0 none")
    mimic.write_note(10000032, 50000002, b" FINDINGS:  Caf\xe9.\n")
    mimic.write_note(11000033, 50000003, b"x" * (2**20 + 1))
    studies, log = read(MimicCxrSource(mimic.root))
    assert [s.study_id for s in studies] == ["50000002", "50000004"]
    assert studies[0].findings == "Café."
    assert [e["detail"] for e in log.skipped["report cannot be read"].examples] == [
        "not text", "more than 1,048,576 bytes",
    ]  # fmt: skip


def test_a_broken_member_of_the_zip(mimic: Any, tmp_path: Path, read: Read) -> None:
    path = mimic.zip_notes(tmp_path / "notes.zip")
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("files/p10/p10000032/s50000001.txt")
        start = member.header_offset + 30 + len(member.filename)
    data = bytearray(path.read_bytes())
    data[start + 5 : start + 25] = b"\xff" * 20
    path.write_bytes(data)
    studies, log = read(MimicCxrSource(mimic.root, reports=path))
    assert len(studies) == 3
    assert _reasons(log) == {"report cannot be read": ["50000001"]}
    path.write_bytes(data[:-30])
    with pytest.raises(RunError, match="is not a whole zip file"):
        MimicCxrSource(mimic.root, reports=path)


def test_paths_stay_inside(mimic: Any, tmp_path: Path, read: Read) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "outside.jpg")
    rows = [("../../../../../outside", 50000001, 10000032, "train")]
    mimic.write_table("split", _SPLIT, rows)
    studies, _ = read(MimicCxrSource(mimic.root))
    assert [p.reason for p in studies[0].problems] == ["path outside the data folder"]


def test_limit_is_per_split(mimic: Any, read: Read) -> None:
    studies, _ = read(MimicCxrSource(mimic.root, limit=1))
    assert [s.study_id for s in studies] == ["50000001", "50000003", "50000004"]


def test_studies_may_be_read_by_another_thread(mimic: Any, read: Read) -> None:
    source = MimicCxrSource(mimic.root)
    with ThreadPoolExecutor(1) as pool:  # as the dispatcher of a worker pool does
        studies = pool.submit(lambda: list(source.studies(ImportLog()))).result()
    assert studies == read(source)[0]


def test_negbio_labels(mimic: Any, read: Read) -> None:
    studies, log = read(MimicCxrSource(mimic.root, labeler="negbio"))
    assert log.remarks == ["No mimic-cxr-2.0.0-negbio.csv.gz: the studies have no labels."]
    mimic.table("chexpert").rename(mimic.table("negbio"))
    studies, _ = read(MimicCxrSource(mimic.root, labeler="negbio"))
    assert studies[3].extra["labels"] == ["No Finding"]


def test_labels_of_other_values(mimic: Any, read: Read) -> None:
    header = "study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    header += "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
    mimic.write_table("chexpert", header, [(50000001, *[""] * 13, "maybe")])
    with pytest.raises(RunError, match=r"chexpert\.csv\.gz:2: 'maybe' is not a label"):
        MimicCxrSource(mimic.root)
    rows = [("nan", *["7"] * 14), (50000001, *[""] * 13, "7"), (50000003, "1"), (50000003, "1.0", *[""] * 13)]
    mimic.write_table("chexpert", header, rows)
    studies, log = read(MimicCxrSource(mimic.root))
    assert {study.study_id: study.extra["labels"] for study in studies if study.extra["labels"]} == {
        "50000003": ["Atelectasis"]
    }
    assert "Rows of mimic-cxr-2.0.0-chexpert.csv.gz whose labels cannot be read: 3, first: " in log.remarks[-1]
    assert log.remarks[-1].endswith("chexpert.csv.gz:2: empty is not a study id.")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("mimic-cxr-2.0.0-split.csv.gz", "no mimic-cxr-2.0.0-split.csv.gz in"),
        ("mimic-cxr-reports", "no notes in"),
        ("", "no such folder: "),
    ],
)
def test_missing_files_are_refused(mimic: Any, tmp_path: Path, remove: str, message: str) -> None:
    (mimic.root / remove).rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=message):
        MimicCxrSource(mimic.root)


def test_plain_tables_and_a_missing_reports_folder(mimic: Any, tmp_path: Path, read: Read) -> None:
    expected, _ = read(MimicCxrSource(mimic.root))
    for kind in ("split", "metadata", "chexpert"):
        path = mimic.table(kind)
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert read(MimicCxrSource(mimic.root))[0] == expected
    with pytest.raises(UsageError, match="no such folder, zip or table of reports"):
        MimicCxrSource(mimic.root, reports=tmp_path / "none")
    with pytest.raises(UsageError, match=f"{tmp_path} has no notes such as files/p10"):
        MimicCxrSource(mimic.root, reports=tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_table_of_sections(mimic: Any, tmp_path: Path, read: Read, packed: bool, named: bool) -> None:
    (mimic.root / "mimic-cxr-reports").rename(tmp_path / "notes")
    header = "study,impression,findings,last_paragraph,comparison"
    rows = [("s50000001", "No\n acute  disease.\n\nNo change.", "The lungs\n are clear.", "", "None."),
            ("s50000002", "", "", "Clear.", ""), ("s50000003", "", "nan", "", ""), ("s50000001", "", "Twice.", "", ""),
            ("x", "", "", "", "")]  # fmt: skip
    table = csv_text(header.split(","), rows).encode()
    path = (tmp_path if named else mimic.root) / ("mimic_cxr_sectioned.csv" + ".gz" * packed)
    path.write_bytes(gzip.compress(table) if packed else table)
    studies, log = read(MimicCxrSource(mimic.root, reports=path if named else None))
    assert [(s.study_id, s.report, s.findings, s.impression) for s in studies] == [
        ("50000001", "The lungs are clear.", "The lungs are clear.", "No acute disease.\nNo change."),
        ("50000002", "Clear.", None, None),
    ]
    assert (studies[0].extra["comparison"], studies[0].extra["technique"]) == ("None.", None)
    assert _reasons(log) == {"empty report": ["50000003"], "report missing": ["50000004"]}


@pytest.mark.parametrize("suffix", [".png", ".dcm"])
def test_images_of_other_formats(mimic: Any, read: Read, suffix: str) -> None:
    expected = [[path.with_suffix(suffix) for path in s.image_paths] for s in read(MimicCxrSource(mimic.root))[0]]
    for file in list(mimic.root.rglob("*.jpg")):
        file.rename(file.with_suffix(suffix))
    assert [list(s.image_paths) for s in read(MimicCxrSource(mimic.root))[0]] == expected


def test_ids_and_splits_by_other_names(mimic: Any, read: Read) -> None:
    expected = read(MimicCxrSource(mimic.root))[0]
    names = {"validate": "val", "train": "training", "test": "test"}
    mimic.write_table("split", _SPLIT, [(d, f"s{study}", f"p{subject}", names[split])
                                        for d, subject, study, split, _ in mimic.images[::-1]])  # fmt: skip
    assert read(MimicCxrSource(mimic.root))[0] == expected


# With R2Gen's annotation.


@pytest.fixture
def annotation(mimic: Any, tmp_path: Path) -> Path:
    splits: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}
    for dicom, subject, study, split, _ in mimic.images:
        path = f"p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg"
        splits["val" if split == "validate" else split].append(
            {"id": dicom, "study_id": study, "subject_id": subject, "report": f"Text of {study}.", "image_path": [path]}
        )
    splits["train"].append({**splits["train"][0], "id": "again", "report": " "})
    (tmp_path / "annotation.json").write_text(json.dumps(splits))
    return tmp_path / "annotation.json"


def test_rows_of_the_annotation_are_the_studies(mimic: Any, annotation: Path, read: Read) -> None:
    studies, log = read(MimicCxrSource(mimic.root, annotation=annotation))
    assert [s.study_id for s in studies] == [image[0] for image in mimic.images]
    assert [(s.patient_id, s.split, s.views, len(s.image_paths)) for s in studies[:3]] == [
        ("10000032", "train", ("PA",), 1), ("10000032", "train", ("LATERAL",), 1), ("10000032", "train", ("AP",), 1),
    ]  # fmt: skip
    first = studies[0]
    assert first.report == "Text of 50000001."
    assert first.findings == "The lungs are clear in study 50000001. The heart is not enlarged."
    assert first.impression == "No acute disease."
    assert first.extra["labels"] == ["Cardiomegaly"]
    assert _reasons(log) == {"no findings": ["again"]}


@pytest.mark.parametrize(("prefix", "suffix"), [("/data/mimic/files/", ".jpg"), ("", ".png"), ("C:\\mimic\\", ".dcm")])
def test_an_annotation_of_another_machine_or_format(
    mimic: Any, annotation: Path, read: Read, prefix: str, suffix: str
) -> None:
    expected, _ = read(MimicCxrSource(mimic.root, annotation=annotation))
    content = json.loads(annotation.read_text())
    for row in (row for rows in content.values() for row in rows):
        row["image_path"] = [prefix + path.removeprefix("files/") for path in row["image_path"]]
    annotation.write_text(json.dumps(content))
    for file in list(mimic.root.rglob("*.jpg")):
        file.rename(file.with_suffix(suffix))
    found, _ = read(MimicCxrSource(mimic.root, annotation=annotation))
    paths = [[path.with_suffix(suffix) for path in study.image_paths] for study in expected]
    assert [list(study.image_paths) for study in found] == paths
    assert all(paths)
    assert [(s.patient_id, s.views, s.extra) for s in found] == [(s.patient_id, s.views, s.extra) for s in expected]


def test_the_annotation_alone(mimic: Any, annotation: Path, tmp_path: Path, read: Read) -> None:
    for kind in ("split", "metadata", "chexpert"):
        mimic.table(kind).unlink()
    (mimic.root / "mimic-cxr-reports").rename(tmp_path / "moved")
    (mimic.root / "files").rename(mimic.root / "images")
    studies, _ = read(MimicCxrSource(mimic.root, annotation=annotation, limit=1))
    assert [(s.split, s.views, s.findings, s.impression) for s in studies] == [
        ("train", ("unknown",), "Text of 50000001.", None), ("validation", ("unknown",), "Text of 50000003.", None),
        ("test", ("unknown",), "Text of 50000004.", None),
    ]  # fmt: skip
