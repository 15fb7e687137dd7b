"""The dataset directory: what is written, that it is whole or absent, and how it is opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.manifest import read_manifest
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.base import EncodedImage
from emrrg_cli.imaging.raster import encode
from emrrg_cli.imaging.read import read_image
from emrrg_cli.ingest import shards
from emrrg_cli.ingest.dataset_writer import check_target, open_writer
from emrrg_cli.ingest.prepare import PreparedImages
from emrrg_cli.ingest.study import ImportLog, Study
from emrrg_cli.vocabulary import Split


def _study(study_id: str, split: Split = "train", report: str | None = "Clear.") -> Study:
    return Study(study_id, None, split, (), (), None, "None.", report, "mine")


def _image(value: int = 0) -> EncodedImage:
    return EncodedImage(f"{value}.png", encode(Image.new("L", (8, 6), value), "png"))


def _write(
    out: Path,
    count: int = 3,
    *,
    per_shard: int = 1000,
    overwrite: bool = False,
    fail: BaseException | None = None,
    fingerprint: str = "mine",
) -> Path:
    check_target(out, overwrite=overwrite)
    with open_writer(out, fingerprint=fingerprint, studies_per_shard=per_shard, overwrite=overwrite) as writer:
        for study in writer.remaining(iter([_study(f"s{index}") for index in range(count)])):
            index = int(study.study_id[1:])
            images = (_image(index), _image(index + 100))
            writer.put(study, PreparedImages(images, ("PA", "LATERAL"), ()))
        if fail is not None:
            raise fail
        writer.finish(lambda log: {"source": "mine"}, ImportLog())
    return out


@pytest.mark.slow
def test_load_dataset_opens_the_fixture(tiny_dataset: Path, tmp_path: Path) -> None:
    code = "import sys; from datasets import load_dataset; d = load_dataset(sys.argv[1]); print(d['train'][1])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_dataset)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'study_id': 'study01'" in done.stdout
    assert done.stdout.count("image mode=L size=160x140") == 2


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    studies = open_dataset(_write(tmp_path / "out"))
    assert list(studies) == ["train"]  # splits without studies are left out
    row = studies["train"][2]
    images = row.pop("images")
    assert row == {
        "study_id": "s2",
        "patient_id": None,
        "views": ["PA", "LATERAL"],
        "findings": None,
        "impression": "None.",
        "report": "Clear.",
        "source": "mine",
    }
    assert [image["path"] for image in images] == ["2.png", "102.png"]
    assert [np.asarray(read_image(image["bytes"])).max() for image in images] == [2, 102]


def test_shards_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "STUDIES_PER_ROW_GROUP", 2)
    out = _write(tmp_path / "out", 12, per_shard=5)
    files = sorted((out / "data").iterdir())
    assert [file.name for file in files] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    sizes = [
        [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] for file in map(pq.ParquetFile, files)
    ]
    assert sizes == [[2, 2, 1], [2, 2, 1], [2]]
    assert open_dataset(out)["train"]["study_id"][:] == [f"s{i}" for i in range(12)]
    assert read_manifest(out)["splits"] == {"train": {"studies": 12, "images": 24, "shards": 3}}
    # An exact multiple leaves no empty shard behind.
    assert len(list((_write(tmp_path / "ten", 10, per_shard=5) / "data").iterdir())) == 2


def test_large_images_end_a_row_group_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BYTES_PER_ROW_GROUP", 1)
    out = _write(tmp_path / "out", 4)
    assert pq.ParquetFile(next((out / "data").iterdir())).num_row_groups == 4


def test_directories_of_the_same_name_are_not_confused(tmp_path: Path) -> None:
    from datasets import load_dataset

    # `datasets` would show the first one's rows for all three, were it not for the fingerprint in the card.
    for folder, count in (("a", 1), ("b", 2), ("b", 3)):
        out = _write(tmp_path / folder / "out", count, overwrite=True)
        assert len(load_dataset(str(out))["train"]) == count
        assert len(open_dataset(out)["train"]) == count


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(name: str, study: Study, image: EncodedImage) -> str:
        with open_writer(tmp_path / name, fingerprint="x", studies_per_shard=1) as writer:
            writer.put(study, PreparedImages((image,), ("PA",), ()))
            return str(writer.finish(lambda log: {}, ImportLog())["fingerprint"])

    prints = [
        fingerprint("a", _study("x"), _image(1)),
        fingerprint("b", _study("x"), _image(1)),
        fingerprint("c", _study("x"), _image(2)),
        fingerprint("d", _study("y"), _image(1)),
        fingerprint("e", _study("x", report=None), _image(1)),
        fingerprint("f", _study("x", "test"), _image(1)),
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5


def test_the_dataset_can_be_streamed(tiny_dataset: Path) -> None:
    from datasets import load_dataset

    first = next(iter(load_dataset(str(tiny_dataset), split="train", streaming=True)))
    assert first["study_id"] == "study00"
    assert first["images"][0].size == (160, 140)


def test_a_failure_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "out", fail=KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_after_a_failure_the_next_run_continues(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = _write(tmp_path / "whole", 5, per_shard=2)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        _write(out, 5, per_shard=2, fail=KeyboardInterrupt())
    work = tmp_path / ".out.partial"
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (work / "shards").glob("*.parquet")}
    assert sorted(kept) == ["train-00000.parquet", "train-00001.parquet"]
    _write(out, 5, per_shard=2)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for name in ("data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet", "README.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert (out / "data" / "train-00001-of-00003.parquet").stat().st_mtime_ns == kept["train-00001.parquet"]
    # Other data or settings: nothing of it can be used, and it is not thrown away unasked.
    shutil.rmtree(out)
    with pytest.raises(KeyboardInterrupt):
        _write(out, 5, per_shard=2, fail=KeyboardInterrupt())
    with pytest.raises(UsageError, match="unfinished run with other data or settings"):
        _write(out, 5, per_shard=2, fingerprint="other")
    assert sorted(path.name for path in (work / "shards").glob("*.parquet")) == sorted(kept)
    _write(out, 5, per_shard=2, overwrite=True, fingerprint="other")
    assert "unfinished run with other data or settings" in " ".join(capfd.readouterr().err.split())
    assert len(open_dataset(out)["train"]) == 5


def test_a_full_disk_at_the_end_loses_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, mkdir = tmp_path / "out", Path.mkdir

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "data":
            raise OSError(28, "No space left on device")
        mkdir(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(RunError, match="No space left on device"):
            _write(out, 5, per_shard=2)
    shards = tmp_path / ".out.partial" / "shards"
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    assert len(kept) == 3
    _write(out, 5, per_shard=2)
    written = {path.stat().st_mtime_ns for path in (out / "data").glob("*.parquet")}
    assert written == set(kept.values())


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_run_killed_at_its_end_continues(renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _write(tmp_path / "whole", 5, per_shard=2)
    out = tmp_path / "out"
    replace, count = Path.replace, 0

    def killed(path: Path, target: Path) -> Path:
        nonlocal count
        if path.parent.name == "shards" and path.suffix == ".parquet":
            count += 1
            if count > renamed:
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            _write(out, 5, per_shard=2)
    assert not out.exists()
    _write(out, 5, per_shard=2)
    assert sorted(path.name for path in (out / "data").iterdir()) == sorted(
        path.name for path in (whole / "data").iterdir()
    )
    for path in (whole / "data").iterdir():
        assert (out / "data" / path.name).read_bytes() == path.read_bytes()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        open_writer(out, fingerprint="x", studies_per_shard=1),
        pytest.raises(RunError, match="another process is writing"),
        open_writer(out, fingerprint="x", studies_per_shard=1),
    ):
        pass


def test_a_failure_leaves_the_old_directory(tmp_path: Path) -> None:
    out = _write(tmp_path / "out")
    before = (out / "manifest.json").read_text()
    with pytest.raises(ValueError, match="half-way"):
        _write(out, 1, overwrite=True, fail=ValueError("half-way"))
    assert (out / "manifest.json").read_text() == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")  # as pyarrow does

    monkeypatch.setattr(shards.pq.ParquetWriter, "write_table", full)
    with pytest.raises(RunError, match=r"cannot write .*shards/train\.growing: No space left on device") as caught:
        _write(tmp_path / "out")
    assert re.fullmatch(r"It needs about \d+ KiB; [\d,.]+ MiB are free there\..*", str(caught.value.hint))
    assert list(tmp_path.iterdir()) == []


def test_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _write(out, 3)  # an empty directory is no obstacle
    with pytest.raises(UsageError, match="exists and is not empty") as error:
        _write(out, 1)
    assert "--overwrite" in str(error.value)
    assert len(open_dataset(out)["train"]) == 3
    _write(out, 1, overwrite=True)
    assert len(open_dataset(out)["train"]) == 1
    assert list(tmp_path.iterdir()) == [out]


def test_only_a_dataset_directory_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("x")
    with pytest.raises(UsageError, match="was not written by"):
        _write(out, overwrite=True)
    assert (out / "chapter.tex").read_text() == "x"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        _write(file, overwrite=True)


def test_raw_data_is_never_replaced(tmp_path: Path) -> None:
    out = _write(tmp_path / "out")
    raw = out / "raw"
    raw.mkdir()
    with pytest.raises(UsageError, match="holds the raw data"):
        check_target(out, overwrite=True, protect=raw)
    assert raw.is_dir()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "big_disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "big_disk")
    _write(link)
    assert link.is_symlink()
    assert (tmp_path / "big_disk" / "manifest.json").is_file()


def test_the_copy_is_announced_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = _write(tmp_path / "out [a b] *")
    open_dataset(out)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert f"Arrow copy of {out} in " in printed.err
    assert "KB" in printed.err
    assert "Generating" not in printed.err
    rows = open_dataset(out)
    assert capfd.readouterr().err == ""
    copies = [file for split in rows.values() for file in Path(split.cache_files[0]["filename"]).parent.glob("*.arrow")]
    assert {file.name for file in copies} == {f"parquet-{split}.arrow" for split in rows}


def test_images_without_metadata_of_datasets_are_read(tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    for file in (tmp_path / "foreign" / "data").iterdir():
        table = pq.read_table(file).replace_schema_metadata(None)
        pq.write_table(table, file)
    assert open_dataset(tmp_path / "foreign")["test"][0] == open_dataset(tiny_dataset)["test"][0]


def test_a_cache_that_cannot_be_written_is_named(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(RunError, match=r"cannot open the dataset .*file.*\n.*Set HF_HOME to a folder"):
        open_dataset(tiny_dataset)


def test_invalid_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such dataset directory"):
        open_dataset(tmp_path / "none")
    with pytest.raises(UsageError, match=r"it has no data/\*\.parquet"):
        open_dataset(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        open_dataset(tmp_path / "file")
    out = _write(tmp_path / "out")
    shard = next((out / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(RunError, match="cannot open the dataset"):
        open_dataset(out)
    shard.unlink()
    with pytest.raises(RunError, match="has lost its Parquet files"):
        open_dataset(out)


def test_shards_must_fit_together(tmp_path: Path) -> None:
    out = _write(tmp_path / "out", 3, per_shard=1)
    data = out / "data"
    (data / "train-00001-of-00003.parquet").rename(data / "kept")
    with pytest.raises(RunError, match="shard 1 of 3 of split train is missing"):
        open_dataset(out)
    (data / "kept").rename(data / "train-00001-of-00004.parquet")
    with pytest.raises(RunError, match="shards of different runs"):
        open_dataset(out)
    (data / "train-00001-of-00004.parquet").rename(data / "holdout.parquet")
    with pytest.raises(UsageError, match="not named like a shard"):
        open_dataset(out)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"study_id": ["x"]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(RunError, match="split train lacks the columns patient_id, images, views"):
        open_dataset(tmp_path)


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such dataset directory"):
        read_manifest(tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(RunError, match="is not a manifest"):
        read_manifest(tmp_path)
