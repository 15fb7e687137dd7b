"""What is in a dataset directory is counted as it is, whatever columns it has."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emrrg_cli.datasets import summary_counts as module
from emrrg_cli.datasets.summary import summarise
from emrrg_cli.datasets.summary_counts import sentences_of
from emrrg_cli.errors import RunError, UsageError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes rows as the Parquet file of a split and returns the dataset directory."""

    def _write(split: str, rows: list[dict[str, Any]], shard: int = 0, shards: int = 1) -> Path:
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "set" / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=3)
        return tmp_path / "set"

    return _write


def test_a_dataset_directory_is_counted(tiny_dataset: Path) -> None:
    summary = summarise(tiny_dataset)
    assert {split: (one.studies, one.images) for split, one in summary.splits.items()} == {
        "train": (16, 24),
        "validation": (4, 6),
        "test": (4, 6),
    }
    assert (summary.studies, summary.images, summary.sources) == (24, 36, {"r2gen": 24})
    train = summary.splits["train"]
    assert (train.patients, train.without_patient, train.without_report) == (0, 16, 0)
    assert summary.views == {"unknown": {"train": 24, "validation": 6, "test": 6}}
    assert summary.labels == {}
    assert summary.words == {10: 12, 12: 6, 15: 6}
    assert summary.sentences[:2] == [("Study of the chest", 24), ("No pneumothorax", 24)]
    assert ("The heart is enlarged", 6) in summary.sentences
    found = summary.repeated
    assert (found.distinct, found.repeated, found.studies, found.across_splits) == (4, 4, 24, 4)
    assert found.most[0] == ("Study of the chest. The heart is enlarged. No pneumothorax.", 6)
    assert summary.manifest["studies_read"] == 24
    printed = summary.as_dict()
    assert printed["report_words"] | {"histogram": None} == {
        "reports": 24, "shortest": 10, "median": 11, "mean": 11.75, "longest": 15, "histogram": None,
    }  # fmt: skip
    assert printed["skipped"] == {}
    assert len(printed["examples"]) == 12


def test_patients_labels_and_views_by_split(write: Any) -> None:
    train = [
        {"study_id": "a", "patient_id": "p", "labels": ["edema", "edema"], "views": ["PA", None], "report": "Edema."},
        {"study_id": "b", "patient_id": "p", "labels": [], "views": ["PA"], "report": "  edema. "},
        {"study_id": "c", "patient_id": "q", "labels": ["nodule"], "views": None, "report": "1. A nodule.\n2. Old."},
        {"study_id": "d", "patient_id": None, "labels": None, "views": ["AP"], "report": None},
    ]
    images = {"a": 2, "b": 1, "c": 1, "d": 0}
    for row in train:
        row["images"] = [{"bytes": b"x", "path": f"{n}.png"} for n in range(images[row["study_id"]])]
    write("train", train)
    root = write("test", [{"study_id": "e", "patient_id": "q", "labels": ["edema"], "report": " EDEMA.\n"}])
    summary = summarise(root)
    assert summary.splits["train"].patients == 2
    assert summary.splits["train"].without_patient == summary.splits["train"].without_report == 1
    assert summary.patients_in_several_splits == 1
    assert summary.labels == {"labels": {"edema": {"train": 1, "test": 1}, "nodule": {"train": 1, "test": 0}}}
    assert summary.views == {"PA": {"train": 2}, "unknown": {"train": 2}}  # as many as there are images
    assert (summary.splits["train"].images, summary.splits["test"].images) == (4, 0)
    assert (summary.repeated.distinct, summary.repeated.studies, summary.repeated.across_splits) == (2, 3, 1)
    assert summary.sentences == [("Edema", 3), ("A nodule", 1), ("Old", 1)]
    assert summary.manifest == {}


def test_a_directory_with_no_text_at_all(write: Any) -> None:
    image = [{"bytes": b"x", "path": None}]
    summary = summarise(write("train", [{"study_id": str(n), "images": image} for n in range(7)]))
    assert (summary.studies, summary.images) == (7, 7)
    assert (summary.words, summary.sentences, summary.histogram(), summary.median_words) == ({}, [], [], 0)
    assert summary.repeated.distinct == 0
    assert summary.as_dict()["report_words"]["mean"] == 0.0
    assert {one.report for one in summary.examples} == {""}
    (file,) = (Path(summary.root) / "data").iterdir()
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    empty = summarise(summary.root)
    assert (empty.studies, empty.examples, empty.views) == (0, [], {})


