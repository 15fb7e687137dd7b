"""CheXpert Plus in the layout of its release and with an annotation of R2Gen's form."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources.chexpert_labels import encode_labels, label_columns
from emrrg_cli.ingest.sources.chexpert_plus import ChexpertPlusSource
from emrrg_cli.ingest.study import ImportLog, Study

Read = Callable[[Any], tuple[list[Study], ImportLog]]


def _reasons(log: ImportLog) -> dict[str, list[str]]:
    return {reason: [example["id"] for example in entry.examples] for reason, entry in log.skipped.items()}


def test_the_release(chexpert: Any, read: Read) -> None:
    studies, log = read(ChexpertPlusSource(chexpert.root))
    by_id = {study.study_id: study for study in studies}
    assert sorted(by_id) == [f"patient{number:05d}_study1" for number in range(1, 10)]
    assert Counter(study.split for study in studies)["train"] >= 6
    assert [study.split for study in studies] == sorted(
        (s.split for s in studies), key=["train", "validation", "test"].index
    )
    first = by_id["patient00001_study1"]
    assert (first.patient_id, first.source, first.views) == ("patient00001", "chexpert_plus", ("AP", "LATERAL"))
    assert [path.name for path in first.image_paths] == ["view1_frontal.png", "view2_lateral.png"]
    assert first.findings == first.report == "The lungs are clear in patient 1."
    assert first.impression == "1.  No acute disease."
    assert first.extra == {
        "labels": ["Edema"], "labels_uncertain": ["Pneumonia"], "labels_absent": ["Fracture"], "indication": "Cough.",
        "comparison": None, "technique": None, "age": "61.0", "sex": "Female",
    }  # fmt: skip
    assert set(first.extra) == set(ChexpertPlusSource.columns)
    assert _reasons(log) == {"no findings": ["patient00010_study1"]}
    assert log.remarks == [
        "Labels: findings_fixed.json.",
        "Split drawn by patient with seed 0: 70, 10, 20 percent.",
    ]


@pytest.mark.parametrize(
    ("section", "labels"), [("impression", "impression_fixed.json"), ("both", "report_fixed.json")]
)
def test_other_sections_have_their_own_labels(chexpert: Any, section: Any, labels: str, read: Read) -> None:
    path = chexpert.rows[-1]["path_to_image"]
    chexpert.write_labels(labels, [{"path_to_image": path, "Fracture": 1, "Edema": float("nan"), "No Finding": None}])
    studies, log = read(ChexpertPlusSource(chexpert.root, section=section))
    last = next(study for study in studies if study.study_id == "patient00010_study1")
    assert (last.findings, last.report, last.impression) == (None, None, "1.  No acute disease.")
    assert last.extra["labels"] == ["Fracture"]
    assert last.extra["labels_absent"] == []
    assert log.remarks[0] == f"Labels: {labels}."
    assert not log.skipped


def test_views_of_a_study_may_be_anonymised_differently(chexpert: Any, read: Read) -> None:
    chexpert.rows[4]["section_findings"] = "The lungs are clear in patient 1, on another date."
    chexpert.write()
    studies, log = read(ChexpertPlusSource(chexpert.root))
    assert next(s for s in studies if len(s.views) == 2).findings == "The lungs are clear in patient 1."
    assert "Studies whose views have differently anonymised reports: 1. The first report is kept." in log.remarks


def test_images_by_other_names(chexpert: Any, read: Read) -> None:
    root = chexpert.root
    (root / "PNG").rename(root / "PNGs")
    frontal = root / "PNGs/train/patient00002/study1/view1_frontal.png"
    (root / "DICOM/train/patient00003/study1").mkdir(parents=True)
    (root / "PNGs/train/patient00003/study1/view1_frontal.png").rename(
        root / "DICOM/train/patient00003/study1/view1_frontal.dcm"
    )
    frontal.rename(frontal.with_suffix(".jpg"))
    (root / "PNGs/train/patient00004/study1/view1_frontal.png").unlink()
    by_id = {study.study_id: study for study in read(ChexpertPlusSource(root))[0]}
    names = {number: [p.name for p in by_id[f"patient0000{number}_study1"].image_paths] for number in range(1, 5)}
    assert names == {1: ["view1_frontal.png", "view2_lateral.png"], 2: ["view1_frontal.jpg"], 3: ["view1_frontal.dcm"],
                     4: []}  # fmt: skip
    problem = by_id["patient00004_study1"].problems[0]
    assert (problem.path, problem.reason) == ("train/patient00004/study1/view1_frontal.png", "missing image")


def test_a_packed_table_and_the_images_of_chexpert(chexpert: Any, read: Read) -> None:
    expected, _ = read(ChexpertPlusSource(chexpert.root))
    Path(f"{chexpert.table}.gz").write_bytes(gzip.compress(chexpert.table.read_bytes()))
    chexpert.table.unlink()
    images = chexpert.root / "CheXpert-v1.0"
    (chexpert.root / "PNG").rename(images)
    for file in list(images.rglob("*.png")):
        file.rename(file.with_suffix(".jpg"))
    found, _ = read(ChexpertPlusSource(chexpert.root))
    moved = [[images / path.relative_to(chexpert.root / "PNG") for path in study.image_paths] for study in expected]
    assert [list(study.image_paths) for study in found] == [[path.with_suffix(".jpg") for path in one] for one in moved]
    assert [(s.study_id, s.split, s.views, s.report, s.extra) for s in found] == [
        (s.study_id, s.split, s.views, s.report, s.extra) for s in expected
    ]


def test_views(chexpert: Any, read: Read) -> None:
    for row, (frontal, projection) in zip(
        chexpert.rows[1:4], [("", ""), ("Frontal", "LL"), ("Frontal", "")], strict=True
    ):
        row["frontal_lateral"], row["ap_pa"] = frontal, projection
    chexpert.write()
    by_id = {study.study_id: study for study in read(ChexpertPlusSource(chexpert.root))[0]}
    assert [by_id[f"patient0000{number}_study1"].views for number in (2, 3, 4)] == [
        ("FRONTAL",),
        ("LATERAL",),
        ("FRONTAL",),
    ]


def test_rows_that_cannot_be_used(chexpert: Any, read: Read) -> None:
    chexpert.rows += [chexpert.rows[0], chexpert.row("x/../y"), chexpert.rows[0] | {"path_to_image": "nan"}]
    chexpert.write()
    chexpert.table.write_text(chexpert.table.read_text() + "train/patient00011/study1/view1_frontal.jpg,short\n")
    studies, log = read(ChexpertPlusSource(chexpert.root))
    first = next(study for study in studies if study.study_id == "patient00001_study1")
    assert [(p.reason, p.path) for p in first.problems] == [("listed twice", "train/patient00001/study1/view1_frontal")]
    assert {reason: entry.count for reason, entry in log.skipped.items()} == {
        "no study id": 2, "row and header differ in length": 1, "no findings": 1,
    }  # fmt: skip


def test_a_patient_is_in_one_split(chexpert: Any, read: Read) -> None:
    for number in range(1, 11):
        for study in range(2, 6):
            path = f"train/patient{number:05d}/study{study}/view1_frontal"
            chexpert.rows.append(chexpert.row(path, section_findings="Clear."))
    chexpert.write()
    studies, _ = read(ChexpertPlusSource(chexpert.root, seed=4))
    splits: dict[str | None, set[str]] = {}
    for study in studies:
        splits.setdefault(study.patient_id, set()).add(study.split)
    assert all(len(names) == 1 for names in splits.values())
    assert Counter(name for names in splits.values() for name in names) == {"train": 7, "validation": 1, "test": 2}
    again, _ = read(ChexpertPlusSource(chexpert.root, seed=4))
    assert studies == again
    few, _ = read(ChexpertPlusSource(chexpert.root, seed=4, limit=2))
    assert Counter(study.split for study in few) == {"train": 2, "validation": 2, "test": 2}


def test_no_labels(chexpert: Any, read: Read) -> None:
    (chexpert.root / "chexbert_labels" / "findings_fixed.json").unlink()
    studies, log = read(ChexpertPlusSource(chexpert.root))
    assert all(study.extra["labels"] == [] for study in studies)
    assert log.remarks[0] == "No chexbert_labels/findings_fixed.json: the studies have no labels."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path_to_image": "a"}\n{"path', r"findings_fixed\.json:2: the last line is cut short"),
        ("[]\n", r"findings_fixed\.json:1: not an object with path_to_image"),
        ('{"Edema": 1}\n', "not an object with path_to_image"),
        ('{"path_to_image": "x/patient1/study1/view1_frontal.jpg", "Edema": 3}\n', "3 is not a label"),
        ("\udcff", "not UTF-8 text"),
    ],
)
def test_invalid_labels_are_refused(chexpert: Any, text: str, message: str) -> None:
    (chexpert.root / "chexbert_labels" / "findings_fixed.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=message):
        ChexpertPlusSource(chexpert.root)


def test_label_lines_that_cannot_be_read_are_counted(chexpert: Any, read: Read) -> None:
    file = chexpert.root / "chexbert_labels" / "findings_fixed.json"
    before, _ = read(ChexpertPlusSource(chexpert.root))
    lines = file.read_text().splitlines()
    odd = ["{,", "[]", '{"path_to_image": 3}', '{"path_to_image": "a"}']
    values = ["[]", '"x"', "1e999", "1" * 400, "{}"]
    odd += [f'{{"path_to_image": "x/patient00099/study1/view1_frontal.jpg", "Edema": {value}}}' for value in values]
    file.write_text("\n".join([lines[0], *odd, *lines[1:], ""]))
    studies, log = read(ChexpertPlusSource(chexpert.root))
    assert studies == before
    [remark] = [remark for remark in log.remarks if remark.startswith("Rows of findings_fixed.json")]
    assert f"whose labels cannot be read: {len(odd)}, first: {file}:2: not JSON" in remark


def test_encoded_labels() -> None:
    values = [1, 0.0, "-1.0", "", None, float("nan"), "1", *[None] * 7]
    assert encode_labels(values) == "pau...p......."
    assert label_columns(encode_labels(values)) == {
        "labels": ["Atelectasis", "Lung Lesion"], "labels_uncertain": ["Consolidation"],
        "labels_absent": ["Cardiomegaly"],
    }  # fmt: skip


def test_missing_files_are_refused(chexpert: Any, tmp_path: Path) -> None:
    chexpert.table.unlink()
    with pytest.raises(UsageError, match=r"no df_chexpert_plus_240401\.csv in"):
        ChexpertPlusSource(chexpert.root)
    with pytest.raises(UsageError, match="no such folder"):
        ChexpertPlusSource(tmp_path / "none")


def test_links_to_another_disk_are_followed(chexpert: Any, tmp_path: Path, read: Read) -> None:
    (tmp_path / "train/patient00001/study1").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "train/patient00001/study1/view1_frontal.png")
    chexpert.rows = [chexpert.row("train/patient00001/study1/view1_frontal", section_findings="Clear.")]
    chexpert.write()
    frontal = chexpert.root / "PNG/train/patient00001/study1/view1_frontal.png"
    frontal.unlink()
    frontal.symlink_to(tmp_path / "train/patient00001/study1/view1_frontal.png")
    studies, _ = read(ChexpertPlusSource(chexpert.root))
    assert (studies[0].image_paths, studies[0].problems) == ((frontal,), ())


# With an annotation.


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    def row(number: int, **more: object) -> dict[str, object]:
        path = f"train/patient{number:05d}/study1/view1_frontal.png"
        return {"id": f"row{number}", "report": f"Text {number}.", "image_path": [path], **more}

    lateral = "/other/machine/PNG/train/patient00001/study1/view2_lateral.png"
    content = {"train": [row(1), row(2, image_path=[lateral])], "val": [row(3, subject_id="p3")],
               "test": [row(10), row(10), row(4, report="")]}  # fmt: skip
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    return tmp_path / "annotation.json"


def test_rows_of_the_annotation_are_the_studies(chexpert: Any, annotation: Path, read: Read) -> None:
    studies, log = read(ChexpertPlusSource(chexpert.root, annotation=annotation))
    assert [(s.study_id, s.split, s.patient_id, s.views) for s in studies] == [
        ("row1", "train", "patient00001", ("AP",)), ("row2", "train", "patient00001", ("LATERAL",)),
        ("row3", "validation", "p3", ("AP",)), ("row10", "test", "patient00010", ("AP",)),
    ]  # fmt: skip
    assert [s.report for s in studies] == ["Text 1.", "Text 2.", "Text 3.", "Text 10."]
    assert [s.findings for s in studies[:1]] == ["The lungs are clear in patient 1."]
    assert [s.findings for s in studies[-1:]] == ["Text 10."]
    assert {s.impression for s in studies} == {"1.  No acute disease."}
    assert studies[0].extra["labels"] == ["Edema"]
    assert _reasons(log) == {"id seen before": ["row10"], "no findings": ["row4"]}


def test_the_annotation_alone(chexpert: Any, annotation: Path, read: Read) -> None:
    chexpert.table.unlink()
    studies, _ = read(ChexpertPlusSource(chexpert.root, annotation=annotation, limit=1))
    assert [(s.study_id, s.views, s.impression, s.extra["labels"]) for s in studies] == [
        ("row1", ("FRONTAL",), None, []), ("row3", ("FRONTAL",), None, []), ("row10", ("FRONTAL",), None, []),
    ]  # fmt: skip
