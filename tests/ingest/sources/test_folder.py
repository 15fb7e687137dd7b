"""Any folder, with and without a table: what becomes a study, what is counted, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.splits import draw_splits, drawn_remark, parse_fractions
from emrrg_cli.decoding.studies import find_studies, table_studies
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.image_paths import find_images
from emrrg_cli.ingest.preprocess import preprocess
from emrrg_cli.ingest.sources.folder import Columns, FolderSource
from emrrg_cli.ingest.sources.table import cell_list, cell_text, read_table
from emrrg_cli.ingest.study import ImageProblem, ImportLog, Study
from emrrg_cli.recipe.preprocessing import PreprocessRecipe

MakeDicom = Callable[..., bytes]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder with `a.png` to `f.png`, of which `e.png` and `f.png` lie in `images/`."""
    root = tmp_path / "films"
    (root / "images").mkdir(parents=True)
    for name in ("a", "b", "c", "d", "images/e", "images/f"):
        Image.new("L", (8, 8), ord(name[-1])).save(root / f"{name}.png")
    return root


def _read(root: Path, **options: Any) -> tuple[list[Study], ImportLog]:
    log = ImportLog()
    source = FolderSource(root, **options)
    studies = list(source.studies(log))
    assert log.read == len(source) == len(studies) + log.studies_skipped
    return studies, log


def _table(root: Path, text: str, name: str = "table.csv", encoding: str = "utf-8") -> Path:
    path = root.parent / name
    path.write_bytes(text.encode(encoding))
    return path


def _skipped(log: ImportLog) -> dict[str, list[str]]:
    return {reason: [example["id"] for example in entry.examples] for reason, entry in log.skipped.items()}


# Without a table.


def test_every_file_is_tried_and_hidden_ones_are_not(films: Path) -> None:
    (films / ".hidden.png").touch()
    (films / ".git").mkdir()
    (films / ".git" / "x.png").touch()
    (films / "notes.txt").write_text("text")
    studies, log = _read(films)
    assert {study.study_id for study in studies} == {
        "a.png", "b.png", "c.png", "d.png", "images/e.png", "images/f.png", "notes.txt",
    }  # fmt: skip
    assert all(study.report is study.findings is study.patient_id is None for study in studies)
    assert {study.views for study in studies} == {("unknown",)}
    assert "without a table there are no reports" in log.remarks[0].lower()
    assert "seed 0: 80, 10, 10 percent" in log.remarks[1]


def test_dicom_files_are_grouped_into_studies(films: Path, make_dicom: MakeDicom) -> None:
    pixels = np.zeros((4, 4), np.uint8)
    for name, study, view in (("1.dcm", "1.2", "PA"), ("2", "1.2", "LL"), ("3.dcm", "1.3", "")):
        (films / name).write_bytes(make_dicom(pixels, StudyInstanceUID=study, PatientID="P7", ViewPosition=view))
    (films / "4.dcm").write_bytes(make_dicom(pixels, drop=("StudyInstanceUID", "PatientID")))
    by_id = {study.study_id: study for study in _read(films)[0]}
    assert [path.name for path in by_id["1.2"].image_paths] == ["1.dcm", "2"]
    assert (by_id["1.2"].views, by_id["1.2"].patient_id) == (("PA", "LATERAL"), "P7")
    assert (by_id["1.3"].views, by_id["1.3"].split) == (("unknown",), by_id["1.2"].split)
    assert (by_id["4.dcm"].views, by_id["4.dcm"].patient_id) == (("PA",), None)


def test_patients_with_one_study_uid_are_not_joined(films: Path, make_dicom: MakeDicom) -> None:
    pixels = np.zeros((4, 4), np.uint8)
    for name, patient in (("1", ""), ("2", "P1"), ("3", "P2"), ("4", ""), ("5", "P2")):
        (films / name).write_bytes(make_dicom(pixels, StudyInstanceUID="1.2", PatientID=patient))
    by_id = {study.study_id: study for study in _read(films)[0]}
    assert [path.name for path in by_id["1.2"].image_paths] == ["1", "2", "4"]
    assert [path.name for path in by_id["1.2 P2"].image_paths] == ["3", "5"]
    assert by_id["1.2 P2"].patient_id == "P2"
    found = {study.name: study.files for study in find_studies([str(films)])}
    for study in ("1.2", "1.2 P2"):
        assert found[study] == by_id[study].image_paths