def test_a_line_end_does_not_end_a_sentence() -> None:
    report = "The lungs are\nclear. Heart size\n is normal!\n\nIMPRESSION:\n\n1. No change?  3.5 cm nodule"
    assert list(sentences_of(report)) == [
        "The lungs are clear", "Heart size is normal", "IMPRESSION:", "No change", "3.5 cm nodule",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "bars"),
    [
        ({3: 2, 5: 1}, [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 2), (4, 4, 0), (5, 5, 1)]),
        ({1: 400, 25: 599, 900: 1}, [(0, 1, 400), (24, 25, 599), (26, None, 1)]),
    ],
)
def test_the_histogram_has_few_bars_and_loses_no_report(
    tiny_dataset: Path, words: dict[int, int], bars: list[tuple[int, int | None, int]]
) -> None:
    summary = summarise(tiny_dataset, examples=0)
    summary.words = words
    found = summary.histogram()
    assert [bar for bar in found if bar[2]] == [bar for bar in bars if bar[2]]
    assert len(found) <= 16
    assert sum(reports for _, _, reports in found) == sum(words.values())


def test_examples_are_spread_over_every_split(write: Any) -> None:
    for shard in range(2):
        write("train", [{"study_id": f"t{shard}{n}", "images": [{"bytes": b"i%d" % n}]} for n in range(10)], shard, 2)
    root = write("test", [{"study_id": f"e{n}", "findings": "F", "impression": "I"} for n in range(3)])
    shown = summarise(root, examples=8).examples
    assert [one.study_id for one in shown] == ["t02", "t07", "t12", "t17", "e0", "e1", "e2"]
    assert shown[0].images[0].data == b"i2"
    assert shown[-1].report == "F I"
    assert [one.split for one in shown] == ["train"] * 4 + ["test"] * 3
    assert summarise(root, examples=0).examples == []


def test_the_bytes_of_images_are_not_read_for_the_counts(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    rows = module.text_rows

    def watched(*arguments: Any, **options: Any) -> Any:
        for row in rows(*arguments, **options):
            seen.extend(row.get("images") or [])
            yield row

    monkeypatch.setattr(module, "text_rows", watched)
    summarise(tiny_dataset, examples=0)
    assert len(seen) == 36
    assert all(set(image) == {"path"} for image in seen)


def test_memory_grows_by_a_few_bytes_a_study(write: Any) -> None:
    rng = np.random.default_rng(0)

    def peak(studies: int) -> int:
        texts = (" ".join(map(str, rng.integers(0, 9, 150))) + f" x{n}." for n in range(studies))
        root = write("train", [{"study_id": str(n), "patient_id": str(n), "report": t} for n, t in enumerate(texts)])
        tracemalloc.start()
        try:
            summarise(root, examples=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(1000), peak(4000)
    assert (many - few) / 3000 < 100  # bytes; a report has 300


def test_sentences_are_counted_exactly(write: Any) -> None:
    rare = [{"study_id": f"r{n}", "report": f"Rare {'x' * n}y."} for n in range(200)]
    often = [{"study_id": f"o{n}", "report": "Lungs clear. lungs CLEAR."} for n in range(70)]
    once_more = [{"study_id": "z", "report": "LUNGS clear. The end."}]
    summary = summarise(write("train", rare + often + once_more), examples=0)
    assert summary.sentences[:2] == [("Lungs clear", 71), ("Rare y", 1)]
    assert len(summary.sentences) == 30


def test_broken_files_are_named(write: Any, tmp_path: Path) -> None:
    root = write("train", [{"study_id": str(n), "report": "text " * 50} for n in range(30)])
    (file,) = (root / "data").iterdir()
    data = bytearray(file.read_bytes())
    data[4:400] = b"\xff" * 396
    file.write_bytes(bytes(data))
    with pytest.raises(RunError, match=r"train-00000-of-00001\.parquet cannot be read: "):
        summarise(root)
    file.write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"train-00000-of-00001\.parquet cannot be read: "):
        summarise(root)
    with pytest.raises(UsageError, match="no such dataset directory"):
        summarise(tmp_path / "none")
