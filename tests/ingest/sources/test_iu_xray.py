"""IU X-Ray in its three layouts, invented and, where it is there, real."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources.annotation import Annotation
from emrrg_cli.ingest.sources.iu_layouts import detect_layout
from emrrg_cli.ingest.sources.iu_xray import IuXraySource, R2GenWithReports, iu_xray_source
from emrrg_cli.ingest.sources.openi import BadReport, OpeniReport, parse_report
from emrrg_cli.ingest.study import ImportLog, Study
from tests.ingest.sources.conftest import save_image

Read = Callable[[Any], tuple[list[Study], ImportLog]]


def _reasons(log: ImportLog) -> dict[str, list[str]]:
    return {reason: [example["id"] for example in entry.examples] for reason, entry in log.skipped.items()}


def _pack(openi: Any, name: str = "NLMCXR_reports.tgz") -> Path:
    """The reports as the archive of the release, in the folder's place."""
    folder = openi.root / "ecgen-radiology"
    with tarfile.open(openi.root / name, "w:gz") as archive:
        archive.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    return openi.root / name


def _add(archive: Path, name: str, data: bytes) -> None:
    plain = io.BytesIO(gzip.decompress(archive.read_bytes()))
    with tarfile.open(fileobj=plain, mode="a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    archive.write_bytes(gzip.compress(plain.getvalue()))


# The layouts.


def test_openi(openi: Any, read: Read) -> None:
    studies, log = read(iu_xray_source(openi.root))
    by_id = {study.study_id: study for study in studies}
    assert sorted(by_id) == [f"CXR{uid}" for uid in range(1, 6)]
    first = by_id["CXR1"]
    assert (first.patient_id, first.source, first.views) == ("1", "iu_xray", ("unknown", "unknown"))
    assert [path.name for path in first.image_paths] == ["CXR1_IM-0001-1001.png", "CXR1_IM-0001-2001.png"]
    assert (first.findings, first.impression) == ("The lungs are clear in study 1.", "No acute disease.")
    assert first.report == first.findings
    assert first.extra == {
        "labels": ["Opacity", "Scoliosis"],
        "mesh": ["Opacity/lung/upper lobe/right", "Opacity/lung/lingula", "Scoliosis"],
        "mesh_automatic": ["opacity"],
        "indication": "Cough & fever.",
        "comparison": "None.",
    }
    assert _reasons(log) == {"no findings": ["CXR6"]}
    assert log.remarks == [
        "6 reports: findings in 5, impression in 6, neither in 0; 12 images listed, none in 0 reports.",
        "Split drawn by patient with seed 0: 80, 10, 10 percent.",
    ]


def test_the_archive_equals_the_folder(openi: Any, read: Read) -> None:
    expected, _ = read(iu_xray_source(openi.root))
    _add(_pack(openi), "../../ecgen-radiology/._7.xml", b"a note of another system")
    assert read(iu_xray_source(openi.root))[0] == expected
    assert not list(openi.root.rglob("*.xml"))  # nothing was unpacked


def test_the_folder_of_reports_itself(openi: Any, read: Read) -> None:
    folder = openi.root / "ecgen-radiology"
    assert detect_layout(folder) == "openi"
    expected, _ = read(iu_xray_source(openi.root))
    assert read(iu_xray_source(folder, images=openi.root / "NLMCXR_png"))[0] == expected


def test_flat_gives_the_same_studies_in_the_same_split(openi: Any, read: Read) -> None:
    whole, _ = read(iu_xray_source(openi.root, seed=3))
    flat, log = read(iu_xray_source(openi.flat, seed=3))
    assert {study.views for study in flat} == {("FRONTAL", "LATERAL")}
    assert len(log.remarks) == 2

    def common(study: Study) -> Study:
        return replace(study, image_paths=(), views=(), extra=dict(study.extra) | {"mesh_automatic": []})

    assert [common(study) for study in flat] == [common(study) for study in whole]


def test_images_of_the_other_release_and_from_another_folder(openi: Any, read: Read) -> None:
    images = openi.flat / "images_normalized"
    studies, _ = read(iu_xray_source(openi.root, images=images))
    assert {path.parent for study in studies for path in study.image_paths} == {images}
    # The flat release's table beside the XML brings the views.
    (openi.flat / "indiana_projections.csv").rename(openi.root / "indiana_projections.csv")
    studies, _ = read(iu_xray_source(openi.root))
    assert {study.views for study in studies} == {("FRONTAL", "LATERAL")}


def test_r2gen(tiny_r2gen: Path, tmp_path: Path, openi: Any, read: Read) -> None:
    studies, _ = read(iu_xray_source(tiny_r2gen))
    assert len(studies) == 24
    assert {study.source for study in studies} == {"iu_xray"}
    assert all(study.findings == study.report for study in studies)
    for option in ({"annotation": tmp_path}, {"images": tmp_path}, {"fractions": (1.0, 0.0, 0.0)}):
        with pytest.raises(UsageError, match="cannot be used with R2Gen's layout"):
            iu_xray_source(tiny_r2gen, **option)  # type: ignore[arg-type]


def _as_r2gen(root: Path) -> Path:
    """Studies 1 to 3 and one that Open-i does not have, in R2Gen's layout: two images each."""
    rows = []
    for uid in (1, 2, 3, 99):
        study = f"CXR{uid}_IM-000{uid}"
        for k in (0, 1):
            save_image(root / "images" / study / f"{k}.png", 10 * uid + k)
        paths = [f"{study}/{k}.png" for k in (0, 1)]
        rows.append({"id": study, "report": f"The lungs are clear in study {uid}.", "image_path": paths})
    (root / "annotation.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
    return root


def test_r2gens_studies_with_the_rest_of_the_reports(openi: Any, tmp_path: Path, read: Read) -> None:
    root = _as_r2gen(tmp_path / "r2gen")
    whole, _ = read(iu_xray_source(openi.root))
    by_patient = {study.patient_id: study for study in whole}
    bare, _ = read(iu_xray_source(root))
    (openi.flat / "indiana_projections.csv").rename(openi.root / "indiana_projections.csv")
    reports = _pack(openi)
    for place in (openi.root, reports):
        studies, log = read(R2GenWithReports(iu_xray_source(root), place))
        for study, plain in zip(studies[:3], bare[:3], strict=True):
            described = by_patient[study.patient_id]
            assert study.extra == described.extra
            assert study.impression == described.impression == "No acute disease."
            assert study.views == ("FRONTAL", "LATERAL")
            assert replace(study, extra={}, impression=None, views=plain.views) == plain
        last = studies[3]
        assert (last.views, last.impression, last.extra["indication"]) == (("unknown", "unknown"), None, None)
        assert set(last.extra) == set(R2GenWithReports.columns)
        assert log.remarks == ["Studies that --reports does not have, so without context and labels: 1."]
    with pytest.raises(UsageError, match="--reports: no such file or folder"):
        R2GenWithReports(iu_xray_source(root), tmp_path / "none.tgz")
    with pytest.raises(UsageError, match="works only with R2Gen's layout"):
        R2GenWithReports(iu_xray_source(openi.root), reports)


def test_ids_without_a_study_match_the_reports(openi: Any, tmp_path: Path, read: Read) -> None:
    root = _as_r2gen(tmp_path / "r2gen")
    annotation = root / "annotation.json"
    full, _ = read(R2GenWithReports(iu_xray_source(root), openi.root))
    annotation.write_text(annotation.read_text().replace('"id": "CXR2_IM-0002"', '"id": "CXR2"'))
    short, log = read(R2GenWithReports(iu_xray_source(root), openi.root))
    assert short == [full[0], replace(full[1], study_id="CXR2"), *full[2:]]
    assert short[1].extra["indication"]
    assert log.remarks[0].endswith("context and labels: 1.")
    studies, _ = read(iu_xray_source(openi.root, annotation=annotation))
    assert [study.study_id for study in studies] == ["CXR1", "CXR2", "CXR3"]


def test_r2gens_layout_with_reports_from_the_command_line(openi: Any, tmp_path: Path, capsys: Any) -> None:
    root = _as_r2gen(tmp_path / "r2gen")
    out = tmp_path / "out"
    assert main(["preprocess", "iu_xray", str(root), str(out), "--reports", str(openi.flat)]) == 0
    assert "iu_xray, layout r2gen: 4 studies read\n" in capsys.readouterr().out
    train = open_dataset(out)["train"]
    assert train["indication"] == ["Cough & fever."] * 3 + [None]
    assert train["views"][0] == ["unknown", "unknown"]  # the flat release has its images in another order
    assert json.loads((out / "manifest.json").read_text())["options"]["reports"] == str(openi.flat)


def test_layouts_are_found_and_forced(openi: Any, tiny_r2gen: Path, tmp_path: Path) -> None:
    assert detect_layout(openi.root) == "openi"
    assert detect_layout(openi.flat) == "flat"
    assert detect_layout(tiny_r2gen) == detect_layout(tiny_r2gen / "annotation.json") == "r2gen"
    for table in openi.flat.glob("*.csv"):
        table.rename(openi.root / table.name)
    assert detect_layout(openi.root) == "openi"
    assert len(iu_xray_source(openi.root, layout="flat")) == 6
    with pytest.raises(UsageError, match="is a file"):
        detect_layout(openi.report(1))
    with pytest.raises(UsageError, match="does not have a known layout"):
        detect_layout(tmp_path / "flat")
    with pytest.raises(UsageError, match="no such folder"):
        detect_layout(tmp_path / "none")
    with pytest.raises(UsageError, match="no reports of Open-i in"):
        iu_xray_source(tmp_path / "flat", layout="openi")
    with pytest.raises(UsageError, match=r"no indiana_reports\.csv in"):
        iu_xray_source(tmp_path / "flat", layout="flat")
    with pytest.raises(UsageError, match="no such folder of images"):
        iu_xray_source(openi.root, images=tmp_path / "none")


def test_packed_images_are_pointed_out(openi: Any) -> None:
    (openi.root / "NLMCXR_png").rename(openi.root / "elsewhere")
    root = openi.root.rename(openi.root.with_name("it's raw"))
    (root / "NLMCXR_png.tgz").touch()
    with pytest.raises(UsageError, match=r"NLMCXR_png\.tgz is still packed") as raised:
        iu_xray_source(root)
    assert raised.value.hint is not None
    folder, archive = str(root / "NLMCXR_png"), str(root / "NLMCXR_png.tgz")
    command = shlex.split(raised.value.hint.removeprefix("Unpack it: "))
    assert command == ["mkdir", folder, "&&", "tar", "xzf", archive, "-C", folder]


# Splits.


def test_r2gens_split(openi: Any, tmp_path: Path, read: Read) -> None:
    rows = [{"id": f"CXR{uid}_IM-000{uid}", "report": "", "image_path": []} for uid in (1, 2, 3, 5, 9)]
    annotation = tmp_path / "annotation.json"
    annotation.write_text(json.dumps({"train": rows[:2], "val": rows[2:3], "test": rows[3:]}))
    studies, log = read(iu_xray_source(openi.root, annotation=annotation))
    assert [(s.study_id, s.split) for s in studies] == [
        ("CXR1", "train"), ("CXR2", "train"), ("CXR3", "validation"), ("CXR5", "test"),
    ]  # fmt: skip
    assert _reasons(log) == {"report missing": ["CXR9"], "not in the annotation": ["CXR4", "CXR6"]}
    assert log.remarks[1] == "Split by the ids of annotation.json."
    with pytest.raises(UsageError, match="--annotation and --split cannot be used together"):
        iu_xray_source(openi.root, annotation=annotation, fractions=(1.0, 0.0, 0.0))
    annotation.write_text(json.dumps({"train": rows[:2], "val": [], "test": [rows[1] | {"id": "CXR2_IM-1"}]}))
    with pytest.raises(RunError, match="CXR2 is in two splits, train and test"):
        iu_xray_source(openi.root, annotation=annotation)
    annotation.write_text(json.dumps({"train": [rows[0] | {"id": "study1"}], "val": [], "test": []}))
    with pytest.raises(RunError, match="id 'study1' is not an id of IU X-Ray"):
        iu_xray_source(openi.root, annotation=annotation)


def test_a_random_split_depends_on_the_seed(openi: Any, read: Read) -> None:
    def splits(**options: Any) -> dict[str, str]:
        return {s.study_id: s.split for s in read(iu_xray_source(openi.root, section="both", **options))[0]}

    assert Counter(splits(fractions=(0.5, 0.25, 0.25)).values()) == {"train": 3, "validation": 2, "test": 1}
    assert splits(seed=1) == splits(seed=1)
    assert len({tuple(splits(seed=seed).items()) for seed in range(5)}) > 1
    assert len(splits(limit=1)) == 3


def test_sections(openi: Any, read: Read) -> None:
    openi.write(5, findings="", impression="", images=["CXR5_IM-0005-1001"])
    studies, log = read(IuXraySource(openi.root, section="impression"))
    assert sorted(study.study_id for study in studies) == ["CXR1", "CXR2", "CXR3", "CXR4", "CXR6"]
    assert _reasons(log) == {"empty report": ["CXR5"]}
    assert next(study for study in studies if study.study_id == "CXR6").report is None


# What cannot be read.


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "report is not valid XML", "no element found"),
        (b"<eCitation><uId", "report is not valid XML", "unclosed token"),
        (b"plain text", "report is not valid XML", "syntax error"),
        (b"<a>\xff</a>", "report is not valid XML", "not well-formed"),
        (b'<?xml version="1.0" encoding="none"?><a/>', "report is not valid XML", "unknown encoding"),
        (b"<a>&undefined;</a>", "report is not valid XML", "undefined entity"),
        (b"<a/>", "no study id", "no uId"),
        (b'<a><uId id="1000"/></a>', "no study id", "no uId"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "report is not plain XML", "document type"),
        (
            b'<!DOCTYPE a [<!ENTITY b "xx"><!ENTITY c "&b;&b;&b;">]><a><uId id="CXR1"/>&c;</a>',
            "report is not plain XML",
            "document type",
        ),
        (
            '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "xx">]><a>&b;</a>'.encode("utf-16"),
            "report is not plain XML",
            "document type",
        ),
    ],
)
def test_invalid_reports_are_skipped(openi: Any, read: Read, data: bytes, reason: str, detail: str) -> None:
    bad = parse_report("3.xml", data)
    assert isinstance(bad, BadReport)
    assert (bad.name, bad.reason) == ("3.xml", reason)
    assert detail in bad.detail
    openi.report(3).write_bytes(data)
    studies, log = read(iu_xray_source(openi.root))
    assert len(studies) == 4
    assert _reasons(log)[reason] == ["3.xml"]