def test_what_preprocess_wrote_there_is_no_film(films: Path) -> None:
    arguments = ["preprocess", "folder", str(films), str(films / "data"), "--size", "32", "--workers", "1"]
    assert main(arguments) == 0
    assert (films / "data-summary" / "sheet.png").is_file()
    names = ("a", "b", "c", "d", "images/e", "images/f")
    assert sorted(study.study_id for study in _read(films)[0]) == [f"{name}.png" for name in names]
    assert main([*arguments, "--overwrite"]) == 0
    assert sum(map(len, open_dataset(films / "data").values())) == 6


def test_a_table_may_have_names_without_folders(films: Path) -> None:
    (films / "x" / "images").mkdir(parents=True)
    (films / "b.png").rename(films / "x" / "images" / "b.png")
    (films / "c.png").rename(films / "x" / "c.png")
    shutil.copy(films / "x" / "c.png", films / "x" / "images" / "c.png")
    rows = "image,text\na.png,A.\nb.png,B.\nc.png,C.\nx/b.png,D.\n\"['e.png', 'f.png']\",E.\n"
    studies, _ = _read(films, table=_table(films, rows), columns=Columns(report="text"))
    by_id = {study.study_id: study for study in studies}
    assert by_id["b.png"].image_paths == (films / "x" / "images" / "b.png",)
    assert [path.name for path in by_id["e.png"].image_paths] == ["e.png", "f.png"]
    assert [(p.reason, p.detail) for p in by_id["c.png"].problems] == [
        ("several files of this name", "x/c.png and x/images/c.png")
    ]
    assert [p.reason for p in by_id["x/b.png"].problems] == ["missing image"]


def test_links_to_files_elsewhere_are_followed(films: Path) -> None:
    outside = films.parent / "other-disk.png"
    Image.new("L", (8, 8)).save(outside)
    (films / "link.png").symlink_to(outside)
    (films / "dangling.png").symlink_to(films / "none.png")
    (films / "loop.png").symlink_to(films / "loop.png")
    (films / "zero.png").symlink_to("/dev/zero")
    (films / "log.dcm").symlink_to("/proc/kmsg")
    by_id = {study.study_id: study for study in _read(films)[0]}
    for name in ("link.png", "zero.png", "log.dcm"):
        assert by_id[name].image_paths == (films / name,)  # below the root, also those that decoding refuses
    reasons = {name: by_id[name].problems[0].reason for name in ("dangling.png", "loop.png")}
    assert reasons == {"dangling.png": "missing image", "loop.png": "cannot be opened"}


def test_links_to_folders_are_followed(films: Path) -> None:
    before = {study.study_id for study in _read(films)[0]}
    elsewhere = films.parent / "elsewhere"
    (elsewhere / "deeper").mkdir(parents=True)
    Image.new("L", (8, 8)).save(elsewhere / "deeper" / "z.png")
    (films / "link").symlink_to(elsewhere)
    (films / "within").symlink_to(films / "images")  # found under its own name
    (elsewhere / "back").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(films)
    by_id = {study.study_id: study for study in _read(films)[0]}
    assert by_id.keys() - before == {"link/deeper/z.png"}
    assert by_id["link/deeper/z.png"].image_paths == (films / "link" / "deeper" / "z.png",)
    found = find_images([str(films)])
    assert [path for path in found if "link" in path.parts] == [films / "link" / "deeper" / "z.png"]
    assert len({path.resolve() for path in found}) == len(found)


