"""From a source to a dataset directory: images, accounts, order, and bytes that do not depend on the workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.manifest import read_manifest
from emrrg_cli.errors import Interrupted, RunError, UsageError
from emrrg_cli.imaging.read import read_image
from emrrg_cli.ingest.preprocess import preprocess
from emrrg_cli.ingest.sources.r2gen import R2GenSource
from emrrg_cli.recipe.preprocessing import PreprocessRecipe


def _run(root: Path, out: Path, *, overwrite: bool = False, **settings: Any) -> dict[str, Any]:
    recipe = PreprocessRecipe(stage="preprocess", **({"workers": 1} | settings))
    return preprocess(R2GenSource(root), out, recipe, overwrite=overwrite)


def _annotate(root: Path, studies: dict[str, list[str]]) -> Path:
    root.mkdir(exist_ok=True)
    rows = [{"id": study_id, "report": "Clear.", "image_path": paths} for study_id, paths in studies.items()]
    (root / "annotation.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
    return root


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))


def test_manifest(tiny_r2gen: Path, tiny_dataset: Path) -> None:
    manifest = read_manifest(tiny_dataset)
    assert manifest["splits"] == {
        "train": {"studies": 16, "images": 24, "shards": 1},
        "validation": {"studies": 4, "images": 6, "shards": 1},
        "test": {"studies": 4, "images": 6, "shards": 1},
    }
    assert (manifest["studies_read"], manifest["studies_written"], manifest["studies_skipped"]) == (24, 24, 0)
    assert (manifest["source"], manifest["images"], manifest["skipped"]) == ("r2gen", 36, {})
    assert manifest["root"] == str(tiny_r2gen.resolve())
    assert manifest["recipe"]["size"] == 512
    assert {"emrrg", "python", "libraries", "options", "created", "seconds"} <= set(manifest)


def test_the_same_bytes_for_any_number_of_workers(tiny_r2gen: Path, tmp_path: Path) -> None:
    # More studies than one block and than one worker takes: the rows of the fixture again under other names.
    annotation = json.loads((tiny_r2gen / "annotation.json").read_text())
    train = [row | {"id": f"{row['id']}-{n}"} for n in range(10) for row in annotation["train"]]
    root = tmp_path / "raw"
    root.mkdir()
    (root / "annotation.json").write_text(json.dumps(annotation | {"train": train}))
    shutil.copytree(tiny_r2gen / "images", root / "images")
    for workers in (1, 3):
        _run(root, tmp_path / f"out{workers}", workers=workers, size=64, studies_per_shard=50)
    files = sorted(path.relative_to(tmp_path / "out1") for path in (tmp_path / "out1" / "data").iterdir())
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "out1" / file).read_bytes() == (tmp_path / "out3" / file).read_bytes()
    names = open_dataset(tmp_path / "out3")["train"]["study_id"][:]
    assert names == [row["id"] for row in train]


def test_plain_jpegs_keep_their_bytes(tmp_path: Path) -> None:
    root = _annotate(tmp_path / "raw", {"x": ["plain.jpg", "large.jpg", "progressive.jpg", "colour.jpg", "grey.png"]})
    _noise(80, 64).save(root / "plain.jpg", quality=80)
    _noise(200, 100).save(root / "large.jpg")
    _noise(80, 64).save(root / "progressive.jpg", progressive=True)
    _noise(80, 64).convert("RGB").save(root / "colour.jpg")
    _noise(80, 64).save(root / "grey.png")
    _run(root, tmp_path / "out", size=64)
    row = open_dataset(tmp_path / "out")["train"][0]
    kept = [(root / image["path"]).read_bytes() == image["bytes"] for image in row["images"]]
    assert kept == [True, False, False, False, False]
    assert [read_image(image["bytes"]).size for image in row["images"]] == [(80, 64), (128, 64), *[(80, 64)] * 3]
    assert {image["bytes"][:2] for image in row["images"]} == {b"\xff\xd8"}

    _run(root, tmp_path / "png", size="original", format="png")
    row = open_dataset(tmp_path / "png")["train"][0]
    for image in row["images"]:
        np.testing.assert_array_equal(
            np.asarray(read_image(image["bytes"])), np.asarray(read_image(root / image["path"]))
        )
    assert read_image(row["images"][1]["bytes"]).size == (200, 100)


def test_a_jpeg_that_is_kept_loses_its_metadata_and_no_pixel(tmp_path: Path) -> None:
    root = _annotate(tmp_path / "raw", {"x": ["exif.jpg", "cut.jpg"]})
    exif = Image.Exif()
    exif[0x010E] = "Doe^Jane"
    _noise(80, 64).save(root / "exif.jpg", quality=80, exif=exif, comment=b"Doe^Jane")
    _noise(80, 64).save(root / "plain.jpg", quality=80)
    (root / "cut.jpg").write_bytes((root / "exif.jpg").read_bytes()[:-2])
    assert b"Doe^Jane" in (root / "exif.jpg").read_bytes()
    _run(root, tmp_path / "out", size=64)
    kept, anew = (image["bytes"] for image in open_dataset(tmp_path / "out")["train"][0]["images"])
    assert kept == (root / "plain.jpg").read_bytes()
    assert b"Doe^Jane" not in anew
    assert anew.endswith(b"\xff\xd9")


def test_a_jpeg_with_extra_data_is_encoded_again(tmp_path: Path) -> None:
    root = _annotate(tmp_path / "raw", {"x": ["a.jpg"]})
    _noise(80, 64).save(root / "a.jpg")
    (root / "a.jpg").write_bytes((root / "a.jpg").read_bytes() + b"\0" * 100_000)
    _run(root, tmp_path / "out")
    assert len(open_dataset(tmp_path / "out")["train"][0]["images"][0]["bytes"]) < 10_000


def test_every_problem_is_counted_once(tmp_path: Path) -> None:
    root = _annotate(
        tmp_path / "raw",
        {
            "good": ["ok.png"],
            "partly": ["none.png", "ok.png", "cut.jpg"],
            "cut": ["cut.jpg"],
            "empty": ["zero.png"],
            "folder": ["x.png"],
            "text": ["text.png"],
            "outside": ["../secret.png"],
            "missing": ["none1.png", "none2.png"],
            "without": [],
            "large": ["large.png"],
            "[red]markup\n": ["none.png"],
        },
    )
    _noise(60, 60).save(root / "ok.png")
    _noise(60, 60).save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:-900])
    (root / "zero.png").touch()
    (root / "x.png").mkdir()
    (root / "text.png").write_text("a report")
    _noise(60, 60).save(tmp_path / "secret.png")
    Image.new("L", (200, 100)).save(root / "large.png")

    manifest = _run(root, tmp_path / "out", max_pixels=10_000)
    skipped = manifest["skipped"]
    assert {reason: (entry["count"], entry["unit"]) for reason, entry in skipped.items()} == {
        "image dropped": (2, "image"),
        "truncated image": (1, "study"),
        "empty file": (1, "study"),
        "image path is a folder": (1, "study"),
        "not an image": (1, "study"),
        "path outside the data folder": (1, "study"),
        "missing image": (2, "study"),
        "no image listed": (1, "study"),
        "too many pixels": (1, "study"),
    }
    assert manifest["studies_read"] == 11
    assert (manifest["studies_written"], manifest["studies_skipped"], manifest["images"]) == (2, 9, 2)
    assert skipped["image dropped"]["examples"][0] == {"id": "partly", "path": "none.png", "detail": "missing image"}
    assert skipped["missing image"]["examples"][1] == {"id": "[red]markup\\n", "path": "none.png"}
    rows = open_dataset(tmp_path / "out")["train"]
    assert rows["study_id"][:] == ["good", "partly"]
    assert rows[1]["views"] == ["unknown"]


def test_examples_do_not_grow_with_the_problems(tmp_path: Path) -> None:
    root = _annotate(tmp_path / "raw", {"good": ["ok.png"]} | {f"s{i}": ["none.png"] for i in range(50)})
    _noise(60, 60).save(root / "ok.png")
    entry = _run(root, tmp_path / "out")["skipped"]["missing image"]
    assert (entry["count"], len(entry["examples"])) == (50, 5)


def test_nothing_usable_is_explained_and_nothing_written(tmp_path: Path) -> None:
    root = _annotate(tmp_path / "raw", {f"s{i}": [f"{i}/0.png", f"{i}/1.png"] for i in range(40)})
    with pytest.raises(RunError) as error:
        _run(root, tmp_path / "out", workers=2)
    text = str(error.value)
    assert "none of the 40 studies" in text
    assert "missing image: 40 studies, first: s0, 0/0.png" in text
    assert f"searched in: {root.resolve()}, {root.resolve() / 'images'}" in text
    assert list(tmp_path.iterdir()) == [root]


def test_out_cannot_be_the_raw_data(tiny_r2gen: Path) -> None:
    with pytest.raises(UsageError, match="holds the raw data"):
        _run(tiny_r2gen, tiny_r2gen, overwrite=True)
    assert (tiny_r2gen / "annotation.json").is_file()


def test_a_file_that_vanishes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emrrg_cli.ingest import prepare as module

    root = _annotate(tmp_path / "raw", {"x": ["ok.png"]})
    _noise(60, 60).save(root / "ok.png")

    def gone(*args: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(module, "load_image", gone)
    with pytest.raises(RunError, match=r"cannot be opened: 1 study, first: x, ok\.png, Stale file handle"):
        _run(root, tmp_path / "out")


@pytest.mark.slow
def test_sigterm_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emrrg_cli.ingest import prepare as module

    root = _annotate(tmp_path / "raw", {"x": ["ok.png"], "y": ["ok.png"]})
    _noise(60, 60).save(root / "ok.png")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "load_image", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as error:
        _run(root, tmp_path / "out")
    assert error.value.exit_code == 143
    assert list(tmp_path.iterdir()) == [root]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_an_interrupted_image_is_not_reported_as_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _annotate(tmp_path / "raw", {"x": ["ok.png"], "y": ["ok.png"]})
    _noise(60, 60).save(root / "ok.png")

    def interrupted(image: ImageFile.ImageFile) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupted)
    with pytest.raises(Interrupted) as error:
        _run(root, tmp_path / "out")
    assert error.value.exit_code == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_data(shared_data: Path, tmp_path: Path) -> None:
    manifest = _run(shared_data / "covid_chestxray", tmp_path / "out", workers=2)
    assert {split: count["studies"] for split, count in manifest["splits"].items()} == {
        "train": 296,
        "validation": 33,
        "test": 42,
    }


def test_a_full_disk_names_the_file_and_the_space(
    tiny_r2gen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emrrg_cli.ingest import shards

    write = shards.pq.ParquetWriter.write_table

    def full(writer: Any, table: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")
        written.append(write(writer, table))

    written: list[None] = []
    monkeypatch.setattr(shards.pq.ParquetWriter, "write_table", full)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"cannot write .*/train\.growing: No space left on device") as caught:
        _run(tiny_r2gen, out, studies_per_shard=2)
    needed = re.match(r"It needs about (\d+) KiB; ", str(caught.value.hint))
    assert needed is not None
    monkeypatch.undo()
    size = sum(file.stat().st_size for file in (tmp_path / ".out.partial").rglob("*.parquet"))
    _run(tiny_r2gen, out, studies_per_shard=2)
    rest = sum(file.stat().st_size for file in out.rglob("*.parquet")) - size
    assert 0.4 < 1024 * int(needed[1]) / rest < 1.1
    assert "The same command continues after the finished shards." in str(caught.value.hint)