def test_xml_of_other_encodings_is_read() -> None:
    text = '<?xml version="1.0" encoding="{}"?><a><uId id=" CXR7 "/><AbstractText Label="Findings">Caf\xe9 <b>x</b>'
    text += "</AbstractText></a>"
    for encoding in ("utf-8", "utf-16", "iso-8859-1"):
        report = parse_report("7.xml", text.format(encoding).encode(encoding))
        assert isinstance(report, OpeniReport)
        assert (report.uid, report.findings, report.images) == ("7", "Café x", ())


def test_a_report_that_is_too_large(openi: Any, read: Read) -> None:
    data = openi.report(3).read_bytes().replace(b"</eCitation>", b"<x/>" * 300_000 + b"</eCitation>")
    openi.report(3).write_bytes(data)
    _, log = read(iu_xray_source(openi.root))
    assert log.skipped["report cannot be read"].examples == [
        {"id": "3.xml", "detail": f"it has {len(data):,} bytes, more than 1,048,576"}
    ]
    archive = _pack(openi)
    _, log = read(iu_xray_source(openi.root))
    assert _reasons(log)["report cannot be read"] == ["3.xml"]
    assert archive.stat().st_size < 100_000  # much smaller than what it unpacks to


def test_a_study_twice(openi: Any, read: Read) -> None:
    (openi.root / "ecgen-radiology" / "9.xml").write_bytes(openi.report(2).read_bytes())
    _, log = read(iu_xray_source(openi.root))
    assert _reasons(log)["id seen before"] == ["CXR2"]