def test_a_folder_that_cannot_be_listed_is_counted(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "images":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    studies, log = _read(films)
    assert len(studies) == 4
    assert _skipped(log) == {"folder cannot be read": ["images"]}


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(UsageError, match="no files in"):
        FolderSource(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        FolderSource(tmp_path / "file")
    with pytest.raises(UsageError, match="--source is empty"):
        FolderSource(tmp_path, source=" ")


# With a table.


def test_all_columns(films: Path) -> None:
    table = _table(
        films,
        "path,text,f,i,fold,who,exam,proj,tags\n"
        'a.png,Whole.,"Clear, both.",None.,train,1,s1,pa,x|y\n'
        'b.png,Whole.,"Clear, both.",None.,train,1,s1,lateral,y;z\n'
        "e.png,,Large heart.,Cardiomegaly.,VALID,2,s2,AP,\n"
        "images/f.png,,,Normal.,test,3,s3,,\n",
    )
    columns = Columns("path", "text", "f", "i", "fold", "who", "exam", "proj", "tags")
    studies, log = _read(films, table=table, columns=columns, source="mine")
    assert log.skipped == {}
    first, second, third = studies
    assert (first.study_id, first.patient_id, first.split, first.source) == ("s1", "1", "train", "mine")
    assert [path.name for path in first.image_paths] == ["a.png", "b.png"]
    assert first.views == ("PA", "LATERAL")
    assert (first.report, first.findings, first.impression) == ("Whole.", "Clear, both.", "None.")
    assert (second.split, second.report) == ("validation", "Large heart.\nCardiomegaly.")
    assert (third.report, third.findings, third.views) == ("Normal.", None, ("unknown",))
    assert [study.extra for study in studies] == [{"labels": ["x", "y", "z"]}, {"labels": []}, {"labels": []}]


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("t.csv", "image,text\na.png,Große Öffnung.\n", "utf-8"),
        ("t.csv", "image,text\r\na.png,Große Öffnung.\r\n", "utf-8-sig"),
        ("t.csv", "image;text\na.png;Große Öffnung.\n", "utf-16"),
        ("t.csv", "image,text\na.png,Große Öffnung.\n", "cp1252"),
        ("t.tsv", "image\ttext\na.png\tGroße Öffnung.\n", "utf-8"),
        ("T.JSONL", '{"image": "a.png", "text": "Große Öffnung."}\n\n', "utf-8"),
        ("t.jsonl", '{"image": ["a.png"], "text": "Große Öffnung."}', "utf-8-sig"),
    ],
)
def test_formats_and_encodings(films: Path, name: str, text: str, encoding: str) -> None:
    studies, log = _read(films, table=_table(films, text, name, encoding), columns=Columns(report="text"))
    assert [(study.study_id, study.report) for study in studies] == [("a.png", "Große Öffnung.")]
    assert any("Windows-1252" in remark for remark in log.remarks) == (encoding == "cp1252")


def test_cells() -> None:
    assert [cell_text(cell) for cell in (None, float("nan"), " NaN ", "N/A", "null", "<NA>", "")] == [""] * 7
    assert [cell_text(cell) for cell in (7, "None.", " a ", "a\0b", "\ud800")] == ["7", "None.", "a", "ab", "\ufffd"]
    assert cell_list(["a", None, "b "]) == cell_list("a| b;") == ["a", "b"]
    assert cell_list(None) == []
    assert cell_list('["Cardiomegaly", "Pleural Effusion"]') == ["Cardiomegaly", "Pleural Effusion"]
    assert cell_list("['No Finding']") == ["No Finding"]  # as pandas writes lists
    assert cell_list("[]") == cell_list("[null]") == []
    assert cell_list("[unclear] | [x]") == ["[unclear]", "[x]"]


def test_generate_reads_the_paths_of_a_table_alike(films: Path) -> None:
    for name in ("x;y.png", "back\\slash.png"):
        (films / name).write_bytes((films / "a.png").read_bytes())
    rows = ["a.png;b.png,PA;LL", "c.png|images\\e.png,PA", "x;y.png,PA", "back\\slash.png,PA", "\"['d.png']\",PA"]
    table = films / "table.csv"
    table.write_text("\n".join(["image,view", *rows]) + "\n")
    expected = [["a.png", "b.png"], ["c.png", "images/e.png"], ["x;y.png"], ["back\\slash.png"], ["d.png"]]
    studies, log = _read(films, table=table, columns=Columns(view="view", split=None))
    by_first = {study.image_paths[0].name: study for study in studies}
    assert not log.skipped
    assert [[str(path.relative_to(films)) for path in by_first[names[0]].image_paths] for names in expected] == expected
    assert (by_first["a.png"].views, by_first["c.png"].views) == (("PA", "LATERAL"), ("PA", "PA"))
    found = [[str(Path(str(file)).relative_to(films)) for file in study.files] for study in table_studies(table)]
    assert found == expected


