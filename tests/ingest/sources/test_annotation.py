"""Annotation files read in blocks: the same rows and the same messages wherever a block ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources import json_stream as module
from emrrg_cli.ingest.sources.annotation import Annotation
from emrrg_cli.ingest.study import ImportLog


def _row(number: int, **more: object) -> dict[str, object]:
    return {"id": f"ä{number}", "report": f'A "quoted" \\ text, {number}.', "image_path": [f"{number}.png"], **more}


@pytest.fixture
def content() -> dict[str, object]:
    rows = [_row(number, study_id=number, subject_id=f"p{number}", split="x", odd=[1]) for number in range(9)]
    return {"about": {"a": [1, {}]}, "train": rows[:5], "val": rows[5:7], "test": rows[7:], "version": 12}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 3])
def test_blocks_may_end_anywhere(
    tmp_path: Path, content: dict[str, object], block: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + " \n", encoding="utf-8-sig")
    annotation = Annotation(file)
    assert annotation.counts == {"train": 5, "validation": 2, "test": 2}
    rows = list(annotation)
    assert [row.study_id for row in rows] == [f"ä{number}" for number in range(9)]
    assert rows == list(annotation)  # again
    last = rows[8]
    assert (last.split, last.patient_id, last.report, last.image_paths, dict(last.other)) == (
        "test", "p8", 'A "quoted" \\ text, 8.', ("8.png",), {"study_id": "8"},
    )  # fmt: skip
    assert [row.study_id for row in annotation.first(1, ImportLog())] == ["ä0", "ä5", "ä7"]
    assert (annotation.count(), annotation.count(1), annotation.count(3)) == (9, 3, 7)


def test_splits_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"test": [_row(3)], "train": [_row(1), _row(2)], "val": []}))
    assert [row.study_id for row in Annotation(file)] == ["ä1", "ä2", "ä3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"train": [\n{"id": 1, "report": "", "image_path": []},\n  {"id": }]}',
            ":3:10: not valid JSON: Expecting value",
        ),
        ('{"train": [\n{"id": 1, "report": "", "image_path": []} {', ":2:43: not valid JSON: Expecting ',' delimiter"),
        ('{"train": [{"id": "1', ":1:19: not valid JSON: Unterminated string"),
        ('{"train": []', ":1:13: not valid JSON: Expecting ',' delimiter"),
        ('{"train": [], train', ":1:15: not valid JSON: Expecting property name"),
        ('{"train" []}', ":1:10: not valid JSON: Expecting ':' delimiter"),
        ('{"train": [], "val": [], "test": []} x', ":1:38: not valid JSON: Extra data"),
        ('{"train": [], "train": []}', "train occurs twice"),
        ('{"train": [], "val": 12', "val is a number, not a list"),
    ],
)
@pytest.mark.parametrize("block", [1, 5, 2**20])
def test_errors_name_the_place(
    tmp_path: Path, text: str, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError) as error:
        Annotation(tmp_path / "a.json")
    assert message in error.value.message


def test_an_endless_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)
    monkeypatch.setattr(module, "_MAX_VALUE", 1000)
    (tmp_path / "a.json").write_text('{"train": ["' + "x" * 100_000)
    with pytest.raises(RunError, match="1:12: not valid JSON: Unterminated string"):
        Annotation(tmp_path / "a.json")


def test_positions_of_invalid_bytes_count_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)
    (tmp_path / "a.json").write_bytes('{"train": [], "ää": "'.encode() + b'\xff"}')
    with pytest.raises(RunError, match=r"not UTF-8 text \(byte 23\)"):
        Annotation(tmp_path / "a.json")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such annotation file"):
        Annotation(tmp_path / "none.json")
    with pytest.raises(RunError, match="cannot be read"):
        Annotation(tmp_path)


def test_repeated_ids_are_counted_once(tmp_path: Path) -> None:
    rows = {split: [{"id": name, "report": "", "image_path": []} for name in names]
            for split, names in (("train", "aba"), ("val", ""), ("test", "bc"))}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    log = ImportLog()
    assert [row.study_id for row in Annotation(tmp_path / "a.json").unique(None, log)] == ["a", "b", "c"]
    assert log.read == 5
    assert log.skipped["id seen before"].examples == [
        {"id": "a", "detail": "in train, kept from train"}, {"id": "b", "detail": "in test, kept from train"},
    ]  # fmt: skip