@pytest.mark.parametrize("cut", [20, 400])
def test_an_archive_cut_short(openi: Any, cut: int) -> None:
    archive = _pack(openi)
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(RunError, match="is not a whole archive"):
        iu_xray_source(openi.root)


def test_an_archive_without_reports(openi: Any) -> None:
    archive = _pack(openi)
    with tarfile.open(archive, "w:gz"):
        pass
    with pytest.raises(RunError, match="no XML reports in"):
        iu_xray_source(openi.root)


def test_rows_of_the_flat_tables(openi: Any, read: Read) -> None:
    reports, views = openi.flat / "indiana_reports.csv", openi.flat / "indiana_projections.csv"
    lines = reports.read_text().splitlines()
    lines[2] = lines[2].replace("Cough & fever.", "#NAME?")
    lines += ["nan,a,b,c,d,e,f,g", "7,too,short", lines[1], "8,,,,,,Caf\xe9.,"]
    reports.write_bytes("\n".join(lines).encode("cp1252"))
    views.write_text(views.read_text() + "99,99_IM-1.dcm.png,Frontal\n,x.png,Frontal\n8,,Frontal\n")
    studies, log = read(iu_xray_source(openi.flat))
    by_id = {study.study_id: study for study in studies}
    assert by_id["CXR2"].extra["indication"] is None
    assert by_id["CXR8"].findings == "Café."
    assert by_id["CXR8"].image_paths == ()
    assert {reason: entry.count for reason, entry in log.skipped.items()} == {
        "row of a table cannot be used": 4, "id seen before": 1, "report missing": 1, "no findings": 1,
    }  # fmt: skip
    assert "indiana_reports.csv is not all UTF-8: the other bytes were read as Windows-1252." in log.remarks