def test_rows_that_cannot_be_used_are_counted(films: Path) -> None:
    table = _table(
        films,
        "image,text,fold\n"
        "a.png,Clear.,train\n"
        "a.png,Again.,train\n"
        ",No image.,train\n"
        "b.png,nan,train\n"
        "c.png,Clear.,holdout\n"
        "d.png,Clear.\n"
        "none.png,Clear.,test\n"
        "../table.csv,Clear.,test\n"
        "/etc/passwd,Clear.,test\n"
        "\n",
    )
    studies, log = _read(films, table=table, columns=Columns(report="text", split="fold"))
    assert _skipped(log) == {
        "id seen before": ["a.png"],
        "no image listed": ["table.csv:4"],
        "unknown split": ["c.png"],
        "row and header differ in length": ["table.csv:7"],
        "empty report": ["b.png"],
    }
    problems = {study.study_id: study.problems[0].reason for study in studies if study.problems}
    outside = "path outside the data folder"
    assert problems == {"none.png": "missing image", "../table.csv": outside, "/etc/passwd": outside}
    assert [study.study_id for study in studies if not study.problems] == ["a.png"]


def test_rows_of_one_study_that_differ(films: Path) -> None:
    table = _table(
        films, "image,text,exam,who\na.png,One.,s,1\nb.png,Two.,s,1\nc.png,One.,s,2\na.png,One.,s,1\nd.png,One.,s,1\n"
    )
    columns = Columns(report="text", study="exam", patient="who")
    studies, log = _read(films, table=table, columns=columns)
    assert (log.read, log.skipped) == (1, {})
    assert [path.name for path in studies[0].image_paths] == ["a.png", "d.png"]
    differs = "row differs from its study"
    assert [(problem.path, problem.reason) for problem in studies[0].problems] == [
        ("b.png", differs), ("c.png", differs), ("a.png", "listed twice"),
    ]  # fmt: skip
    assert studies[0].problems[1].detail == "table.csv:4: another patient"


def test_rows_of_a_study_without_a_split_are_one_study(films: Path) -> None:
    rows = "image,exam,fold\na.png,s,\nb.png,s,train\nc.png,t,x\nd.png,t,x\n"
    studies, log = _read(films, table=_table(films, rows), columns=Columns(study="exam", split="fold"))
    assert (log.read, _skipped(log)) == (2, {"unknown split": ["t"]})
    assert [path.name for path in studies[0].image_paths] == ["b.png"]
    assert studies[0].problems == (ImageProblem("a.png", "unknown split", "table.csv:2: empty"),)


def test_paths_written_on_windows(films: Path) -> None:
    studies, _ = _read(films, table=_table(films, "image\nimages\\e.png\n"))
    assert [path.name for path in studies[0].image_paths] == ["e.png"]


def test_dicom_in_a_table_has_its_patient_and_view(films: Path, make_dicom: MakeDicom) -> None:
    (films / "x.dcm").write_bytes(make_dicom(np.zeros((4, 4), np.uint8), ViewPosition="AP", PatientID="P9"))
    table = _table(films, "image,view\nx.dcm,\n")
    assert [(s.patient_id, s.views) for s in _read(films, table=table)[0]] == [("P9", ("AP",))]
    table = _table(films, "image,view\nx.dcm,PA\n")
    columns = Columns(view="view", patient="view")
    assert [(s.patient_id, s.views) for s in _read(films, table=table, columns=columns)[0]] == [("PA", ("PA",))]
    # As a scanner names it, too.
    (films / "x.dcm").rename(films / "IM0001")
    table = _table(films, "image,view\nIM0001,\n")
    assert [(s.patient_id, s.views) for s in _read(films, table=table)[0]] == [("P9", ("AP",))]


