"""What every source has: sections, views, shortest report, duplicates, leakage, dry run, export, backends, kill -9."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from emrrg_cli.app import main
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.raster import encode
from emrrg_cli.imaging.views import projection
from emrrg_cli.ingest.duplicates import NEAR, find_duplicates, hash_image
from emrrg_cli.ingest.preprocess import dry_run, preprocess
from emrrg_cli.ingest.sources.r2gen import R2GenSource
from emrrg_cli.ingest.study import ImportLog, Study
from emrrg_cli.recipe.preprocessing import PreprocessRecipe
from emrrg_cli.vocabulary import Split


class _Source:
    """Studies of a test, as they are."""

    image_folders: tuple[Path, ...] = ()

    def __init__(self, root: Path, studies: list[Study]) -> None:
        self.name, self.root, self._studies = "mine", root.resolve(), studies

    def __len__(self) -> int:
        return len(self._studies)

    def studies(self, log: ImportLog) -> Iterator[Study]:
        for study in self._studies:
            log.read += 1
            yield study


def _smooth(seed: int, size: int = 160) -> Image.Image:
    """A picture of its own: blots, as a film is."""
    rough = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    return Image.fromarray(rough).resize((size, size), Image.Resampling.BICUBIC)


def _study(root: Path, name: str, split: Split = "train", patient: str | None = None, **changes: Any) -> Study:
    root.mkdir(exist_ok=True)
    views = changes.pop("views", ("PA",))
    paths = []
    for number in range(len(views)):
        path = root.resolve() / f"{name}-{number}.png"
        if not path.exists():
            _smooth(zlib.crc32(path.name.encode())).save(path)
        paths.append(path)
    texts = {"findings": f"Lungs of {name} are clear.", "impression": "Normal.", "report": f"All of {name}."}
    return Study(
        study_id=name, patient_id=patient, split=split, image_paths=tuple(paths), views=views, source="mine",
        **(texts | changes),
    )  # fmt: skip


def _recipe(**settings: Any) -> PreprocessRecipe:
    return PreprocessRecipe(stage="preprocess", **({"workers": 1} | settings))


def _run(source: _Source, out: Path, *, allow_leakage: bool = False, **settings: Any) -> dict[str, Any]:
    return preprocess(source, out, _recipe(**settings), allow_leakage=allow_leakage)


def _rows(out: Path, split: str = "train") -> Any:
    return open_dataset(out)[split]


def _counts(manifest: dict[str, Any], kind: str = "skipped") -> dict[str, tuple[int, str]]:
    return {reason: (entry["count"], entry["unit"]) for reason, entry in manifest[kind].items()}


# Sections, views, words.


@pytest.mark.parametrize(
    ("section", "reports", "skipped"),
    [
        ("report", ["All of a.", "All of b.", "All of c."], {}),
        ("findings", ["Lungs of a are clear.", "Lungs of c are clear."], {"no findings": (1, "study")}),
        ("impression", ["Normal.", "Normal."], {"no impression": (1, "study")}),
        ("both", ["Lungs of a are clear. Normal.", "Normal.", "Lungs of c are clear."], {}),
    ],
)
def test_section(tmp_path: Path, section: str, reports: list[str], skipped: dict[str, Any]) -> None:
    root = tmp_path / "raw"
    studies = [_study(root, "a"), _study(root, "b", findings=" "), _study(root, "c", impression=None)]
    manifest = _run(_Source(root, studies), tmp_path / "out", section=section)
    assert _rows(tmp_path / "out")["report"][:] == reports
    assert _counts(manifest) == skipped
    assert manifest["studies_read"] == manifest["studies_written"] + manifest["studies_skipped"] == 3


@pytest.mark.parametrize(
    ("view", "kind"),
    [
        ("PA", "frontal"), ("AP LLD", "frontal"), ("ap", "frontal"), ("Frontal", "frontal"), ("RLD", "frontal"),
        ("postero-anterior", "frontal"), ("LATERAL", "lateral"), ("XTABLE LATERAL", "lateral"), ("LL", "lateral"),
        ("lat.", "lateral"), ("LAO", "oblique"), ("SWIMMERS", "oblique"), ("unknown", "unknown"), ("", "unknown"),
        ("KUB", "unknown"), ("LATERALITY", "unknown"),
    ],
)  # fmt: skip
def test_projection(view: str, kind: str) -> None:
    assert projection(view) == kind


def test_views(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    studies = [
        _study(root, "a", views=("PA", "LATERAL")),
        _study(root, "b", views=("LL",)),
        _study(root, "c", views=("unknown", "SWIMMERS")),
    ]
    manifest = _run(_Source(root, studies), tmp_path / "frontal", views="frontal")
    assert _rows(tmp_path / "frontal")["views"][:] == [["PA"], ["unknown"]]
    assert _counts(manifest) == {"no frontal view": (1, "study"), "not a frontal view": (2, "image")}
    assert _counts(manifest, "notes") == {"view not known, kept as frontal": (1, "image")}
    assert manifest["skipped"]["not a frontal view"]["examples"][0] == {
        "id": "a",
        "path": "a-1.png",
        "detail": "LATERAL",
    }
    manifest = _run(_Source(root, studies), tmp_path / "lateral", views="lateral")
    assert _rows(tmp_path / "lateral")["views"][:] == [["LATERAL"], ["LL"], ["unknown"]]


def test_min_words(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    studies = [_study(root, "a", report="one two three"), _study(root, "b", report="one two"), _study(root, "c")]
    manifest = _run(_Source(root, studies), tmp_path / "out", min_words=3)
    assert _rows(tmp_path / "out")["study_id"][:] == ["a", "c"]
    assert manifest["skipped"]["report too short"]["examples"] == [{"id": "b", "detail": "2 of 3 words"}]


# Leakage.


def test_a_patient_in_two_splits_is_an_error_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "raw"
    patients = [("a", "train", "p1"), ("b", "test", "p1"), ("c", "validation", "p1"), ("d", "train", "p2")]
    patients += [("e", "validation", "p2"), ("f", "train", "p3"), ("g", "train", None), ("h", "test", None)]
    studies = [_study(root, name, split, patient) for name, split, patient in patients]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *args, **options: pytest.fail("an image was opened"))
        with pytest.raises(RunError, match=r"2 patients are in more than one split: p1 \(study b\), p2 \(study e\)"):
            _run(_Source(root, studies), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [root]
    manifest = _run(_Source(root, studies), tmp_path / "out", allow_leakage=True)
    assert manifest["studies_written"] == 8
    assert manifest["remarks"] == ["Patients in more than one split (--allow-leakage): 2."]


# Duplicates.


def _hashes(*images: Image.Image) -> bytes:
    return b"".join(hash_image(image, encode(image, "jpeg", 95)) for image in images)


def _found(images: list[Image.Image], study: list[int] | None = None, rank: list[int] | None = None) -> set[Any]:
    numbers = np.array(study or range(len(images)), np.int64)
    ranks = np.array(rank or [0] * len(images), np.int64)
    return {(d.index, d.first, d.exact) for d in find_duplicates(_hashes(*images), numbers, ranks)}


def test_only_copies_of_a_picture_are_duplicates() -> None:
    pictures = [_smooth(seed, 200) for seed in range(20)]
    first = pictures[0]
    darker = ImageEnhance.Brightness(first).enhance(0.9)
    again = Image.open(io.BytesIO(encode(first, "jpeg", 60))).convert("L")
    images = [*pictures, first.copy(), first.resize((100, 100)), darker, again]
    assert _found(images) == {(20, 0, True), (21, 0, False), (22, 0, False), (23, 0, False)}
    bits: NDArray[np.uint8] = np.unpackbits(np.frombuffer(_hashes(*pictures), np.uint8).reshape(20, -1)[:, 8:], axis=1)
    distances = [int((bits[a] != bits[b]).sum()) for a in range(20) for b in range(a)]
    assert min(distances) > 3 * NEAR


def test_the_first_rank_and_near_views_of_a_study_are_kept() -> None:
    one, other = _smooth(1, 200), _smooth(2, 200)
    near = one.resize((150, 150))
    assert _found([one, near], study=[0, 0]) == set()
    assert _found([one, one], study=[0, 0]) == {(1, 0, True)}
    assert _found([one, other, one], rank=[2, 0, 0]) == {(0, 2, True)}
    assert _found([near, one, one], rank=[0, 2, 1]) == {(1, 0, False), (2, 0, False)}
    assert _found([]) == set()


def test_every_near_pair_is_found() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, 32, dtype=np.uint8)
    for _ in range(200):
        bits = np.unpackbits(picture)
        bits[rng.choice(256, NEAR, replace=False)] ^= 1
        other = np.packbits(bits)
        hashes = b"11111111" + picture.tobytes() + b"22222222" + other.tobytes()
        assert len(find_duplicates(hashes, np.arange(2), np.zeros(2, np.int64))) == 1


def _with_duplicates(root: Path) -> _Source:
    studies = [
        _study(root, "a", views=("PA", "LATERAL"), report="Same words."),
        _study(root, "b", report="Same  words."),
        _study(root, "c", "test", report="Same words."),
        _study(root, "d", report="Others."),
    ]
    shutil.copy(root / "a-0.png", root / "c-0.png")  # exactly, in another split
    Image.open(root / "b-0.png").resize((150, 150)).save(root / "d-0.png")  # nearly, in the same
    return _Source(root, studies)


def test_duplicates_are_reported(tmp_path: Path) -> None:
    source = _with_duplicates(tmp_path / "raw")
    manifest = _run(source, tmp_path / "out", dedupe="report")
    images = manifest["duplicates"]["images"]
    assert (images["exact"], images["near"], images["across_splits"], images["dropped"]) == (1, 1, 1, False)
    assert images["examples"] == [
        {
            "id": "a", "path": "a-0.png", "split": "train",
            "as_id": "c", "as_path": "c-0.png", "as_split": "test", "exact": True,
        }
    ]  # fmt: skip
    assert manifest["duplicates"]["reports"] == {"repeated": 2, "across_splits": 1}
    assert manifest["studies_written"] == 4
    assert any(remark.startswith("Leakage: a-0.png of study a (train)") for remark in manifest["remarks"])
    plain = _run(source, tmp_path / "plain")
    assert "duplicates" not in plain
    for path in (tmp_path / "plain" / "data").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "data" / path.name).read_bytes()


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    manifest = _run(_with_duplicates(tmp_path / "raw"), tmp_path / "out", dedupe="drop", studies_per_shard=2)
    train, test = _rows(tmp_path / "out"), _rows(tmp_path / "out", "test")
    assert [[image["path"] for image in row["images"]] for row in train] == [["a-1.png"], ["b-0.png"]]
    assert train["views"][:] == [["LATERAL"], ["PA"]]
    assert test["study_id"][:] == ["c"]  # published test sets stay as they are
    # The second shard of train held nothing but d, of which nothing is left.
    assert manifest["splits"]["train"] == {"studies": 2, "images": 2, "shards": 1}
    assert (manifest["studies_read"], manifest["studies_written"], manifest["studies_skipped"]) == (4, 3, 1)
    assert _counts(manifest) == {"duplicate image": (1, "image"), "only duplicate images": (1, "study")}
    assert manifest["skipped"]["duplicate image"]["examples"] == [
        {"id": "a", "path": "a-0.png", "detail": "as test: c, c-0.png"}
    ]


# Dry run and export.


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run decodes its whole sample, however slow the machine is."""
    monkeypatch.setattr("emrrg_cli.ingest.preprocess._SAMPLE_SECONDS", 3600.0)