def test_flat_tables_of_a_data_frame_and_shorter_names(openi: Any, read: Read) -> None:
    expected, _ = read(iu_xray_source(openi.flat))
    for table in (openi.flat / "indiana_reports.csv", openi.flat / "indiana_projections.csv"):
        table.write_text(re.sub(r"^(\d),", r"\1.0,", table.read_text(), flags=re.MULTILINE))
    for file in (openi.flat / "images_normalized").iterdir():
        file.rename(file.with_name(file.name.replace(".dcm", "")))
    found, _ = read(iu_xray_source(openi.flat))
    assert [(s.study_id, s.split, s.views, s.report, s.extra) for s in found] == [
        (s.study_id, s.split, s.views, s.report, s.extra) for s in expected
    ]
    assert {image.suffixes[-1] for study in found for image in study.image_paths} == {".png"}


def test_missing_images_are_problems_of_their_study(openi: Any, read: Read) -> None:
    (openi.root / "NLMCXR_png" / "CXR2_IM-0002-1001.png").unlink()
    studies, _ = read(iu_xray_source(openi.root))
    second = next(study for study in studies if study.study_id == "CXR2")
    assert [(p.path, p.reason) for p in second.problems] == [("CXR2_IM-0002-1001.png", "missing image")]
    assert len(second.image_paths) == len(second.views) == 1