@pytest.mark.parametrize(
    ("text", "name", "columns", "message"),
    [
        ("path,text\na.png,x\n", "t.csv", {}, r"no column 'image' \(--image-column\); its columns: path, text"),
        ("image\na.png\n", "t.csv", {"report": "text"}, r"no column 'text' \(--report-column\); its columns: image"),
        ("image,image\na.png,b.png\n", "t.csv", {}, "several columns named 'image'"),
        ("", "t.csv", {}, "is empty"),
        ("image\n", "t.csv", {}, "has no rows"),
        ("image\n\n , \n", "t.csv", {}, "has no rows"),
        ('image,text\na.png,"never closed\nb.png,x\n', "t.csv", {}, r"t\.csv:2: not valid CSV"),
        ('{"image": "a.png"}\n{"image"\n', "t.jsonl", {}, r"t\.jsonl:2: not valid JSON"),
        ("[1]\n", "t.jsonl", {}, r"t\.jsonl:1: not a JSON object"),
        ("[" * 100_000, "t.jsonl", {}, r"t\.jsonl:1: (nested|not)"),
        ("image\na.png\n", "t.xlsx", {}, "is not a table"),
    ],
)
def test_tables_that_cannot_be_used(films: Path, text: str, name: str, columns: dict[str, str], message: str) -> None:
    with pytest.raises((UsageError, RunError), match=message):
        FolderSource(films, table=_table(films, text, name), columns=Columns(**columns))


def test_a_message_names_only_some_of_many_columns(films: Path) -> None:
    for header, end in (("x" * 10**6, f"its columns: {'x' * 60}"), ("a," * 999 + "b", "a, a, and 950 more")):
        with pytest.raises(UsageError, match="no column 'image'") as raised:
            FolderSource(films, table=_table(films, f"{header}\n{header}\n"), columns=Columns())
        assert raised.value.message.endswith(end)


def test_a_missing_table_is_refused(films: Path) -> None:
    with pytest.raises(UsageError, match="no such table"):
        read_table(films / "none.csv")
    with pytest.raises(UsageError, match="is not a table"):
        read_table(films)


# Splits.


def test_a_split_is_drawn_by_patient_and_seed() -> None:
    patients = [f"p{number}" for number in range(200)]
    splits = draw_splits(patients, (0.8, 0.1, 0.1), 0)
    assert splits == draw_splits(reversed(patients * 3), (0.8, 0.1, 0.1), 0)
    assert [list(splits.values()).count(name) for name in ("train", "validation", "test")] == [160, 20, 20]
    assert splits != draw_splits(patients, (0.8, 0.1, 0.1), 1)


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (1, (0.8, 0.1, 0.1), [1, 0, 0]),
        (2, (0.8, 0.1, 0.1), [1, 1, 0]),
        (3, (0.8, 0.1, 0.1), [1, 1, 1]),
        (10, (0.8, 0.1, 0.1), [8, 1, 1]),
        (7, (0.5, 0.0, 0.5), [4, 0, 3]),
        (5, (1.0, 0.0, 0.0), [5, 0, 0]),
        (5, (0.0, 0.0, 1.0), [0, 0, 5]),
        (0, (0.8, 0.1, 0.1), [0, 0, 0]),
    ],
)
def test_small_splits(count: int, fractions: tuple[float, ...], expected: list[int]) -> None:
    splits = list(draw_splits([str(number) for number in range(count)], fractions, 0).values())
    assert [splits.count(name) for name in ("train", "validation", "test")] == expected


def test_fractions() -> None:
    assert parse_fractions("0.8, 0.1,0.1") == (0.8, 0.1, 0.1)
    assert parse_fractions("1") == (1.0, 0.0, 0.0)
    for text in ("", "a", "0.5,0.4", "0.5,0.5,0.5", "2,-1", "0.25,0.25,0.25,0.25", "nan", "80,10,10"):
        with pytest.raises(UsageError, match="--split"):
            parse_fractions(text)


def test_studies_without_a_patient_are_counted() -> None:
    assert drawn_remark((1, 0, 0), 0, 1).endswith(
        "100, 0, 0 percent; 1 study without a patient: each counts as one patient."
    )
    assert drawn_remark((1, 0, 0), 0) == "Split drawn by patient with seed 0: 100, 0, 0 percent."