@pytest.mark.usefixtures("unhurried")
def test_dry_run(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    studies = [_study(root, f"s{n}", "test" if n % 5 == 0 else "train", views=("PA", "LL")) for n in range(20)]
    (root / "s3-1.png").write_text("not an image")
    plan = dry_run(_Source(root, studies), tmp_path / "out", _recipe(min_words=3))
    assert plan["splits"] == {"train": {"studies": 16, "images": 32}, "test": {"studies": 4, "images": 8}}
    assert plan["views"] == {"frontal": 20, "lateral": 20}
    assert (plan["sample"]["studies"], plan["sample"]["images"]) == (20, 39)
    assert plan["sample"]["problems"]["not an image"]["examples"] == [{"id": "s3", "path": "s3-1.png"}]
    assert plan["sample"]["bytes"] > 0
    assert list(tmp_path.iterdir()) == [root]


def test_a_dry_run_whose_time_is_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "raw"
    monkeypatch.setattr("emrrg_cli.ingest.preprocess._SAMPLE_SECONDS", -1.0)
    plan = dry_run(_Source(root, [_study(root, "a"), _study(root, "b")]), tmp_path / "out", _recipe())
    assert plan["splits"] == {"train": {"studies": 2, "images": 2}}  # these are counted, not decoded
    assert (plan["sample"]["studies"], plan["sample"]["bytes"]) == (0, 0)


@pytest.mark.usefixtures("unhurried")
def test_dry_run_from_the_command_line(tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preprocess", "r2gen", str(tiny_r2gen), str(tmp_path / "out"), "--dry-run"]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "to be written │ 24 │ 36" in printed
    assert "Views: 36 unknown." in printed
    assert "24 studies from all parts of the source decoded as a sample" in printed
    assert "Nothing was written" in printed
    assert main([*arguments, "--json", "--section", "findings"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["splits"], plan["skipped"]["no findings"]["count"]) == ({}, 24)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_exported_annotation_is_read_back(tiny_r2gen: Path, tmp_path: Path) -> None:
    exported = tmp_path / "r2gen" / "annotation.json"
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--size", "64", "--format", "png", "--workers", "1"]
    assert (
        main(["preprocess", "r2gen", str(tiny_r2gen), str(first), *options, "--export-annotation", str(exported)]) == 0
    )
    assert main(["preprocess", "r2gen", str(exported), str(again), *options]) == 0
    for split in ("train", "validation", "test"):
        one, other = _rows(first, split), _rows(again, split)
        assert one.remove_columns("images")[:] == other.remove_columns("images")[:]
        for row, same in zip(one["images"], other["images"], strict=True):
            assert [image["bytes"] for image in row] == [image["bytes"] for image in same]
    content = json.loads(exported.read_text())
    assert {key: len(rows) for key, rows in content.items()} == {"train": 16, "val": 4, "test": 4}
    assert content["val"][0]["split"] == "val"
    # Not beside images of something else.
    arguments = ["preprocess", "r2gen", str(tiny_r2gen), str(tmp_path / "third"), *options]
    assert main([*arguments, "--export-annotation", str(tiny_r2gen / "other.json")]) == 2
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("place", ["dataset", "annotation", "page"])
def test_a_read_only_place_is_found_before_the_work(
    tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    closed, opened = tmp_path / "closed", tmp_path / "open"
    closed.mkdir()
    out = (closed if place == "dataset" else opened) / "out"
    options = {"annotation": ["--export-annotation", str(closed / "a.json")], "page": ["--summary"]}.get(place, [])
    (opened / "out-summary").mkdir(parents=True)
    shut = opened / "out-summary" if place == "page" else closed
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shut)
    assert main(["preprocess", "r2gen", str(tiny_r2gen), str(out), *options]) == 1
    assert f"{shut} is read-only for you" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["closed", "open", "out-summary"]


def test_an_export_replaces_only_an_exported_annotation(
    tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out, exported = tmp_path / "raw", tmp_path / "out", tmp_path / "r2gen" / "annotation.json"
    shutil.copytree(tiny_r2gen, raw)
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    arguments = ["preprocess", "r2gen", str(raw), str(out), "--size", "64", "--workers", "1", "--no-summary"]

    def refused(*more: str) -> str:
        capsys.readouterr()
        assert main([*arguments, *more]) == 2
        return " ".join(capsys.readouterr().err.split())

    for more in ([], ["--overwrite"]):
        told = "so --overwrite does not replace it" if more else "annotation.json exists"
        assert told in refused("--export-annotation", str(raw / "annotation.json"), *more)
        assert "is replaced as a whole" in refused("--export-annotation", str(out / "a.json"), *more)
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == before
    assert not out.exists()
    assert main([*arguments, "--export-annotation", str(exported)]) == 0
    first = exported.read_bytes()
    assert "annotation.json exists" in refused("--export-annotation", str(exported))
    assert main([*arguments, "--overwrite", "--export-annotation", str(exported)]) == 0
    assert exported.read_bytes() == first
    assert not [path for path in exported.parent.rglob("*") if path.name.endswith(".growing")]


def test_a_summary_that_cannot_be_written_stops_the_run_early(
    tiny_r2gen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out-summary").touch()
    arguments = ["preprocess", "r2gen", str(tiny_r2gen), str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 2
    assert "out-summary is a file Move it, or use --no-summary." in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--no-summary"]) == 0


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_paths_that_are_not_utf8_are_recorded_with_escapes(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    root.mkdir()
    _smooth(1).save(root / "a.png")
    (root / "t.csv").write_text("image,report\na.png,Clear.\n")
    table = ["--table", str(root / "t.csv"), "--image-column", "image", "--report-column", "report"]
    arguments = ["preprocess", "folder", str(root), str(tmp_path / "out"), *table, "--workers", "1"]
    assert main([*arguments, "--split", "1,0,0"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"]["table"].endswith("caf\\udce9/t.csv")


def test_ids_that_are_not_file_names(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    studies = [
        _study(root, "plain"),
        Study("../../up", "p", "test", (root / "plain-0.png",), ("PA",), None, None, None, "mine"),
        Study("a/b", None, "test", (root / "plain-0.png",), ("PA",), None, None, "x", "mine"),
    ]
    preprocess(_Source(root, studies), tmp_path / "out", _recipe(), annotation=tmp_path / "e" / "a.json")
    rows = json.loads((tmp_path / "e" / "a.json").read_text())["test"]
    assert [row["id"] for row in rows] == ["../../up", "a/b"]
    assert (rows[0]["report"], rows[0]["subject_id"]) == ("", "p")
    for row in rows:
        [path] = row["image_path"]
        assert (tmp_path / "e" / "images" / path).resolve().parent.parent == (tmp_path / "e" / "images").resolve()
        assert (tmp_path / "e" / "images" / path).is_file()


# Backends and interruptions.


def _many(root: Path, count: int) -> Path:
    """R2Gen's layout with `count` studies of two films each in three splits, every ninth broken."""
    (root / "images").mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for number in range(count):
        paths = [f"{number}-{view}.png" for view in range(2)]
        for view, path in enumerate(paths):
            _smooth(2 * number + view).save(root / "images" / path)
        if number % 9 == 4:
            (root / "images" / paths[0]).write_bytes(b"text")
            if number % 2:
                (root / "images" / paths[1]).unlink()
        split = ("train", "train", "train", "val", "test")[number % 5]
        rows[split].append({"id": f"s{number}", "report": f"Report {number}.", "image_path": paths})
    (root / "annotation.json").write_text(json.dumps(rows))
    return root


def _content(out: Path) -> dict[str, bytes]:
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    for key in ("created", "seconds"):
        del manifest[key]
    del manifest["recipe"]["workers"]
    return files | {"manifest": json.dumps(manifest).encode()}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("many")
    root = _many(folder / "raw", 120)
    preprocess(R2GenSource(root), folder / "out", _recipe(size=64, studies_per_shard=10, dedupe="drop"))
    return root, _content(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "workers"), [("loky", 2), ("loky", 3), ("threading", 2), ("sequential", 1)])
def test_the_same_for_every_backend(
    many: tuple[Path, dict[str, bytes]], backend: str, workers: int, tmp_path: Path
) -> None:
    recipe = _recipe(size=64, studies_per_shard=10, dedupe="drop", workers=workers)
    preprocess(R2GenSource(many[0]), tmp_path / "out", recipe, backend=backend)
    assert _content(tmp_path / "out") == many[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="distributed is not installed")
def test_the_same_on_a_dask_cluster(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    import distributed

    recipe = _recipe(size=64, studies_per_shard=10, dedupe="drop", workers=2)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        preprocess(R2GenSource(many[0]), tmp_path / "out", recipe, scheduler=cluster.scheduler_address)
        assert _content(tmp_path / "out") == many[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "nosuch"], "no joblib backend is named 'nosuch'"),
        (["--backend", "multiprocessing"], "Use loky"),
        (["--backend", "loky", "--scheduler", "tcp://127.0.0.1:1"], "--scheduler is for --backend dask"),
        (["--section", "history"], "section"),
        (["--views", "top"], "views"),
        (["--dedupe", "yes"], "dedupe"),
        (["--size", "big"], "size"),
        (["--size", "8"], "size must be 32 or more"),
        (["--quality", "0"], "quality"),
        (["--format", "gif"], "format"),
        (["--min-words", "-1"], "--min-words"),
    ],
)
def test_wrong_options(
    tiny_r2gen: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preprocess", "r2gen", str(tiny_r2gen), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_dask_that_is_not_installed(tiny_r2gen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match="needs the package distributed") as error:
        preprocess(R2GenSource(tiny_r2gen), tmp_path / "out", _recipe(), backend="dask")
    assert "emrrg[dask]" in str(error.value)


# Ends itself as `kill -9` does, while threads still decode: after its fifth shard.
_KILLED = """
import os, signal, sys
from emrrg_cli.app import main
from emrrg_cli.ingest import shards
end_shard, ended = shards.SplitShards.end_shard, []
def killed(split):
    end_shard(split)
    ended.append(split)
    if len(ended) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
shards.SplitShards.end_shard = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_run_continues(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    settings = ["--size", "64", "studies_per_shard=10", "--dedupe", "drop", "--workers", "2", "--backend", "threading"]
    arguments = ["preprocess", "r2gen", str(many[0]), str(out), *settings]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((work / "journal").glob("*.json"))) == 5
    assert not out.exists()
    assert main(arguments) == 0
    # Five shards of ten studies, and three without a readable image.
    assert "53 of 120 studies were finished by an earlier run; continuing after them" in " ".join(
        capfd.readouterr().err.split()
    )
    assert not work.exists()
    for name, data in many[1].items():
        if name != "manifest":  # it holds the options
            assert (out / name).read_bytes() == data


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_continue(
    number: signal.Signals,
    code: int,
    many: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from emrrg_cli.errors import Interrupted
    from emrrg_cli.ingest import shards

    end_shard = shards.SplitShards.end_shard

    def terminated(split: shards.SplitShards) -> None:
        end_shard(split)
        os.kill(os.getpid(), number)

    recipe = _recipe(size=64, studies_per_shard=10, dedupe="drop")
    with monkeypatch.context() as patch:
        patch.setattr(shards.SplitShards, "end_shard", terminated)
        with pytest.raises(Interrupted, match="continues after the first 10 studies") as error:
            preprocess(R2GenSource(many[0]), tmp_path / "out", recipe)
    assert error.value.exit_code == code
    preprocess(R2GenSource(many[0]), tmp_path / "out", recipe)
    assert _content(tmp_path / "out") == many[1]


@pytest.mark.slow
def test_a_replaced_file_starts_a_new_run(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "raw"
    shutil.copytree(many[0], root)
    recipe = _recipe(size=64, studies_per_shard=10, dedupe="drop")

    def stopped(*args: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("emrrg_cli.ingest.dataset_writer.put_directory", stopped)
        with pytest.raises(KeyboardInterrupt):
            preprocess(R2GenSource(root), tmp_path / "out", recipe)
    assert (tmp_path / ".out.partial" / "finish.json").exists()
    _smooth(999).save(root / "images" / "0-0.png")
    with pytest.raises(UsageError, match="unfinished run with other data or settings"):
        preprocess(R2GenSource(root), tmp_path / "out", recipe)
    preprocess(R2GenSource(root), tmp_path / "out", recipe, overwrite=True)
    assert _content(tmp_path / "out") != many[1]
    [row] = [row for row in _rows(tmp_path / "out") if row["study_id"] == "s0"]
    written = Image.open(io.BytesIO(row["images"][0]["bytes"]))
    expected = np.asarray(_smooth(999).resize((64, 64), Image.Resampling.HAMMING, reducing_gap=1.5), int)
    assert np.abs(np.asarray(written, int) - expected).mean() < 3
