"""A dataset directory is known by its content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from emrrg_cli.datasets import shard_files
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.fingerprint import dataset_fingerprint
from emrrg_cli.errors import RunError, UsageError


@pytest.fixture
def copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def test_the_fingerprint_is_from_the_manifest(tiny_dataset: Path, copy: Path) -> None:
    written = json.loads((tiny_dataset / "manifest.json").read_text())["fingerprint"]
    assert dataset_fingerprint(tiny_dataset) == dataset_fingerprint(str(copy)) == written


def test_each_footer_is_read_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    footer = shard_files.read_footer
    monkeypatch.setattr(shard_files, "read_footer", lambda file: read.append(file.name) or footer(file))
    open_dataset(copy)
    assert dataset_fingerprint(copy) == dataset_fingerprint(copy)
    assert sorted(read) == sorted(file.name for file in (copy / "data").iterdir())


def test_files_that_the_manifest_does_not_list_change_it(copy: Path) -> None:
    written = dataset_fingerprint(copy)
    shard = next((copy / "data").glob("train-*"))
    table = pq.read_table(shard)
    index = table.schema.get_field_index("report")
    pq.write_table(table.set_column(index, table.schema.field(index), [["Other."] * len(table)]), shard)
    edited = dataset_fingerprint(copy)
    assert edited != written
    (copy / "manifest.json").unlink()
    assert dataset_fingerprint(copy) == edited


def test_without_a_manifest_it_changes_with_the_files(copy: Path) -> None:
    written = dataset_fingerprint(copy)
    (copy / "manifest.json").unlink()
    plain = dataset_fingerprint(copy)
    assert plain != written
    assert dataset_fingerprint(copy) == plain
    shard = next((copy / "data").glob("train-*"))
    table = pq.read_table(shard)
    pq.write_table(table.slice(0, len(table) - 1), shard)
    fewer = dataset_fingerprint(copy)
    reports = ["Other.", *table.column("report").to_pylist()[1:]]
    index = table.schema.get_field_index("report")
    other = table.set_column(index, table.schema.field(index), [reports])
    pq.write_table(other, shard)
    assert len({plain, fewer, dataset_fingerprint(copy)}) == 3
    shard.write_bytes(b"cut")
    assert len(dataset_fingerprint(copy)) == 32  # whoever opens it says that it is broken


def test_a_missing_directory_or_broken_manifest_is_an_error(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such dataset directory"):
        dataset_fingerprint(tmp_path / "none")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json cannot be read"):
        dataset_fingerprint(copy)