def test_patients_stay_together(films: Path) -> None:
    rows = "".join(f"{name}.png,{name},{number // 2}\n" for number, name in enumerate("abcdef"))
    table = _table(films, "image,text,who\n" + rows)
    studies, _ = _read(films, table=table, columns=Columns(report="text", patient="who"), fractions=(0.5, 0.2, 0.3))
    splits: dict[str | None, set[str]] = {}
    for study in studies:
        splits.setdefault(study.patient_id, set()).add(study.split)
    assert [len(names) for names in splits.values()] == [1, 1, 1]
    assert len(_read(films, table=table, columns=Columns(report="text", patient="who"), limit=1)[0]) == 3


# As a dataset.


def test_written_with_notes_and_remarks(films: Path, make_dicom: MakeDicom, tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (films / "leg.dcm").write_bytes(make_dicom(pixels, BodyPartExamined="LEG", StudyInstanceUID="1.2"))
    (films / "no.dcm").write_bytes(make_dicom(None, StudyInstanceUID="1.3", Rows=4, Columns=4, BitsAllocated=8))
    recipe = PreprocessRecipe(stage="preprocess", workers=1)
    manifest = preprocess(FolderSource(films), tmp_path / "out", recipe)
    assert (manifest["studies_read"], manifest["studies_written"], manifest["images"]) == (8, 7, 7)
    assert manifest["skipped"]["no pixel data"]["examples"][0]["path"] == "no.dcm"
    assert manifest["notes"] == {
        "not chest": {
            "unit": "image",
            "count": 1,
            "examples": [{"id": "1.2", "path": "leg.dcm", "detail": "body part LEG"}],
        }
    }
    assert len(manifest["remarks"]) == 2
    json.dumps(manifest)


def test_labels_are_a_column(films: Path, tmp_path: Path) -> None:
    table = _table(films, "image,text,tags\na.png,Clear.,\nb.png,Large heart.,cardiomegaly|oedema\n")
    recipe = PreprocessRecipe(stage="preprocess", workers=1)
    source = FolderSource(films, table=table, columns=Columns(report="text", labels="tags"), fractions=(1, 0, 0))
    preprocess(source, tmp_path / "out", recipe)
    rows = open_dataset(tmp_path / "out")["train"]
    assert rows["labels"][:] == [[], ["cardiomegaly", "oedema"]]
    assert "unchanged from the table" in (tmp_path / "out" / "README.md").read_text()


def test_real_folder(shared_data: Path, tmp_path: Path) -> None:
    recipe = PreprocessRecipe(stage="preprocess", workers=1)
    manifest = preprocess(FolderSource(shared_data / "dicom"), tmp_path / "out", recipe)
    assert {reason: entry["count"] for reason, entry in manifest["skipped"].items()} == {
        "no pixel data": 1,
        "not an image": 1,
    }
    assert {note: entry["count"] for note, entry in manifest["notes"].items()} == {"looks inverted": 1, "not chest": 1}
    assert (manifest["studies_written"], manifest["images"]) == (3, 5)


def test_columns_of_the_context(films: Path) -> None:
    text = 'image,id,why,age,sex\na.png,1,"Cough, fever",045Y,F\nb.png,1,ignored,,F\nc.png,2,NaN,,\n'
    columns = Columns(study="id", indication="why", age="age", sex="sex")
    source = FolderSource(films, table=_table(films, text), columns=columns)
    assert {name: column.kind for name, column in source.columns.items()} == dict.fromkeys(
        ("indication", "age", "sex"), "text"
    )
    studies, _ = _read(films, table=_table(films, text), columns=columns)
    assert {study.study_id: study.extra for study in studies} == {
        "1": {"indication": "Cough, fever", "age": "045Y", "sex": "F"},
        "2": {"indication": None, "age": None, "sex": None},
    }
    with pytest.raises(UsageError, match=r"no column 'technique' \(--technique-column\)"):
        _read(films, table=_table(films, text), columns=Columns(technique="technique"))