# The real files.


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Path:
    return shared_data / "iu_text"


@pytest.fixture(scope="module")
def real_openi(real: Path, read: Read) -> tuple[list[Study], ImportLog]:
    images = real.parent / "iu_sample" / "images"
    return read(iu_xray_source(real, layout="openi", images=images, section="both"))


@pytest.mark.slow
def test_the_real_archive(real_openi: tuple[list[Study], ImportLog]) -> None:
    studies, log = real_openi
    assert log.read == 3955
    assert _reasons(log).keys() == {"empty report"}
    assert log.skipped["empty report"].count == 28
    assert sum(study.findings is not None for study in studies) == 3425
    assert sum(study.impression is not None for study in studies) == 3921
    assert log.remarks[0] == (
        "3,955 reports: findings in 3,425, impression in 3,921, neither in 28; "
        "7,470 images listed, none in 104 reports."
    )
    found = {study.study_id: len(study.image_paths) for study in studies if study.image_paths}
    assert found == {"CXR1000": 3, "CXR1001": 1}
    assert len(next(study for study in studies if study.study_id == "CXR1001").problems) == 1
    assert {study.views for study in studies if study.study_id == "CXR1000"} == {("FRONTAL", "LATERAL", "FRONTAL")}


def test_the_real_releases_agree(real: Path, real_openi: tuple[list[Study], ImportLog], read: Read) -> None:
    whole = {study.study_id: study for study in real_openi[0]}
    flat = {s.study_id: s for s in read(iu_xray_source(real, layout="flat", section="both"))[0]}
    assert (len(whole), len(flat)) == (3927, 3826)
    assert flat.keys() < whole.keys()
    for study_id, study in flat.items():
        other = whole[study_id]
        for part in ("findings", "impression", "split", "patient_id"):
            assert getattr(study, part) == getattr(other, part), study_id
        assert study.extra["mesh"] == other.extra["mesh"], study_id
        # A table cannot tell the word None from an empty cell.
        comparison = other.extra["comparison"]
        assert study.extra["comparison"] == (None if comparison in ("None", "none", "NONE", "N/A") else comparison)
    # Three indications of the flat release were damaged by a spreadsheet.
    damaged = [key for key, study in flat.items() if study.extra["indication"] != whole[key].extra["indication"]]
    assert sorted(damaged) == ["CXR1555", "CXR3477", "CXR3784"]


