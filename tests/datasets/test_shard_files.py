"""Files of a dataset directory that are missing, swapped, or hold what no dataset directory holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emrrg_cli.datasets.card import card
from emrrg_cli.datasets.directory import Column, open_dataset
from emrrg_cli.datasets.fingerprint import dataset_fingerprint
from emrrg_cli.datasets.image_dataset import SplitImages
from emrrg_cli.datasets.manifest import MANIFEST, read_manifest
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.datasets.shard_files import find_shards
from emrrg_cli.datasets.summary import summarise
from emrrg_cli.errors import RunError
from emrrg_cli.recipe.common import DataSettings


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dataset, tmp_path / "set")


def _shard(dataset: Path, split: str) -> Path:
    return next((dataset / "data").glob(f"{split}-*.parquet"))


def _swap(dataset: Path, one: str, other: str) -> None:
    first, second = _shard(dataset, one), _shard(dataset, other)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _without_digests(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    del manifest["files"]
    (dataset / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("read", [open_dataset, find_shards, summarise, dataset_fingerprint])
def test_a_listed_shard_that_is_missing(dataset: Path, read: Any) -> None:
    _shard(dataset, "validation").unlink()
    with pytest.raises(RunError, match=r"manifest.json lists 1 shard of split validation, the folder has 0"):
        read(dataset)


@pytest.mark.parametrize("other", ["test", "train"])
def test_swapped_splits_are_noticed(dataset: Path, other: str) -> None:
    _swap(dataset, "validation", other)
    with pytest.raises(RunError, match=r"data/.*parquet has the content that data/.*parquet should have"):
        open_dataset(dataset)
    _without_digests(dataset)
    if other == "train":  # of another number of studies
        with pytest.raises(RunError, match=r"the number of split validation in manifest\.json"):
            open_dataset(dataset)


def test_a_shard_that_was_edited_opens(dataset: Path) -> None:
    file = _shard(dataset, "train")
    pq.write_table(pq.read_table(file).slice(0, 12), file, compression="gzip")
    assert len(open_dataset(dataset)["train"]) == 12


def test_a_directory_without_digests_or_manifest_opens(dataset: Path) -> None:
    _without_digests(dataset)
    assert len(open_dataset(dataset)["train"]) == 16
    (dataset / MANIFEST).unlink()
    assert len(open_dataset(dataset)["train"]) == 16


# Columns and images.

GOOD: dict[str, Any] = {"study_id": "a", "patient_id": None, "views": ["PA"], "findings": None, "impression": None,
                        "report": "Clear.", "source": "x"}  # fmt: skip


def _write(root: Path, rows: list[dict[str, Any]]) -> Path:
    (root / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "train-00000-of-00001.parquet")
    return root


def _image(data: bytes | None = b"x", path: str | None = "a.png") -> dict[str, Any]:
    return {"bytes": data, "path": path}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("findings", 1.5, "column findings of split train is double, not text"),
        ("report", float("nan"), "column report of split train is double, not text"),
        ("patient_id", 7.0, "column patient_id of split train is double, not text"),
        ("images", "a.png", "column images of split train is string, not lists of images"),
        ("images", [1.0], "column images of split train is list, not lists of images"),
        ("views", "PA", "column views of split train is string, not lists of text"),
    ],
)
def test_columns_of_a_wrong_kind(tmp_path: Path, column: str, value: object, message: str) -> None:
    root = _write(tmp_path, [GOOD | {"images": [_image()]} | {column: value}])
    with pytest.raises(RunError) as error:
        open_dataset(root)
    assert message.replace("double", "float64") in error.value.message


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "study b has no images"),
        ([], "study b has no images"),
        ([None], "study b: the image is null"),
        ([_image(b"")], "study b: the image is empty"),
        ([_image(None, None)], "study b: the image is empty"),
        ([_image(None, "../outside.png")], "study b: the image path ../outside.png leads out of the dataset directory"),
        ([_image(None, "/etc/passwd")], "study b: the image path /etc/passwd leads out of the dataset directory"),
        ([_image(None, "link.png")], "study b: the image path link.png leads out of the dataset directory"),
        ([_image(b"x", "n")], "study b: <bytes>: not an image"),
    ],
)
def test_studies_without_an_image_get_one_message(tmp_path: Path, images: Any, message: str) -> None:
    (tmp_path / "outside.png").write_bytes(b"x")
    rows = [GOOD | {"images": [_image()]}, GOOD | {"study_id": "b", "images": images}]
    root = _write(tmp_path / "set", rows)
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    split = open_dataset(root)["train"].select([1])
    dataset = ReportDataset(split, DataSettings(root="x"), 16)
    with pytest.raises(RunError) as error:
        dataset[0]
    assert error.value.message == message
    if images:
        with pytest.raises(RunError, match="image"):
            _read_all(SplitImages(split))


def _read_all(images: SplitImages) -> None:
    for index in range(len(images)):
        if isinstance(images.read(index), bytes):
            raise RunError("an image that decoding refuses")


def test_an_image_beside_the_data_is_read(tmp_path: Path, tiny_r2gen: Path) -> None:
    root = _write(tmp_path / "set", [GOOD | {"images": [_image(None, "images/a.png")]}])
    (root / "images").mkdir()
    shutil.copy(tiny_r2gen / "images" / "study00" / "0.png", root / "images" / "a.png")
    split = open_dataset(root)["train"]
    assert ReportDataset(split, DataSettings(root="x"), 16)[0].pixels.shape == (1, 16, 16)
    assert SplitImages(split).read(0) == root / "images" / "a.png"


def test_ids_are_read_once(tiny_dataset: Path) -> None:
    split = open_dataset(tiny_dataset)["train"]
    dataset = ReportDataset(split, DataSettings(root="x"), 16)
    expected = list(split["study_id"])
    dataset.split = None
    assert dataset.study_ids == expected
    assert dataset.study_ids is dataset.study_ids


def test_the_card_shows_names_as_text() -> None:
    manifest = {"splits": {}, "fingerprint": "0", "source": "a | [b](javascript:c) <script>\n---\x1b[31m"}
    text = card(manifest, {"labels": Column("texts", "labels")}, None)
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert "<script>" not in text
    assert "\x1b" not in text
    assert text.count("\n---\n") == 1
    assert "a \\| \\[b\\]\\(javascript:c\\) &lt;script&gt;" in title