@pytest.mark.slow
def test_the_real_annotation_has_the_findings(real: Path, read: Read) -> None:
    studies, log = read(iu_xray_source(real, layout="openi", annotation=real / "annotation.json"))
    assert Counter(study.split for study in studies) == {"train": 2069, "validation": 296, "test": 590}
    assert {reason: entry.count for reason, entry in log.skipped.items()} == {"not in the annotation": 1000}
    texts = {study.study_id.split("_")[0]: study.report for study in read(iu_xray_source(real, layout="r2gen"))[0]}
    assert {study.study_id: study.report for study in studies} == texts


def test_images_at_any_depth_and_the_layout_is_named(
    openi: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = [study.image_paths for study in iu_xray_source(openi.root).studies(ImportLog())]
    images = tmp_path / "elsewhere" / "deep" / "er"
    images.mkdir(parents=True)
    for paths in expected:
        for path in paths:
            path.rename(images / path.name)
    source = iu_xray_source(openi.root, images=tmp_path / "elsewhere")
    found = [study.image_paths for study in source.studies(ImportLog())]
    assert [[path.name for path in paths] for paths in found] == [[path.name for path in paths] for paths in expected]
    assert any(found)
    arguments = ["preprocess", "iu_xray", str(openi.root), str(tmp_path / "out"), "--images"]
    assert main([*arguments, str(tmp_path / "elsewhere")]) == 0
    assert "iu_xray, layout openi: " in capfd.readouterr().out


@pytest.mark.slow
def test_a_long_name_in_an_archive_is_refused(openi: Any) -> None:
    archive = _pack(openi, "NLMCXR_reports.tar.gz")
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 300_000_000
    # Zeros to the size that the header claims, in a few hundred kilobytes.
    with gzip.open(archive, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(300):
            file.write(bytes(1_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match="not a whole archive: a name of 300,000,000 bytes"):
            iu_xray_source(openi.root)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_pipes_are_not_opened(openi: Any, tmp_path: Path, read: Read) -> None:
    os.mkfifo(openi.root / "ecgen-radiology" / "9999.xml")
    _, log = read(iu_xray_source(openi.root))
    assert log.skipped["report cannot be read"].examples == [{"id": "9999.xml", "detail": "not a regular file"}]
    os.mkfifo(tmp_path / "annotation.json")
    with pytest.raises(RunError, match="cannot be read: not a regular file"):
        Annotation(tmp_path / "annotation.json")
    (tmp_path / "other.json").symlink_to("/dev/zero")
    with pytest.raises(RunError, match="cannot be read: not a regular file"):
        Annotation(tmp_path / "other.json")
